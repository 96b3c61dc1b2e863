"""Which backend serves a device. Loads the extensions, and keeps the reason for each that did not load.

An extension registers kernels under its device's dispatch key; without it, the ops run on the reference. `backend`
forces a choice.
"""

import importlib
import importlib.metadata
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

#: Backend names, in order of preference.
BACKENDS = ("cpp", "triton", "reference")

#: The oldest version of Triton that compiles the kernels.
TRITON_VERSION = (3, 6)

#: What to type if the extension is absent or built for another torch; to install from git, git+URL replaces the dot.
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."

_forced = threading.local()
_warned: set[str] = set()


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module `name`, or None and the reason."""
    built_with, running = _noted("TORCH_VERSION"), torch.__version__
    if built_with and built_with.split(".")[:2] != running.split(".")[:2]:
        return None, f"built with torch {built_with}, and this is {running}: `{INSTALL}`"
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"{type(error).__name__}: {error}"
        if Path(__file__).parents[1].joinpath("setup.py").exists() and not _noted("TORCH_VERSION"):
            return None, (
                "Python imported the sources, which are not built in place: run it in another folder to import what is "
                f"installed, or `{INSTALL}`"
            )
        return None, _noted("REASON") or f"not built: `{INSTALL}`"
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def _noted(what: str) -> str:
    """A constant of rnnkit/_build.py, which setup.py writes; empty if there is no such file."""
    try:
        return str(getattr(importlib.import_module("rnnkit._build"), what))
    except ModuleNotFoundError:
        return ""


def _load_cuda() -> str:
    """Loads the CUDA extension, whose ops `rnnkit.cuda` calls. Returns why it cannot, or an empty string."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return _noted("CUDA_REASON") or "not built"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


#: Whether Triton's interpreter runs the Triton kernels on CPU tensors, which is slow: for tests and debuggers.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton() -> str:
    """Why Triton cannot run the kernels, or an empty string. The kernels are imported at their first use."""
    if torch.version.cuda is None and torch.version.hip is None and not TRITON_INTERPRETED:
        return "this torch is built without CUDA and ROCm"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) >= TRITON_VERSION:
            return ""
        return f"needs triton {'.'.join(map(str, TRITON_VERSION))} or later, this is {version}"
    return "triton is not installed: pip install triton"


EXTENSION, EXTENSION_REASON = _load("rnnkit._C")

#: Why there are no CUDA kernels; empty if there are.
CUDA_REASON = _load_cuda()

#: Why there are no Triton kernels; empty if there are.
TRITON_REASON = _find_triton()


def unavailable(name: str) -> str:
    """Why backend `name` cannot be used on any device here; empty if it can."""
    reasons = []
    for device in ("cpu", "cuda"):  # a GPU is asked last: not every process may do that
        why_not = _WHY_NOT.get((name, device))
        reason = "" if why_not is None else why_not(None)
        if not reason:
            return ""
        reasons.append(reason)
    return reasons[1 if name == "triton" else 0]


def serving(device: torch.device) -> str:
    """The backend that runs calls on `device` now. Warns once if that is the reference for lack of kernels.

    Raises:
        RuntimeError: the backend that is forced has no kernels for `device`.
    """
    forced = forced_backend()
    if forced is not None:
        if reason := _no_kernels(forced, device):
            raise RuntimeError(f"backend {forced!r} has no kernels for {device.type}{reason}")
        return forced
    found = _best(device)
    if (
        found == "reference"
        and device.type in _EXTENSIONS
        and not torch.compiler.is_compiling()
        and device.type not in _warned
    ):
        _warned.add(device.type)
        no_cpp, no_triton = (_no_kernels(name, device) for name in ("cpp", "triton"))
        nor = f", nor are there Triton kernels{no_triton}" if device.type == "cuda" else ""
        warn(
            f"rnnkit runs on its plain PyTorch reference: the {_EXTENSIONS[device.type]} extension was not loaded"
            f"{no_cpp}{nor}. `python -m rnnkit info` tells more."
        )
    return found


