"""torch.nn and rnnkit: the same modules by the same names, so that one class calls either."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import LENGTHS, SPLIT, Case
from benchmarks.providers import Arrays, Computation, Unsupported

Tensors = dict[str, Tensor]

NEVER = 1e-12  # a probability with which nothing happens
#: The options of a layer that has a feature.
OPTIONS: dict[str, dict[str, Any]] = {
    "grad_clip": {"grad_clip": 1e6},
    "learn_initial_state": {"learn_initial_state": True},
    "weight_dropout": {"weight_dropout": NEVER},
    "recurrent_dropout": {"recurrent_dropout": NEVER},
    "zoneout": {"zoneout": NEVER},
}


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
        if case.resets and self.package is nn:
            module = Split(module) if case.feature == SPLIT else Loop(module)
        if case.feature == LENGTHS:
            return _padded(computation, case, module, tensors)
        made = computation(case, module, tensors)
        if case.feature == "all_states":
            module.forward = partial(module.forward, all_states=True)
        if case.feature == "gradient_flow":
            return made._replace(call=partial(self._recorded, module, made.call))
        if case.feature == "update_gate":
            return made._replace(results=lambda raw: _of_the_other_gate(made.results(raw)))
        return made

    def module(self, case: Case, tensors: Tensors) -> nn.Module:
        """The layer or cell of `case` with the weights among `tensors`."""
        options: dict[str, Any] = {"device": self.device, "dtype": dtype_of(case)}
        kinds = ("weight", "bias", "norm")
        weights = {name: t for name, t in tensors.items() if name.startswith(kinds)}
        if case.of_cell:
            weights = {name.removesuffix("_l0"): tensor for name, tensor in weights.items()}
            module: nn.Module = getattr(self.package, f"{case.cell}Cell")(case.I, case.H, **options)
        else:
            options |= {"num_layers": case.layers, "bidirectional": case.directions == 2}
            options |= {"proj_size": case.projection} if case.projection else {}
            options |= {"recompute": True} if case.recompute else {}
            options |= OPTIONS.get(case.feature, {})
            options |= {"layer_norm": True} if case.norm and self.package is not nn else {}
            module = self._layer(case, options)
            if case.norm and self.package is nn:
                module = NormLoop(module)
                weights = {w if "norm" in w else f"layer.{w}": t for w, t in weights.items()}
        module.load_state_dict(weights, strict=case.feature != "learn_initial_state")
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


class Loop(nn.Module):
    """A layer of torch.nn with resets as users have them: a loop over steps of its functions for cells."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.step = getattr(
            torch, f"{layer.mode.lower()}_cell"
        )  # what nn.LSTMCell and its like call

    def forward(self, x: Tensor, *, reset: Tensor) -> tuple[Tensor, Any]:
        keep = (~reset).to(x.dtype).unsqueeze(-1)
        h = x.new_zeros(x.size(1), self.layer.hidden_size)
        states, outputs = (h, h) if self.layer.mode == "LSTM" else h, []
        weights = [getattr(self.layer, name) for name in self.layer._all_weights[0]]
        for t, one in enumerate(x.unbind(0)):
            if isinstance(states, tuple):
                states = self.step(one, [keep[t] * state for state in states], *weights)
                outputs.append(states[0])
            else:
                states = self.step(one, keep[t] * states, *weights)
                outputs.append(states)
        last = tuple(s[None] for s in states) if isinstance(states, tuple) else states[None]
        return torch.stack(outputs), last


