"""torch.nn and rnnkit: the same modules by the same names, so that one class calls either."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Case
from benchmarks.providers import Arrays, Computation, Unsupported

Tensors = dict[str, Tensor]


def dtype_of(case: Case) -> torch.dtype:
    """Of its tensors; `tf32` is a way to multiply float32."""
    dtype: torch.dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
    return dtype


def computation(case: Case, module: nn.Module, tensors: Tensors) -> Computation:
    """A call of `module` on the `x`, `batch_sizes` and `grad_output` among `tensors`."""
    made: Computation = _MODES[case.mode](module, tensors)
    return made


class TorchLayers:
    """The layers of torch.nn or rnnkit."""

    def __init__(self, name: str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.package: Any = nn if name == "torch" else importlib.import_module(name)
        self.device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise Unsupported("torch sees no CUDA device")
        torch.backends.cudnn.allow_tf32 = False  # float32 is held to float32's tolerance

    def versions(self) -> dict[str, str]:
        own = {} if self.package is nn else {"rnnkit": getattr(self.package, "__version__", "?")}
        return own | {"torch": torch.__version__}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, case: Case, arrays: Arrays) -> Computation:
        tensors = {
            name: torch.from_numpy(array).to(
                self.device, dtype_of(case) if array.dtype.kind == "f" else None
            )
            for name, array in arrays.items()
        }
        module = self.module(case, tensors)
        made = computation(case, module, tensors)
        if case.feature == "gradient_flow":
            return made._replace(call=partial(self._recorded, module, made.call))
        if case.feature == "update_gate":
            return made._replace(results=lambda raw: _of_the_other_gate(made.results(raw)))
        return made

    def module(self, case: Case, tensors: Tensors) -> nn.Module:
        """The layer or cell of `case` with the weights among `tensors`."""
        options: dict[str, Any] = {"device": self.device, "dtype": dtype_of(case)}
        weights = {name: t for name, t in tensors.items() if name.startswith(("weight", "bias"))}
        if case.of_cell:
            weights = {name.removesuffix("_l0"): tensor for name, tensor in weights.items()}
            module: nn.Module = getattr(self.package, f"{case.cell}Cell")(case.I, case.H, **options)
        else:
            options |= {"num_layers": case.layers, "bidirectional": case.directions == 2}
            options |= {"proj_size": case.projection} if case.projection else {}
            options |= {"recompute": True} if case.recompute else {}
            options |= {"grad_clip": 1e6} if case.feature == "grad_clip" else {}
            module = self._layer(case, options)
        module.load_state_dict(weights)
        if case.feature == "update_gate":
            module.convert_update_gate("writes")
        module.train(case.records)
        if case.frozen:
            self._freeze(module)
        if case.compiled:
            module.compile(fullgraph=True)
        return module

    def _freeze(self, module: nn.Module) -> None:
        if not hasattr(self.package, "freeze"):
            raise Unsupported("no `freeze`")
        self.package.freeze(module)

    def _recorded(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        with self.package.gradient_flow(module):
            return call()

    def _layer(self, case: Case, options: dict[str, Any]) -> nn.Module:
        try:
            layer: nn.Module = getattr(self.package, case.cell)(case.I, case.H, **options)
        except TypeError as error:
            if case.recompute:
                raise Unsupported("no option `recompute`") from error
            raise
        return layer


def _inference(layer: nn.Module, tensors: Tensors) -> Computation:
    x = input_of(tensors)
    return Computation(lambda: layer(x), lambda raw: _arrays(_named(*raw)), torch.inference_mode)


def _training(layer: nn.Module, tensors: Tensors) -> Computation:
    x, grad_output = tensors["x"].requires_grad_(), tensors["grad_output"]
    given = input_of(tensors)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call() -> Any:
        output, states = layer(given)
        data = output.data if isinstance(output, PackedSequence) else output
        return output, states, torch.autograd.grad(data, (x, *parameters), grad_output)

    def results(raw: Any) -> Arrays:
        gradients = dict(zip([f"grad_{name}" for name in ("x", *names)], raw[2], strict=True))
        return _arrays(_named(*raw[:2]) | gradients)

    return Computation(call, results)


def _streaming(layer: nn.Module, tensors: Tensors) -> Computation:
    x, states = tensors["x"], None

    def call() -> Any:
        nonlocal states
        output, states = layer(x, states)
        return output, states

    return Computation(call, lambda raw: _arrays(_named(*raw)), torch.inference_mode)


def _recording(layer: nn.Module, tensors: Tensors) -> Computation:
    tensors["x"].requires_grad_()
    x = input_of(tensors)
    return Computation(lambda: layer(x), lambda raw: _arrays(_named(*raw)))


def _cell(cell: nn.Module, tensors: Tensors) -> Computation:
    x, states = tensors["x"][0], None

    def call() -> Any:
        nonlocal states
        states = cell(x, states)
        return states

    return Computation(call, lambda raw: _arrays(_named_of_cell(raw)), torch.inference_mode)


def _cell_recording(cell: nn.Module, tensors: Tensors) -> Computation:
    x = tensors["x"][0].requires_grad_()
    return Computation(lambda: cell(x), lambda raw: _arrays(_named_of_cell(raw)))


def _cell_training(cell: nn.Module, tensors: Tensors) -> Computation:
    x, grad_output = tensors["x"][0].requires_grad_(), tensors["grad_output"][0]
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def call() -> Any:
        states = cell(x)
        h = states[0] if isinstance(states, tuple) else states
        return states, torch.autograd.grad(h, (x, *parameters), grad_output)

    def results(raw: Any) -> Arrays:
        gradients = dict(zip([f"grad_{name}" for name in ("x", *names)], raw[1], strict=True))
        return _arrays(_named_of_cell(raw[0]) | gradients)

    return Computation(call, results)


def input_of(tensors: Tensors) -> Any:
    """What the layer is called with."""
    if "batch_sizes" in tensors:
        return PackedSequence(tensors["x"], tensors["batch_sizes"].cpu())
    return tensors["x"]


def _named(output: Any, states: Any) -> Tensors:
    states = states if isinstance(states, tuple) else (states,)
    output = output.data if isinstance(output, PackedSequence) else output
    return {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}


def _named_of_cell(states: Any) -> Tensors:
    """The output of a cell is its first state."""
    return _named(states[0] if isinstance(states, tuple) else states, states)


def _arrays(results: Tensors) -> Arrays:
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy()
        for name, t in results.items()
    }


def _of_the_other_gate(results: Arrays) -> Arrays:
    """Results of a GRU with `update_gate="keeps"` from those with "writes", whose weights of z have the other sign."""
    found = dict(results)
    for name, array in results.items():
        if name.startswith(("grad_weight", "grad_bias")):
            r, z, n = np.split(array, 3)
            found[name] = np.concatenate([r, -z, n])
    return found


_MODES = {
    "inference": _inference,
    "training": _training,
    "streaming": _streaming,
    "recording": _recording,
    "cell": _cell,
    "cell recording": _cell_recording,
    "cell training": _cell_training,
}