def warn(message: str) -> None:
    """Warns at the user's line: the innermost frame that is in neither rnnkit nor torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in ("rnnkit", "torch", "typing_extensions"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


_EXTENSIONS = {"cpu": "C++", "cuda": "CUDA"}


def _best(device: torch.device) -> str:
    # On the CPU, Triton's interpreter has to be asked for: it is slow.
    names = [name for name in BACKENDS if (name, device.type) != ("triton", "cpu")]
    return next(name for name in names if not _no_kernels(name, device))


def provider() -> str:
    """The backend for CUDA tensors on this machine's GPU, or, without a GPU, on those that rnnkit was built for."""
    if torch.cuda.is_available():
        return _best(torch.device("cuda", torch.cuda.current_device()))
    return "reference" if CUDA_REASON and TRITON_REASON else "triton" if CUDA_REASON else "cpp"


def _architectures() -> list[tuple[tuple[int, int], bool]]:
    """The compute capabilities that the CUDA extension was built for, each with whether as PTX; empty if unknown."""
    try:
        noted = importlib.import_module("rnnkit._build").CUDA_ARCHITECTURES
    except (ModuleNotFoundError, AttributeError):
        return []
    found = []
    for name in noted:
        digits = "".join(c for c in name.partition("+")[0] if c.isdigit())
        found.append(((int(digits[:-1]), int(digits[-1])), "PTX" in name or "compute" in name))
    return found


def newest_architecture() -> tuple[int, int]:
    """The newest compute capability that the CUDA extension was built for; (99, 0) if unknown."""
    return max((capability for capability, _ in _architectures()), default=(99, 0))


@lru_cache
def _too_old(index: int | None) -> str:
    """Why neither CUDA nor Triton kernels can run on GPU `index`; empty if they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    has = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and has < (8, 0):
        return f"they need compute capability 8.0, this GPU has {has[0]}.{has[1]}"
    return ""


@lru_cache
def _unusable(index: int | None) -> str:
    """Why the CUDA kernels do not run on GPU `index`; empty if they do."""
    if reason := _too_old(index):
        return reason
    has = torch.cuda.get_device_capability(index)
    built = _architectures()
    # A binary runs on later GPUs of its generation, PTX on all later ones.
    if built and not any(c <= has and (ptx or c[0] == has[0]) for c, ptx in built):
        return f"they were not built for this GPU's compute capability {has[0]}.{has[1]}"
    return ""


def _on_interpreter(index: int | None) -> str:
    if TRITON_INTERPRETED:
        return TRITON_REASON
    return "only with TRITON_INTERPRET=1"


#: By backend and device type, a function of the device's index that tells why the kernels do not run there; it returns
#: an empty string if they do.
_WHY_NOT: dict[tuple[str, str], Callable[[int | None], str]] = {
    ("cpp", "cpu"): lambda index: EXTENSION_REASON,
    ("cpp", "cuda"): lambda index: CUDA_REASON or _unusable(index),
    ("triton", "cpu"): _on_interpreter,
    ("triton", "cuda"): lambda index: TRITON_REASON or _too_old(index),
}


def _no_kernels(name: str, device: torch.device) -> str:
    """Why backend `name` cannot serve `device`, in parentheses; empty if it can."""
    if name == "reference" or device.type == "meta":
        return ""
    why_not = _WHY_NOT.get((name, device.type))
    reason = "there are none" if why_not is None else why_not(device.index)
    return f" ({reason})" if reason else ""


def has_kernels(name: str, device: torch.device) -> bool:
    """Whether backend `name` can serve the device."""
    return not _no_kernels(name, device)


def fast_path(name: str) -> Callable[..., Any] | None:
    """The C++ function `name` that runs a whole call, see csrc/cpu/direct.cpp; None if it must not be used now."""
    if EXTENSION is None or forced_backend() in ("reference", "triton"):
        return None
    return None if torch.compiler.is_compiling() else getattr(EXTENSION, name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every rnnkit layer and cell called in this block, on this thread, on backend `name`.

    Args:
        name: `"cpp"`, the C++ and CUDA kernels; `"triton"`, kernels that Triton compiles for a GPU at their first
            use; or `"reference"`, plain PyTorch.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend is not available here; or, raised by a call in the block, it has no kernels for the
            input's device. The message says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}, got {name!r}")
    if unavailable(name):
        raise RuntimeError(f"backend {name!r} is not available: {unavailable(name)}")
    with forcing(name):
        yield


def forced_backend() -> str | None:
    """The backend that is forced on this thread; None if none is."""
    return getattr(_forced, "name", None)


@contextmanager
def forcing(name: str | None) -> Iterator[None]:
    """Forces a backend in this block, or none; unlike `backend`, checks nothing."""
    previous = forced_backend()
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous
