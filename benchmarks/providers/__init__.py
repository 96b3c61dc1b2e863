"""Who computes: a class for each library, found by name, imported only in the process that runs it.

A provider prepares a case once and gives back a call that is timed. A library's absence is an ImportError.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.cases import Case

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Unsupported(Exception):
    """The provider has no way to compute the case; the message says what is missing."""


class Computation(NamedTuple):
    """A prepared case.

    call: what is timed; it returns when the results are there, but on a GPU, where `Provider.synchronize` waits.
    results: what `call` returned as arrays, named as in `truth.py`.
    around: what users put around their loop of calls.
    """

    call: Callable[[], Any]
    results: Callable[[Any], Arrays]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def once(self) -> Arrays:
        with self.around():
            return self.results(self.call())


class Provider(Protocol):
    """A library, on `threads` threads or on the GPU."""

    def __init__(self, name: str, threads: int, device: str) -> None: ...

    def versions(self) -> dict[str, str]: ...

    def prepare(self, case: Case, arrays: Arrays) -> Computation:
        """Raises Unsupported."""

    def synchronize(self) -> None: ...


_CLASSES = {
    "rnnkit": ("torch_layers", "TorchLayers"),
    "torch": ("torch_layers", "TorchLayers"),
    "jax": ("jax_scan", "JaxScan"),
    "onnxruntime": ("onnx_engines", "OnnxRuntime"),
    "openvino": ("onnx_engines", "OpenVino"),
}


def load(name: str, threads: int, device: str) -> Provider:
    """The provider `name`.

    Raises:
        ImportError: its library is not installed.
        Unsupported: it does not run on `device`.
    """
    module, kind = _CLASSES[name]
    provider = getattr(importlib.import_module(f"benchmarks.providers.{module}"), kind)
    loaded: Provider = provider(name, threads, device)
    return loaded
