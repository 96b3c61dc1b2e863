"""`python -m rnnkit info`, what the build notes of itself, and an installation without a compiler."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
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

needs_installer = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or not find_spec("pip") or not find_spec("setuptools"),
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
        "CUDA",
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
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RNNKIT_")}
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
