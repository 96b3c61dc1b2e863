"""`explain` tells which kernel a module's call runs on, and with what plan, without running it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkit import backends, gpu, plan
from rnnkit.interop import Interop
from rnnkit.layers import _Layers
from rnnkit.specs import CELLS


@dataclass(frozen=True)
class Explanation:
    """The backend, kernel and plans of a call.

    Attributes:
        backend: `"cpp"`, `"triton"` or `"reference"`, see `rnnkit.backend`.
        device: the type of the input's device.
        kernel: on a GPU, the kernel of the forward pass: `"cluster"`, `"persistent"` or `"stepwise"` in CUDA,
            `"sequence"` or `"stepwise"` in Triton. Of a `Recurrent` on the CPU: `"compiled"`, or
            `"interpreted"` where the cell cannot be compiled. Elsewhere the same as `backend`.
        forward, backward: on a GPU, the plan of each pass: units, blocks, warps or bytes, and the reason for it.
            Elsewhere None.
        reason: on a GPU that has kernels, why the reference computes a call, or Triton beside the CUDA extension; else
            empty.
    """

    backend: str
    device: str
    kernel: str
    forward: gpu.Design | None = None
    backward: gpu.Design | None = None
    reason: str = ""

    def __str__(self) -> str:
        kernel = f", {self.kernel}" * (self.forward is None and self.kernel != self.backend)
        told = f"{self.backend} on {self.device}{kernel}" + f": {self.reason}" * bool(self.reason)
        if self.forward is None:
            return told
        return f"{told}\n  forward   {self.forward}\n  backward  {self.backward}"


def explain(module: nn.Module, input: Tensor | PackedSequence) -> Explanation:
    """Tell which kernel `module(input)` would run on. All layers of a stack have the same plan.

    The cell of a `Recurrent` on the CPU is compiled if it is not yet.

    Args:
        module: an RNN, LSTM, GRU, Recurrent or cell of rnnkit.
        input: the input of the call; only its shape, dtype and device matter.

    Returns:
        The backend and, on a GPU, the plan of each pass, or why the reference computes it; `print` shows them.

    Raises:
        TypeError: `module` is no layer or cell of rnnkit.
        RuntimeError: the backend that is forced has no kernels for the input's device.
    """
    if not isinstance(module, Interop):
        raise TypeError(
            f"expected module to be a layer or cell of rnnkit, got {type(module).__name__}"
        )
    data = input.data if isinstance(input, PackedSequence) else input
    device, dtype = data.device, data.dtype
    serving = backends.serving(device)
    layer = isinstance(module, _Layers)
    if serving == "cpp" and device.type == "cpu" and module._cell not in CELLS:
        from rnnkit.graph import kernels

        return Explanation(serving, device.type, kernels.register(str(module._cell)))
    if serving == "reference" or device.type != "cuda":
        return Explanation(serving, device.type, serving)
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    cell, hidden = module._cell, module.hidden_size
    assert isinstance(cell, str) and isinstance(hidden, int)
    if isinstance(input, PackedSequence):
        batch = int(input.batch_sizes[0])
    elif data.dim() == (3 if layer else 2):
        batch = data.size(0 if not layer or module.batch_first else 1)
    else:
        batch = 1
    projected = (module.proj_size if layer else 0) or hidden
    directions = 2 if layer and module.bidirectional else 1
    assert isinstance(projected, int)
    index = torch.cuda.current_device() if device.index is None else device.index
    heads = int(getattr(module, "heads", 1))
    passes = [
        plan.Scan(
            cell,
            dtype.itemsize,
            backward,
            hidden // heads,
            projected // heads,
            batch,
            directions * heads,
            gpu.is_precise(dtype),
            isinstance(module, _Layers) and module.layer_norm,
            heads,
        )
        for backward in (False, True)
    ]
    name, run, reason = gpu.served(passes[0], device)
    if run is None:
        return Explanation(name, device.type, name, reason=reason)
    forward, back = (run.choose(scan, torch.device(device.type, index)) for scan in passes)
    return Explanation(name, device.type, forward.kernel, forward, back, reason)
