"""`python -m rnnkit info`, what the build notes of itself, and installations that cannot compile."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rnnkit
from rnnkit import __main__ as command
from rnnkit import backends

ROOT = Path(__file__).parents[1]

needs_extension = pytest.mark.skipif(
    backends.EXTENSION is None, reason=f"no C++ extension: {backends.EXTENSION_REASON}"
)

# Not find_spec("pip"): setuptools takes a process that looks for pip's module to be pip itself, and breaks in it.
INSTALLED = {distribution.name for distribution in metadata.distributions()}

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="pure Python elsewhere")

needs_installer = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or not {"pip", "setuptools"} <= INSTALLED,
    reason="needs the sources, pip and setuptools",
)


@pytest.fixture
def note() -> ModuleType:
    """The module rnnkit._build; a checkout that was never built has none."""
    try:
        return importlib.import_module("rnnkit._build")
    except ModuleNotFoundError:
        pytest.skip("rnnkit was not installed by its setup.py")


def test_info_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKIT_EXAMPLE", "shown")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (
        rnnkit.__version__,
        torch.__version__,
        str(Path(rnnkit.__file__).parent),
        sys.version.split()[0],
        torch.backends.cpu.get_cpu_capability(),
        "triton",
        "CUDA library",
        "RNNKIT_EXAMPLE",
        backends.EXTENSION_REASON,
        *backends.BACKENDS,
    ):
        assert fact in text


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads in torch"] == torch.get_num_threads()
    assert list(facts["backends"]) == list(backends.BACKENDS)
    assert facts["backends"]["cpp"].startswith(
        "not available" if backends.EXTENSION is None else "loaded"
    )
    assert facts["serving"]["cpu"] == ("reference" if backends.EXTENSION is None else "cpp")


def test_info_says_why_there_is_no_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "EXTENSION", None)
    monkeypatch.setattr(backends, "EXTENSION_REASON", "no C++ compiler: c++")
    command.main(["info"])
    assert "not available: no C++ compiler: c++" in capsys.readouterr().out


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main([])
    assert exit.value.code == 2
    assert "info" in capsys.readouterr().err


def test_module_runs() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rnnkit", "info"],
        cwd=Path(rnnkit.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{rnnkit.__version__}\n" in run.stdout


def test_note_and_extension_agree(note: ModuleType) -> None:
    assert (note.REASON == "") == (backends.EXTENSION is not None)


@needs_extension
def test_note_of_a_built_extension(note: ModuleType) -> None:
    assert torch.__version__ == note.TORCH_VERSION
    assert note.COMPILER
    assert backends.EXTENSION.capability() in note.CAPABILITIES


def test_note_of_the_cuda_library(note: ModuleType) -> None:
    library = Path(note.__file__).with_name("_cuda.so")
    assert library.exists() == (note.CUDA_REASON == "") == bool(note.CUDA_ARCHITECTURES)


@needs_extension
@needs_linux
def test_one_openmp_pool() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(pools) == 1


OURS = ("RNNKIT_", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CC", "CXX")

INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."


def copy_sources(to: Path) -> None:
    """What an installation needs, without what the checkout has built."""
    for name in ("rnnkit", "csrc"):
        ignore = shutil.ignore_patterns("_build.py", "*.so", "__pycache__")
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    files = (
        "setup.py",
        "build_cuda.py",
        "build_objects.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    )
    for name in files:
        shutil.copy(ROOT / name, to)


def run_in_copy(
    sources: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python in a copy of the sources, so that what the checkout has built stays as it is."""
    if not sources.exists():
        copy_sources(sources)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=sources,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


USE = """
import sys
import warnings

# An editable installation of rnnkit would find the checkout's extension for this copy.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]

import torch
import rnnkit
from rnnkit import _build, backends

assert rnnkit.__file__.startswith({site!r}), rnnkit.__file__
assert backends.EXTENSION is None and "RNNKIT_CPU=0" in _build.REASON, _build.REASON
layer, x = rnnkit.GRU(3, 5), torch.randn(4, 2, 3)
truth = torch.nn.GRU(3, 5)
truth.load_state_dict(layer.state_dict())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [layer(x)[0] for _ in range(3)]
torch.testing.assert_close(results[-1], truth(x)[0])
(warning,) = [str(w.message) for w in caught if "rnnkit" in str(w.message)]
assert {install!r} in warning, warning
"""


