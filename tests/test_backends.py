"""`rnnkit.backend` and the choice of backend for a device."""

import os
import subprocess
import sys
import textwrap
import threading
import warnings

import interpreter
import pytest
import torch
from kernel_cases import Case, call

import rnnkit
from rnnkit import autograd, backends
from rnnkit.call import LayerCall
from rnnkit.specs import CELLS

CPU = torch.device("cpu")

needs_cpp = pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)


def python(code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh interpreter, where warnings are still to be given."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("name", [b for b in backends.BACKENDS if not backends.unavailable(b)])
def test_forces_a_backend_in_its_block(name: str) -> None:
    before = backends.serving(CPU)
    with rnnkit.backend(name):
        assert backends.serving(CPU) == name
    assert backends.serving(CPU) == before


@needs_cpp
def test_default_is_the_extension(device: str) -> None:
    assert backends.serving(torch.device(device)) == "cpp"


@pytest.fixture
def with_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the C++ extension were there."""
    monkeypatch.setattr(backends, "EXTENSION", backends.EXTENSION or object())
    monkeypatch.setattr(backends, "EXTENSION_REASON", "")


def test_nesting(with_cpp: None) -> None:
    before = backends.serving(CPU)
    with rnnkit.backend("reference"):
        with rnnkit.backend("cpp"):
            assert backends.serving(CPU) == "cpp"
            with rnnkit.backend("reference"):
                assert backends.serving(CPU) == "reference"
            assert backends.serving(CPU) == "cpp"
        assert backends.serving(CPU) == "reference"
    assert backends.serving(CPU) == before


def test_is_undone_by_an_exception() -> None:
    before = backends.serving(CPU)
    with pytest.raises(KeyError), rnnkit.backend("reference"):
        raise KeyError
    assert backends.serving(CPU) == before


def test_as_a_decorator() -> None:
    @rnnkit.backend("reference")
    def inside() -> str:
        return backends.serving(CPU)

    before = backends.serving(CPU)
    assert (inside(), inside()) == ("reference", "reference")
    assert backends.serving(CPU) == before


def test_each_thread_has_its_own(with_cpp: None) -> None:
    found = {}
    both_inside = threading.Barrier(2, timeout=60)

    def inside(name: str) -> None:
        with rnnkit.backend(name):
            both_inside.wait()
            found[name] = backends.serving(CPU)
            both_inside.wait()
        found[f"after {name}"] = backends.serving(CPU)

    before = backends.serving(CPU)
    threads = [threading.Thread(target=inside, args=(name,)) for name in ("cpp", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {
        "cpp": "cpp",
        "reference": "reference",
        "after cpp": before,
        "after reference": before,
    }
    assert backends.serving(CPU) == before


@pytest.mark.parametrize("name", ("cuda", "CPP", "", None, 1))
def test_unknown_name(name: object) -> None:
    before = backends.serving(CPU)
    with pytest.raises(ValueError, match="expected backend to be one of "):
        rnnkit.backend(name).__enter__()  # type: ignore[arg-type]
    assert backends.serving(CPU) == before


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "EXTENSION_REASON", "no compiler was found")
    monkeypatch.setattr(backends, "CUDA_REASON", "no nvcc was found")
    before = backends.serving(CPU)
    with (
        pytest.raises(RuntimeError, match="'cpp' is not available: no compiler was found"),
        rnnkit.backend("cpp"),
    ):
        pytest.fail("the block was entered")
    assert backends.serving(CPU) == before


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without kernels runs on the reference; a shape alone needs no kernel."""
    monkeypatch.setattr(backends, "CUDA_REASON", "no nvcc was found")
    monkeypatch.setattr(backends, "TRITON_REASON", "triton is not installed: pip install triton")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(
        UserWarning,
        match=r"the CUDA extension was not loaded \(no nvcc was found\), nor are there Triton kernels "
        r"\(triton is not installed: pip install triton\)",
    ):
        assert backends.serving(torch.device("cuda")) == "reference"
    output, h_n = rnnkit.GRU(3, 4, device="meta")(torch.empty(2, 5, 3, device="meta"))
    assert (output.shape, h_n.shape) == ((2, 5, 4), (1, 5, 4))
    assert output.is_meta
    assert h_n.is_meta


@needs_cpp
@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("cell", CELLS)
def test_backends_agree(device: str, cell: str, directions: int) -> None:
    it = call(Case(cell, (4, 3, 5, 20), directions, dtype=torch.float64, device=device))
    found = []
    for name in ("cpp", "reference"):
        given = [None if t is None else t.clone().requires_grad_() for t in it.tensors]
        tensors = [t for t in given if t is not None]
        with rnnkit.backend(name):
            outputs, finals = autograd.run(it.with_tensors(given))
        # The backward pass belongs to the backend of the forward pass, wherever it is called.
        grads = torch.autograd.grad([*outputs, *finals], tensors, it.grads)
        found.append([*outputs, *finals, *grads])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@needs_cpp
@pytest.mark.parametrize("name", ("cpp", "reference"))
def test_forward_uses_the_backend_s_code(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers and cells reach the reference when it is forced, and not otherwise."""
    reached = []

    def run(call: LayerCall) -> object:
        reached.append(call.cell)
        return original(call)

    original = autograd.reference.run
    monkeypatch.setattr(autograd.reference, "run", run)
    with rnnkit.backend(name):
        rnnkit.GRU(3, 4, device=device)(torch.randn(2, 5, 3, device=device))
        rnnkit.LSTMCell(3, 4, device=device)(torch.randn(5, 3, device=device))
    assert reached == (["gru", "lstm"] if name == "reference" else [])


@pytest.mark.parametrize("forced", (False, True))
def test_one_warning_when_the_extension_is_absent(forced: bool) -> None:
    """It says why and what to do, once, and only to who did not ask for the reference."""
    run = python(f"""
        import sys

        sys.modules["rnnkit._C"] = None  # import raises ModuleNotFoundError
        import torch
        from contextlib import nullcontext
        import rnnkit

        rnnkit.backends.CUDA_REASON = "not built"
        with rnnkit.backend("reference") if {forced} else nullcontext():
            for _ in range(3):
                rnnkit.GRU(3, 4)(torch.randn(2, 5, 3))
                rnnkit.LSTMCell(3, 4)(torch.randn(5, 3))
        try:
            with rnnkit.backend("cpp"):
                pass
        except RuntimeError as error:
            print(error)
    """)
    warnings = [line for line in run.stderr.splitlines() if "rnnkit runs on its plain" in line]
    assert len(warnings) == (0 if forced else 1), run.stderr
    assert all("python -m rnnkit info" in line for line in warnings)
    assert run.stdout.startswith("backend 'cpp' is not available: ")
    assert run.stdout.strip() != "backend 'cpp' is not available:"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("ImportError('undefined symbol: _ZN2at4x')", "ImportError: undefined symbol: _ZN2at4x"),
        ("OSError('file too short')", "OSError: file too short"),
        (
            "ModuleNotFoundError('No module named numpy', name='numpy')",
            "ModuleNotFoundError: No module named numpy",
        ),
    ],
)
def test_reason_when_the_extension_does_not_load(raised: str, reason: str) -> None:
    run = python(f"""
        import importlib.abc
        import sys

        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "rnnkit._C":
                    raise {raised}

        sys.meta_path.insert(0, Broken())
        from rnnkit import backends

        print(backends.EXTENSION_REASON)
    """)
    assert run.stdout.strip() == reason


def test_importing_warns_of_nothing() -> None:
    assert python("import rnnkit").stderr == ""


def test_forced_kernels_are_not_exchanged_for_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "EXTENSION_REASON", "")
    monkeypatch.setattr(backends, "CUDA_REASON", "no nvcc was found")
    refused = pytest.raises(RuntimeError, match=r"no kernels for cuda \(no nvcc was found\)")
    with rnnkit.backend("cpp"), refused:
        backends.serving(torch.device("cuda"))


@needs_cpp
def test_the_backward_pass_is_forced_as_the_forward_pass_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whichever thread autograd runs it, and in that thread nothing stays forced."""
    seen = []
    inner = autograd.backends.forcing
    monkeypatch.setattr(autograd.backends, "forcing", lambda name: seen.append(name) or inner(name))
    with rnnkit.backend("cpp"):
        seen.clear()
        unbatched = torch.ones(2, 3)  # which the fast path leaves to Python
        output = rnnkit.GRU(3, 4)(unbatched)[0]

    def backward() -> None:
        output.sum().backward()
        seen.append(backends.forced_backend())

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert seen == ["cpp", None]


CUDA = torch.device("cuda")


@pytest.fixture
def gpu_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, a CUDA extension and Triton."""
    monkeypatch.setattr(backends, "CUDA_REASON", "")
    monkeypatch.setattr(backends, "TRITON_REASON", "")
    monkeypatch.setattr(backends, "_unusable", lambda _: "")
    monkeypatch.setattr(backends, "_too_old", lambda _: "")


@pytest.mark.usefixtures("gpu_of_any_kind")
def test_who_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA extension; without it, or without its kernels for this GPU, Triton; the reference without both."""
    assert (backends.serving(CUDA), backends.provider()) == ("cpp", "cpp")
    with rnnkit.backend("triton"):
        assert backends.serving(CUDA) == "triton"
    monkeypatch.setattr(backends, "_unusable", lambda _: "they were not built for this GPU's")
    assert backends.serving(CUDA) == "triton"
    monkeypatch.setattr(backends, "CUDA_REASON", "it was built with RNNKIT_CUDA=0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (backends.serving(CUDA), backends.provider()) == ("triton", "triton")
    monkeypatch.setattr(backends, "TRITON_REASON", "triton is not installed: pip install triton")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="pip install triton"):
        assert (backends.serving(CUDA), backends.provider()) == ("reference", "reference")
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        assert backends.serving(CUDA) == "reference"


@pytest.mark.usefixtures("gpu_of_any_kind")
def test_triton_has_no_kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    refused = pytest.raises(RuntimeError, match="'triton' has no kernels for cpu")
    with rnnkit.backend("triton"), refused:
        rnnkit.GRU(3, 4)(torch.ones(2, 1, 3))


def test_triton_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_REASON", "triton is not installed: pip install triton")
    refused = pytest.raises(RuntimeError, match="'triton' is not available: triton is not inst")
    with refused, rnnkit.backend("triton"):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("version", "cuda", "reason"),
    [
        ("3.9.0", "13.0", ""),
        ("3.6.0+git1", "13.0", ""),
        ("3.7+git", "13.0", ""),
        ("unknown", "13.0", ""),
        ("3.5.1", "13.0", "needs triton 3.6 or later, this is 3.5.1"),
        (None, "13.0", "triton is not installed: pip install triton"),
        ("3.9.0", None, "this torch is built without CUDA and ROCm"),
    ],
)
def test_why_there_is_no_triton(
    monkeypatch: pytest.MonkeyPatch, version: str | None, cuda: str | None, reason: str
) -> None:
    def of(name: str) -> str:
        if version is None or name != "triton":
            raise backends.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(backends.importlib.metadata, "version", of)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "TRITON_INTERPRETED", False)
    assert backends._find_triton() == reason


@pytest.mark.skipif(interpreter.why_not() != "", reason=interpreter.why_not())
@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"])
def test_triton_s_interpreter_serves_the_cpu_where_it_is_asked_to(name: str) -> None:
    module = getattr(rnnkit, name)(3, 4)
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    found = []
    for backend in ("triton", "reference"):
        with rnnkit.backend(backend):
            result = module(x)
            result = result[0] if isinstance(result, tuple) else result
            found.append([result, *torch.autograd.grad(result.sum(), list(module.parameters()))])
            with torch.no_grad():
                torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    torch.testing.assert_close(*found)


def test_importing_rnnkit_imports_no_triton() -> None:
    run = python("import sys, rnnkit; print(sorted({'triton', 'rnnkit.cuda'} & set(sys.modules)))")
    assert run.stdout.strip() == "[]"
