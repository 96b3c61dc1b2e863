"""Which implementation serves a device: loads the extensions, keeps the reason for each that is absent.

Extensions register kernels under their device's dispatch key; without one the op's composite reference
runs. `backend` forces a choice.
"""

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: Backend names, in order of preference.
BACKENDS = ("cpp", "reference")

_forced = threading.local()
_warned: set[str] = set()


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module `name`, or None and the reason."""
    built_with, running = _noted("TORCH_VERSION"), torch.__version__
    if built_with and built_with.split(".")[:2] != running.split(".")[:2]:
        return None, f"built with torch {built_with}, and this is {running}: install rnnkit again"
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"{type(error).__name__}: {error}"
        return None, _noted("REASON") or "not built"
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def _noted(what: str) -> str:
    """A constant that setup.py noted when it built or failed to build the extension; empty if it did not."""
    try:
        return str(getattr(importlib.import_module("rnnkit._build"), what))
    except ModuleNotFoundError:
        return ""


def _load_cuda() -> str:
    """Loads the CUDA extension, whose ops `rnnkit.gpu` calls; why there is none, or empty."""
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


EXTENSION, EXTENSION_REASON = _load("rnnkit._C")

#: Why there are no CUDA kernels; empty where there are.
CUDA_REASON = _load_cuda()


def unavailable(name: str) -> str:
    """Why backend `name` cannot be used here; empty when it can."""
    return EXTENSION_REASON if name == "cpp" and CUDA_REASON else ""


def serving(device: torch.device) -> str:
    """The backend that runs tensors on `device` now.

    Raises:
        RuntimeError: a backend is forced that has no kernels for `device`.
    """
    forced: str | None = getattr(_forced, "name", None)
    if forced is not None:
        if forced == "cpp" and (reason := _no_kernels(device)):
            raise RuntimeError(f"backend 'cpp' has no kernels for {device.type}{reason}")
        return forced
    reason = _no_kernels(device)
    if not reason:
        return "cpp"
    if (
        device.type in _EXTENSIONS
        and not torch.compiler.is_compiling()
        and device.type not in _warned
    ):
        _warned.add(device.type)
        warnings.warn(
            f"rnnkit runs on its plain PyTorch reference: the {_EXTENSIONS[device.type]} extension was not loaded"
            f"{reason}. `python -m rnnkit info` tells more.",
            stacklevel=2,
        )
    return "reference"


_EXTENSIONS = {"cpu": "C++", "cuda": "CUDA"}


@lru_cache
def _too_old(index: int | None) -> str:
    """Why the CUDA kernels do not run on GPU `index`; empty if they do."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"they need compute capability 8.0, this GPU has {major}.{minor}"


def _no_kernels(device: torch.device) -> str:
    """The reason why 'cpp' cannot serve `device`, in parentheses where there is one to tell; empty if it can."""
    if device.type == "cuda":
        reason = CUDA_REASON or _too_old(device.index)
        return f" ({reason})" if reason else ""
    if device.type == "cpu":
        return f" ({EXTENSION_REASON})" if EXTENSION is None else ""
    return "" if device.type == "meta" else " (there are none)"


def short_way(name: str) -> Callable[..., Any] | None:
    """The extension's function `name` for inference, which skips Python where it can; None: do without it."""
    if EXTENSION is None or getattr(_forced, "name", None) == "reference":
        return None
    return None if torch.compiler.is_compiling() else getattr(EXTENSION, name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every rnnkit layer and cell called in this block, on this thread, on backend `name`.

    Args:
        name: `"cpp"`, the compiled kernels, or `"reference"`, plain PyTorch.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: the backend is not available here, or, in a call, has no kernels for the input's device;
            the message says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}, got {name!r}")
    if unavailable(name):
        raise RuntimeError(f"backend {name!r} is not available: {unavailable(name)}")
    previous = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous
