"""Which implementation serves a device: loads the extensions, keeps the reason for each that is absent.

Extensions register kernels under their device's dispatch key; without one the op's composite reference
runs. `backend` forces a choice.
"""

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


EXTENSION, EXTENSION_REASON = _load("rnnkit._C")


def unavailable(name: str) -> str:
    """Why backend `name` cannot be used here; empty when it can."""
    return EXTENSION_REASON if name == "cpp" else ""


def serving(device: torch.device) -> str:
    """The backend that runs tensors on `device` now.

    Raises:
        RuntimeError: a backend is forced that has no kernels for `device`.
    """
    forced: str | None = getattr(_forced, "name", None)
    if forced is not None:
        if forced == "cpp" and device.type not in ("cpu", "meta"):
            raise RuntimeError(f"backend 'cpp' has no kernels for {device.type}")
        return forced
    if device.type == "meta":
        return "cpp"
    if device.type != "cpu":
        return "reference"
    if EXTENSION is None and not torch.compiler.is_compiling() and device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"rnnkit runs on its plain PyTorch reference: the C++ extension was not loaded ({EXTENSION_REASON}). "
            "`python -m rnnkit info` tells more.",
            stacklevel=2,
        )
    return "reference" if EXTENSION is None else "cpp"


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
