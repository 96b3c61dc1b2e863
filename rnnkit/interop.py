"""What PyTorch's other tools see of a layer or a cell: torch.fx, TorchScript, quantization, FLOPs, ATen graphs."""

import copy
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from rnnkit import backends
from rnnkit.call import LayerCall, Results
from rnnkit.ops import of_call


class _QuantizationConfig:
    """`qconfig`, which torch.ao.quantization sets on every module: warns that it will leave this one as it is."""

    def __get__(self, module: nn.Module | None, cls: type[nn.Module]) -> Any:
        if module is None or "qconfig" not in vars(module):
            raise AttributeError(f"{cls.__name__!r} object has no attribute 'qconfig'")
        return vars(module)["qconfig"]

    def __set__(self, module: nn.Module, value: Any) -> None:
        backends.warn(
            f"torch.ao.quantization goes by class and leaves rnnkit's {type(module).__name__} as it is: where it is to "
            "be quantized, call rnnkit.revert(model) first"
        )
        vars(module)["qconfig"] = value

    def __delete__(self, module: nn.Module) -> None:
        if vars(module).pop("qconfig", self) is self:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'qconfig'")


class Interop(nn.Module):
    """Base of all layers and cells."""

    qconfig = _QuantizationConfig()

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.nn's module with the same parameters, which torch.jit.script compiles in the place of this one."""
        from rnnkit.converting import revert

        module = copy.copy(self)
        if why := revert(module).left.get(""):
            raise RuntimeError(
                f"expected a layer or cell that torch.jit.script can compile, got one that {why}"
            )
        backends.warn(
            f"torch.jit.script puts torch.nn's {type(module).__name__} in the place of rnnkit's, in the model itself: "
            "call rnnkit.convert(model) afterwards, or script a copy.deepcopy of the model"
        )
        return module


def traced(module: nn.Module, input: Any, hx: Any) -> Any:
    """A call of `module` in a graph that torch.fx traces: one node, as torch.fx makes of torch.nn's own layers.

    Raises:
        TraceError: there are hooks, or a subclass's own forward called this one: the node would run them once more.
    """
    cls = type(module)
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    leaf = "make it one node, by a torch.fx.Tracer whose is_leaf_module is True for it"
    if "forward" in vars(module) or not owner.__module__.startswith(f"{__package__}."):
        raise TraceError(
            f"torch.fx cannot trace the forward of {cls.__qualname__}, a subclass of rnnkit's: {leaf}"
        )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # Those of torch.nn.utils' pruning and norms look at weights alone.
    if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        raise TraceError(f"torch.fx cannot trace the hooks of {cls.__qualname__}: {leaf}")
    tracer = _proxies(input, hx)[0].tracer
    arguments = (input,) if hx is None else (input, hx)
    assert isinstance(tracer, Tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def is_traced(input: Any, hx: Any) -> bool:
    """Whether torch.fx traces the call: what it is given are Proxies."""
    return bool(_proxies(input, hx))


def _proxies(input: Any, hx: Any) -> list[Proxy]:
    given = [*input] if isinstance(input, PackedSequence) else [input]
    given += hx if isinstance(hx, tuple | list) else [hx]
    return [value for value in given if isinstance(value, Proxy)]


def runs_as_torchs(weights: Sequence[Tensor | None]) -> bool:
    """Whether torch.nn's own forward is to run: where torch.jit traces, and for torch's per-sample gradients.

    A TorchScript graph can hold none of rnnkit's ops, and ExpandedWeights know torch.nn's functions only.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return any(type(weight).__name__ == "ExpandedWeight" for weight in weights)


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """rnnkit's ops as ATen's recurrent ones, for `torch.export.ExportedProgram.run_decompositions`.

    A runtime that knows only ATen's operators (ExecuTorch, LiteRT, OpenVINO) cannot run `rnnkit::layer_forward`:

        table = torch.export.default_decompositions()
        program = program.run_decompositions({**table, **rnnkit.decompositions()})

    makes steps of a layer, as it does of torch.nn's. Without its entries `torch.ops.aten.lstm.input`, `aten.gru.input`,
    `aten.rnn_tanh.input` and `aten.rnn_relu.input` the program keeps these operators. In both cases it is a program for
    the T and N of the export alone.

    Returns:
        For each of rnnkit's ops a function that does the same, but for the backward pass, which raises RuntimeError:
        they are for inference.
    """
    return {
        torch.ops.rnnkit.layer_forward.default: of_call(_forward_as_aten),
        torch.ops.rnnkit.layer_backward.default: _no_backward,
    }


def _no_backward(*_: Any) -> list[Tensor]:
    raise RuntimeError("expected a program for inference, got one with a backward pass")


def _forward_as_aten(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    if call.outputs > 1:
        raise RuntimeError(
            "expected a call for h alone: ATen's operators give no other state after each step"
        )
    states, batch_sizes = call.states, call.batch_sizes
    if not states:
        batch: Any = call.input.size(1) if batch_sizes is None else batch_sizes[0].item()
        states = call.zero_states(batch)
    op = getattr(torch.ops.aten, call.cell)
    hx = list(states) if call.spec.states > 1 else states[0]
    there = [weight for weight in call.weights if weight is not None]
    biased = call.direction(0).b_ih is not None
    layers = [there, biased, 1, 0.0, False, call.directions > 1]
    if batch_sizes is None:
        output, *finals = op.input(call.input, hx, *layers, False)
    else:
        output, *finals = op.data(call.input, batch_sizes, hx, *layers)
    # Nobody reads the reserve.
    reserve = call.input.new_zeros(call.reserve_shape(keep), dtype=call.sum_dtype)
    return [output], finals, reserve


# FLOPs: `torch.utils.flop_counter` imports Triton where it is installed, so that it is not imported here.
_FLOP_COUNTER = "torch.utils.flop_counter"


def _product(rows: int, weights: Sequence[Tensor | None]) -> int:
    return sum(
        2 * rows * weight.numel() for weight in weights if weight is not None and weight.dim() == 2
    )


def _forward_flops(call: LayerCall, *_: Any) -> int:
    """Of the products with the weights, as torch.utils.flop_counter counts those of torch.nn's GRU and RNN."""
    return _product(call.rows, call.weights)


def _backward_flops(
    call: LayerCall, grads: Any, output: Any, reserve: Any, keep: int, needs: Sequence[bool]
) -> int:
    """Each product of the forward pass twice, but not those for gradients that nobody needs."""
    found = 2 * _forward_flops(call)
    if not needs[0]:
        found -= _product(call.rows, call.of_kind("w_ih"))
    if not (call.states and needs[1]):  # h before each direction's first step
        for step, w_hh in zip((0, -1), call.of_kind("w_hh"), strict=False):
            found -= _product(call.counts[step], [w_hh])
    return found


def _register_flops(counter: ModuleType) -> None:
    def register(op: Any, formula: Callable[..., int]) -> None:
        of_arguments = of_call(formula)
        counter.register_flop_formula(op, get_raw=True)(lambda *args, **_: of_arguments(*args))

    register(torch.ops.rnnkit.layer_forward, _forward_flops)
    register(torch.ops.rnnkit.layer_backward, _backward_flops)


class _AfterImport:
    """Finds the flop counter's module as others do, and has rnnkit's formulas registered when it was imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _FLOP_COUNTER or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)  # while others look
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                    _register_flops(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FLOP_COUNTER in sys.modules:
    _register_flops(sys.modules[_FLOP_COUNTER])
else:
    sys.meta_path.insert(0, _AfterImport)
