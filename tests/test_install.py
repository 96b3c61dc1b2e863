"""`python -m rnnkit info`, what the build notes of itself, and an installation without a compiler."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType

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
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_pool() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(pools) == 1


def run_without_compiler(
    sources: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python in a copy of the sources, so that what the checkout has built stays as it is."""
    for name in ("rnnkit", "csrc"):
        ignore = shutil.ignore_patterns("_build.py", "*.so", "__pycache__")
        shutil.copytree(ROOT / name, sources / name, ignore=ignore)
    for name in ("setup.py", "build_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    ours = ("RNNKIT_", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=sources,
        env={**inherited, "CC": "/bin/false", "CXX": "/bin/false", **environment},
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
assert backends.EXTENSION is None and "no C++ compiler" in _build.REASON, _build.REASON
layer, x = rnnkit.GRU(3, 5), torch.randn(4, 2, 3)
truth = torch.nn.GRU(3, 5)
truth.load_state_dict(layer.state_dict())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [layer(x)[0] for _ in range(3)]
torch.testing.assert_close(results[-1], truth(x)[0])
(warning,) = [str(w.message) for w in caught if "rnnkit" in str(w.message)]
assert "no C++ compiler" in warning, warning
"""


@needs_installer
@pytest.mark.slow
def test_install_without_a_compiler(tmp_path: Path) -> None:
    """It succeeds, says why it is pure Python, and the package works and warns once."""
    site = tmp_path / "site"
    install = run_without_compiler(
        tmp_path / "sources",
        *("-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--target", str(site), "."),
    )
    assert install.returncode == 0, install.stderr
    assert "pure Python" in install.stdout + install.stderr
    assert not list(site.rglob("_C.*"))
    use = subprocess.run(
        [sys.executable, "-c", USE.format(site=str(site))], cwd=site, capture_output=True, text=True
    )
    assert use.returncode == 0, use.stderr


@needs_installer
def test_a_required_extension_that_cannot_be_built_fails(tmp_path: Path) -> None:
    build = run_without_compiler(tmp_path / "sources", "setup.py", "build_ext", RNNKIT_CPU="1")
    assert build.returncode != 0
    assert "no C++ compiler" in build.stderr


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
    return run_without_compiler(
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


def test_only_what_changed_is_compiled(builder: ModuleType, tmp_path: Path) -> None:
    source, header, target = (tmp_path / name for name in ("a b.cu", "a.h", "a.o"))
    for file in (source, header, target):
        file.touch()
    assert not builder.up_to_date(target)
    escaped = str(source).replace(" ", "\\ ")
    target.with_suffix(".d").write_text(f"a.o : {escaped} \\\n {header}\n")
    os.utime(target, (2e9, 2e9))
    assert builder.up_to_date(target)
    os.utime(header, (3e9, 3e9))
    assert not builder.up_to_date(target)
    header.unlink()
    assert not builder.up_to_date(target)