@needs_installer
@pytest.mark.slow
def test_pure_python_is_installed_where_it_is_asked_for(tmp_path: Path) -> None:
    """Without torch and a compiler; the wheel is for every Python, and the package works and warns once."""
    build = run_in_copy(
        tmp_path / "sources",
        *("-c", "import sys\nsys.modules['torch'] = None\n" + RUN_SETUP, "bdist_wheel"),
        RNNKIT_CPU="0",
        CXX="/bin/false",
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "sources" / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert "rnnkit/_build.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(site)
    use = subprocess.run(
        [sys.executable, "-c", USE.format(site=str(site), install=INSTALL)],
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert use.returncode == 0, use.stderr


RUN_SETUP = """
import runpy

sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@needs_installer
@needs_linux
@pytest.mark.parametrize("command", ("bdist_wheel", "editable_wheel", "build_ext"))
def test_a_build_without_torch_ends_with_what_to_type(tmp_path: Path, command: str) -> None:
    """As in pip's isolated build; nothing else is said."""
    build = run_in_copy(
        tmp_path / "sources",
        *("-c", "import sys\nsys.modules['torch'] = None\n" + RUN_SETUP, command),
    )
    assert build.returncode != 0
    (line,) = (build.stdout + build.stderr).splitlines()
    assert line.startswith("rnnkit: ") and INSTALL in line and "RNNKIT_CPU=0" in line


@needs_installer
def test_metadata_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['torch'] = None\n" + RUN_SETUP
    run = run_in_copy(tmp_path / "sources", "-c", code, "egg_info", "sdist")
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "sources" / "dist").glob("rnnkit-*.tar.gz"))


@needs_installer
@needs_linux
def test_a_build_without_a_compiler_ends_with_what_to_type(tmp_path: Path) -> None:
    build = run_in_copy(tmp_path / "sources", "setup.py", "bdist_wheel", CXX="/nonesuch/c++")
    assert build.returncode != 0
    lines = [line for line in build.stderr.splitlines() if "Warning" not in line]
    assert lines[-1].startswith("rnnkit: no C++ compiler (/nonesuch/c++")
    assert "install g++" in lines[-1] and "RNNKIT_CPU=0" in lines[-1]
    assert "Traceback" not in build.stderr


@needs_installer
@needs_linux
@pytest.mark.parametrize(
    "does, said",
    (
        ("kill -9 $$", "MAX_JOBS=1"),
        ("echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1", "MAX_JOBS=1"),
        ("echo 'a.h:3:1: error: too old'; exit 1", "a.h:3:1: error: too old: install g++ 11"),
    ),
)
def test_a_compiler_that_fails_ends_the_build(tmp_path: Path, does: str, said: str) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "a compiler 1.0" && exit\n{does}\n'
    )
    compiler.chmod(0o755)
    build = run_in_copy(
        tmp_path / "sources", "setup.py", "--quiet", "build_ext", CXX=str(compiler), MAX_JOBS="2"
    )
    assert build.returncode != 0
    last = build.stderr.splitlines()[-1]
    assert last.startswith("rnnkit: csrc/cpu/") and said in last
    assert "Traceback" not in build.stderr


def test_what_an_extension_for_another_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_noted", lambda what: "2.9.1")
    extension, reason = backends._load("rnnkit._C")
    assert extension is None
    assert "built with torch 2.9.1" in reason and INSTALL in reason


def test_what_an_extension_that_is_absent_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_noted", lambda what: "")
    assert INSTALL in backends._load("rnnkit._absent")[1]


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA toolkit whose nvcc tells its version and architectures and then fails to compile."""
    root = tmp_path / "toolkit"
    for folder in ("bin", "include"):
        (root / folder).mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '--version) echo "Cuda compilation tools, release 12.9, V12.9.86" ;;\n'
        "--list-gpu-arch) printf 'compute_%s\\n' 75 80 90 ;;\n"
        '*) echo "cell.cu(1): error: not with $*"; exit 2 ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    return root


BUILD = """
import runpy
import sys

import torch

