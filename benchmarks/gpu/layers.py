"""Who is timed on a GPU: torch.nn's and rnnkit's layers, each within what chooses the kernels that they run on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

import rnnkit
from benchmarks.cases import Case
from benchmarks.gpu.grid import LOOP, TRITON
from benchmarks.providers import Computation
from benchmarks.providers.torch_layers import Tensors, TorchLayers, computation
from rnnkit import backends


@contextmanager
def without_cudnn() -> Iterator[None]:
    """torch.nn on ATen's own products and cells, step by step.

    torch's own context for this sets the TF32 switches, too, which are not to be touched.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


#: What chooses the kernels of a provider; the others run on what is there.
CHOOSING: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    LOOP: without_cudnn,
    TRITON: lambda: rnnkit.backend("triton"),
}


def without_triton(device: torch.device) -> str:
    """Why rnnkit's Triton kernels do not run on `device`; empty if they do."""
    try:
        with CHOOSING[TRITON]():
            backends.serving(device)
    except RuntimeError as error:
        return str(error)
    return ""


class Layers(TorchLayers):
    """A provider by its name in `grid.PROVIDERS`: the package, in brackets what it is to run on."""

    def __init__(self, name: str, threads: int, device: str) -> None:
        super().__init__(name.partition("[")[0], threads, device)
        self.choosing = CHOOSING.get(name, nullcontext)

    def computation(self, case: Case, module: nn.Module, tensors: Tensors) -> Computation:
        """A call of `module`, within what chooses its kernels."""
        made = computation(case, module, tensors)

        @contextmanager
        def around() -> Iterator[None]:
            with self.choosing(), made.around():
                yield

        return made._replace(around=around)