class NormLoop(nn.Module):
    """A layer of torch.nn with layer normalization as users have it: a loop over steps of torch's functions."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        factor = layer.bias_ih_l0.detach()
        self.norm_ih_l0, self.norm_hh_l0 = (nn.Parameter(factor.clone()) for _ in range(2))
        if layer.mode == "LSTM":
            of_c = factor[: layer.hidden_size]
            self.norm_c_l0, self.norm_c_bias_l0 = (nn.Parameter(of_c.clone()) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        layer, mode = self.layer, self.layer.mode
        size, gates = layer.hidden_size, self.norm_ih_l0.shape
        every = layer_norm(linear(x, layer.weight_ih_l0), gates, self.norm_ih_l0, layer.bias_ih_l0)
        h = c = x.new_zeros(x.size(1), size)
        outputs = []
        for of_x in every.unbind(0):
            product = linear(h, layer.weight_hh_l0)
            of_h = layer_norm(product, gates, self.norm_hh_l0, layer.bias_hh_l0)
            if mode == "LSTM":
                i, f, g, o = (of_x + of_h).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                read = layer_norm(c, (size,), self.norm_c_l0, self.norm_c_bias_l0)
                h = o.sigmoid() * read.tanh()
            elif mode == "GRU":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
                n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
                h = n + (x_z + h_z).sigmoid() * (h - n)
            else:
                h = (of_x + of_h).tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None]) if mode == "LSTM" else h[None]


class Split(nn.Module):
    """A layer of torch.nn with resets by one call: sequences are split, padded, packed, and put together again."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *, reset: Tensor) -> tuple[Tensor, Any]:
        steps, batch, _ = x.shape
        begins = reset.t().clone()  # [N, T]
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([steps * batch])])
        lengths = (ends - starts).tolist()
        pieces = x.transpose(0, 1).flatten(0, 1).split(lengths)
        packed = rnn.pack_padded_sequence(rnn.pad_sequence(pieces), lengths, enforce_sorted=False)
        output, states = self.layer(packed)
        padded, _ = rnn.pad_packed_sequence(output)
        joined = torch.cat([padded[:length, k] for k, length in enumerate(lengths)])
        last = (begins.sum(1).cumsum(0) - 1).tolist()  # each sequence's last piece
        if isinstance(states, tuple):
            return joined.view(batch, steps, -1).transpose(0, 1), tuple(s[:, last] for s in states)
        return joined.view(batch, steps, -1).transpose(0, 1), states[:, last]


def _padded(
    made: Callable[[Case, nn.Module, Tensors], Computation],
    case: Case,
    module: nn.Module,
    tensors: Tensors,
) -> Computation:
    """A call with padded sequences and `lengths`; its results are those of the PackedSequence."""
    sizes = tensors.pop("batch_sizes")

    def pad(rows: Tensor) -> Tensor:
        return rnn.pad_packed_sequence(PackedSequence(rows, sizes))[0]

    padded = {name: pad(t) if name in ("x", "grad_output") else t for name, t in tensors.items()}
    padded["lengths"] = torch.tensor(case.lengths)
    one = made(case, module, padded)
    there = torch.arange(max(case.lengths)).unsqueeze(1) < torch.tensor(case.lengths)

    def results(raw: Any) -> Arrays:
        rows = {"output", "grad_x"}
        found = one.results(raw)
        return {name: array[there] if name in rows else array for name, array in found.items()}

    return one._replace(results=results)


def _inference(layer: nn.Module, tensors: Tensors) -> Computation:
    x = input_of(tensors)
    return Computation(lambda: layer(x), lambda raw: _arrays(_named(*raw)), torch.inference_mode)


def _training(layer: nn.Module, tensors: Tensors) -> Computation:
    x, grad_output = tensors["x"].requires_grad_(), tensors["grad_output"]
    given, asked = input_of(tensors), _asked(tensors)
    named = {name.removeprefix("layer."): weight for name, weight in layer.named_parameters()}
    names, parameters = zip(*named.items(), strict=True)

    def call() -> Any:
        output, states = layer(given, **asked)[:2]
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


def _asked(tensors: Tensors) -> dict[str, Any]:
    """The keyword arguments that the layer is called with."""
    asked: dict[str, Any] = {
        name: tensors[name] for name in ("reset", "lengths") if name in tensors
    }
    return asked


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