torch.version.cuda = {cuda!r}
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def build_with(
    toolkit: Path, cuda: str | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Builds a copy of the sources, beside a torch that has `cuda`."""
    return run_in_copy(
        toolkit.with_name("sources"),
        *("-c", BUILD.format(cuda=cuda)),
        **{"RNNKIT_CPU": "0", "CXX": "echo", "CUDA_HOME": str(toolkit), **environment},
    )


def noted(toolkit: Path) -> str:
    note: dict[str, str] = {}
    exec((toolkit.with_name("sources") / "rnnkit" / "_build.py").read_text(), note)
    return note["CUDA_REASON"]


@needs_installer
@pytest.mark.parametrize(
    "cuda, switch, reason",
    (
        ("12.9", "", "cell.cu(1): error: not with "),
        ("12.9", "0", "RNNKIT_CUDA=0"),
        (None, "", "has no CUDA"),
    ),
)
def test_a_cuda_library_that_is_not_built_is_done_without(
    toolkit: Path, cuda: str | None, switch: str, reason: str
) -> None:
    build = build_with(toolkit, cuda, RNNKIT_CUDA=switch)
    assert build.returncode == 0, build.stderr
    assert reason in noted(toolkit)


@needs_installer
def test_a_required_cuda_library_that_cannot_be_built_fails(toolkit: Path) -> None:
    """Torch is not asked whether it has CUDA."""
    build = build_with(toolkit, None, RNNKIT_CUDA="1")
    assert build.returncode != 0
    assert "cell.cu(1): error: not with " in build.stderr


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module build_cuda, which is beside setup.py and not installed."""
    monkeypatch.syspath_prepend(ROOT)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("build_cuda")


@pytest.mark.parametrize(
    "asked, expected",
    (
        ("", ("8.0", "9.0+PTX")),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("5.2 7.5 8.0 9.0a", ("8.0", "9.0a")),
    ),
)
def test_gpu_architectures(
    builder: ModuleType,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    expected: tuple[str, ...],
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert builder.architectures(str(toolkit / "bin" / "nvcc"), inplace=False) == expected


@pytest.mark.parametrize("asked", ("Hopper", "9", "7.5"))
def test_gpu_architectures_that_cannot_be(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(RuntimeError, match=asked):
        builder.architectures("nvcc", inplace=False)


def test_gpus_in_sight_are_built_for_in_place(
    builder: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, capabilities = str(toolkit / "bin" / "nvcc"), [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    assert builder.architectures(nvcc, inplace=True) == ("8.0", "9.0")
    assert builder.architectures(nvcc, inplace=False) == ("8.0", "9.0+PTX")
    capabilities[0] = (12, 0)  # newer than this nvcc
    assert builder.architectures(nvcc, inplace=True) == ("8.0", "9.0+PTX")


def test_cuda_toolkit(builder: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc may be a link to the toolkit's; a variable that points nowhere is an error."""
    links = toolkit.with_name("links")
    links.mkdir()
    (links / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(links))
    assert builder.toolkit() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(links))
    with pytest.raises(RuntimeError, match="CUDA_HOME"):
        builder.toolkit()


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module build_objects, which is beside setup.py and not installed."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    return pytest.importorskip("build_objects")


@needs_linux
def test_only_what_changed_is_compiled(objects: ModuleType, tmp_path: Path) -> None:
    source, header, target = (tmp_path / name for name in ("a b.cpp", "a.h", "a.o"))
    header.touch()
    source.touch()
    log = tmp_path / "log"
    compiler = (
        tmp_path / "compiler"
    )  # CC -MD -MF LIST -c SOURCE -o OBJECT, as objects.compile calls it
    escaped = str(source).replace(" ", "\\ ")
    compiler.write_text(
        f"#!/bin/sh\necho run >> '{log}'\nshift $(($# - 6))\n"
        f"printf '%s\\n' 'a.o : {escaped} \\' ' {header}' > \"$2\"\ntouch \"$6\"\n"
    )
    compiler.chmod(0o755)

    def compiled(part: Any) -> bool:
        log.write_text("")
        assert objects.compile_all([part]) == [str(target)]
        return log.read_text() != ""

    os.utime(source, (1e9, 1e9))
    os.utime(header, (1e9, 1e9))
    part = objects.Part([str(compiler), "-O3"], source, target, "1.0")
    assert [compiled(part), compiled(part)] == [True, False]
    assert compiled(part._replace(command=[str(compiler), "-O2"]))
    assert compiled(part._replace(compiler="2.0"))
    assert [compiled(part), compiled(part)] == [True, False]
    os.utime(header, (3e9, 3e9))
    assert compiled(part)
    header.unlink()
    assert compiled(part)


@pytest.mark.parametrize(
    "limits, expected",
    (
        ({}, 7),
        ({"sys/fs/cgroup/memory.max": "max"}, 7),
        ({"sys/fs/cgroup/memory.max": 5, "sys/fs/cgroup/memory.stat": 1}, 4),
        ({"sys/fs/cgroup/box/pip/memory.max": 3, "sys/fs/cgroup/box/pip/memory.stat": 0}, 3),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 6,
                "sys/fs/cgroup/memory/memory.stat": 4,
            },
            2,
        ),
    ),
)
def test_free_memory(
    objects: ModuleType, tmp_path: Path, limits: dict[str, int | str], expected: int
) -> None:
    """In GiB: of a machine, a container, a nested group, and of a container with the first kind of groups."""
    gib = 2**30
    files = {
        "proc/meminfo": f"MemFree: 5 kB\nMemAvailable: {7 * gib // 1024} kB\n",
        "proc/self/cgroup": "4:cpu,memory:/far/away\n0::/box/pip\n",
    }
    for name, value in limits.items():
        size = value * gib if isinstance(value, int) else value
        is_stat = name.endswith("memory.stat")
        files[name] = f"anon {size}\ntotal_rss {size}\nfile 99\n" if is_stat else f"{size}\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert objects.free_memory(tmp_path) == expected * gib


def test_jobs(objects: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for free, expected in ((None, cores), (2**29, 1), (2 * 2**30 - 1, 1), (2**40, cores)):
        monkeypatch.setattr(objects, "free_memory", lambda free=free: free)
        assert objects.jobs() == expected
    monkeypatch.setenv("MAX_JOBS", "5")
    assert objects.jobs() == 5
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(RuntimeError, match="MAX_JOBS to be a number, got 'many'"):
        objects.jobs()


@needs_linux
def test_all_sources_share_one_pool(
    objects: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several that fail or not, no more run at once than there are to be."""
    monkeypatch.setenv("MAX_JOBS", "1")
    running, most = [], []

    def compile(part: Any) -> None:
        running.append(part)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(part)

    monkeypatch.setattr(objects, "compile", compile)
    parts = [objects.Part([], Path(), tmp_path / f"{i}.o", "") for i in range(4)]
    assert objects.compile_all(parts) == [str(part.target) for part in parts]
    assert max(most) == 1
