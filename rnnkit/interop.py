"""Support for PyTorch's other tools: torch.fx, TorchScript, quantization, FLOP counting, ATen graphs."""

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

from rnnkit import backends, exporting, options, specs, update_gate
from rnnkit.call import BackwardCall, LayerCall, Results
from rnnkit.ops import of_backward, of_call


class _QuantizationConfig:
    """`qconfig`, which torch.ao.quantization sets on every module: warns that this module will not be quantized."""

    def __get__(self, module: nn.Module | None, cls: type[nn.Module]) -> Any:
        if module is None or "qconfig" not in vars(module):
            raise AttributeError(f"{cls.__name__!r} object has no attribute 'qconfig'")
        return vars(module)["qconfig"]

    def __set__(self, module: nn.Module, value: Any) -> None:
        backends.warn(
            f"torch.ao.quantization knows only torch.nn's classes and leaves rnnkit's {type(module).__name__} as it "
            "is: to quantize it, call rnnkit.revert(model) first"
        )
        vars(module)["qconfig"] = value

    def __delete__(self, module: nn.Module) -> None:
        if vars(module).pop("qconfig", self) is self:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'qconfig'")


class Interop(nn.Module):
    """Base of all layers and cells."""

    qconfig = _QuantizationConfig()

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.nn's module with the same parameters, which torch.jit.script compiles in place of this one."""
        from rnnkit.converting import revert

        module = copy.copy(self)
        if why := revert(module).left.get(""):
            raise RuntimeError(
                f"expected a layer or cell that torch.jit.script can compile, got one that {why}"
            )
        backends.warn(
            f"torch.jit.script replaces rnnkit's {type(module).__name__} by torch.nn's in the model itself: "
            "call rnnkit.convert(model) afterwards, or script a copy.deepcopy of the model"
        )
        return module


def traced(module: nn.Module, input: Any, hx: Any, **options: Any) -> Any:
    """Records a call of `module` in the graph that torch.fx traces, as one node like a layer of torch.nn.

    Raises:
        TraceError: the module has hooks, or a subclass's own forward made this call. They are in the graph already,
            and the node would run them again.
    """
    cls = type(module)
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    leaf = "make it one node, by a torch.fx.Tracer whose is_leaf_module is True for it"
    if "forward" in vars(module) or not owner.__module__.startswith(f"{__package__}."):
        raise TraceError(
            f"torch.fx cannot trace the forward of {cls.__qualname__}, a subclass of rnnkit's: {leaf}"
        )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # The hooks of torch.nn.utils (pruning, norms) are allowed: they only set weights.
    if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
        raise TraceError(f"torch.fx cannot trace the hooks of {cls.__qualname__}: {leaf}")
    tracer = _proxies(input, hx, *options.values())[0].tracer
    arguments = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    assert isinstance(tracer, Tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given)


def is_traced(input: Any, hx: Any, **options: Any) -> bool:
    """Whether torch.fx traces the call: some argument is a Proxy."""
    return bool(_proxies(input, hx, *options.values()))


def _proxies(*arguments: Any) -> list[Proxy]:
    given: list[Any] = []
    for argument in arguments:
        given += argument if isinstance(argument, tuple | list) else [argument]
    return [value for value in given if isinstance(value, Proxy)]


def runs_as_torchs(weights: Sequence[Tensor | None]) -> bool:
    """Whether to run torch.nn's own forward: under torch.jit.trace, and for ExpandedWeights (per-sample gradients).

    A TorchScript graph cannot contain rnnkit's ops, and ExpandedWeights support only torch.nn's functions.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return any(type(weight).__name__ == "ExpandedWeight" for weight in weights)


def run_as_torchs(module: Any, input: Any, hx: Any, **options: Any) -> Any:
    """The call by torch.nn's own forward.

    Raises:
        RuntimeError: torch.nn's module computes something else.
    """
    used = [name for name, value in options.items() if value is not None]
    if why := unlike_torchs(module, of_call=(hx,)) or (f"is called with {used[0]}" if used else ""):
        raise RuntimeError(
            "expected a layer or cell like torch.nn's under torch.jit.trace and for per-sample gradients, got one that "
            f"{why}"
        )
    return module._torchs.forward(module, input, hx)


def unlike_torchs(module: Any, of_call: tuple[Any] | None = None) -> str:
    """Why torch.nn's class with the same parameters computes something else; empty if it does not.

    `of_call`: whether it does so in one call, now, with this `hx`.
    """
    if isinstance(module, Interop) and not hasattr(module, "_torchs"):
        return "has a cell of its own"
    if update_gate.writes(module):
        return "has update_gate='writes': call convert_update_gate('keeps') first"
    if update_gate.resets_before(module):
        return "has reset='before', which torch.nn's have not"
    if getattr(module, "layer_norm", False):
        return "has layer_norm, which torch.nn's have not"
    now = options.CHANGING
    if of_call is not None and not module.training:
        now = now - {"weight_dropout", "recurrent_dropout"}
    for name in options.changed(module):
        if name in now:
            default = options.OPTIONS[name].default
            return f"has {name}, which torch.nn's have not: set it to {default} first"
    if getattr(module, "learn_initial_state", False) and of_call in (None, (None,)):
        return "has learn_initial_state, which torch.nn's have not: give its h_0 as hx to a layer without"
    return ""


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Decompositions of rnnkit's ops into ATen's, for `torch.export.ExportedProgram.run_decompositions`.

    They are for runtimes that know only ATen's operators (ExecuTorch, LiteRT, OpenVINO):

        table = torch.export.default_decompositions()
        program = program.run_decompositions({**table, **rnnkit.decompositions()})

    This unrolls a layer into its steps, as it does with torch.nn's. To keep ATen's recurrent operators instead, first
    delete `torch.ops.aten.lstm.input`, `aten.gru.input`, `aten.rnn_tanh.input` and `aten.rnn_relu.input` from the
    table. In both cases the program is valid only for the T and N of the export.

    Returns:
        For each of rnnkit's ops, a function that does the same in ATen's ops. It raises RuntimeError for the backward
        pass, and for calls with `all_states` of an LSTM, `reset`, recurrent dropout, zoneout, layer normalization or
        heads, or without W_ih.
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
    if call.reset is not None:
        raise RuntimeError("expected a call without reset: ATen's operators have none")
    if call.operand_mask is not None or len(call.zoneout) > 0:
        raise RuntimeError(
            "expected a call without recurrent dropout and zoneout: ATen has neither"
        )
    if call.normalizes:
        raise RuntimeError("expected a layer without layer_norm: ATen's operators have none")
    if call.heads > 1 or not call.multiplies_input:
        raise RuntimeError(
            "expected a layer of one head that multiplies its input: ATen's operators have no other"
        )
    call = exporting.of_torchs_cell(call)
    states, batch_sizes = call.states, call.batch_sizes
    if not states:
        states = call.zero_states(call.batch_of_graph)
    op = getattr(torch.ops.aten, call.cell, None)
    if op is None:
        raise RuntimeError(
            f"expected a cell that ATen has an operator for, got {specs.shown(call.cell)}"
        )
    hx = list(states) if call.spec.states > 1 else states[0]
    there = [weight for weight in call.weights if weight is not None]
    biased = call.direction(0).b_ih is not None
    layers = [there, biased, 1, 0.0, False, call.directions > 1]
    if batch_sizes is None:
        output, *finals = op.input(call.input, hx, *layers, False)
    else:
        output, *finals = op.data(call.input, batch_sizes, hx, *layers)
    # A program for inference never reads the reserve.
    reserve = call.input.new_zeros(call.reserve_shape(keep), dtype=call.sum_dtype)
    return [output], finals, reserve


# FLOPs. `torch.utils.flop_counter` imports Triton if it is installed, so rnnkit does not import it: the formulas are
# registered when somebody else does.
_FLOP_COUNTER = "torch.utils.flop_counter"


def _product(rows: int, weights: Sequence[Tensor | None]) -> int:
    return sum(
        2 * rows * weight.numel() for weight in weights if weight is not None and weight.dim() == 2
    )


def _forward_flops(call: LayerCall, *_: Any) -> int:
    """FLOPs of the products with the weights, all that torch.utils.flop_counter counts for torch.nn's GRU and RNN."""
    return _product(call.rows, call.weights)


def _backward_flops(back: BackwardCall) -> int:
    """FLOPs of two products for each of the forward pass, without those for gradients that are not needed."""
    call, needs = back.call, back.needs
    found = 2 * _forward_flops(call)
    if not needs[0]:
        found -= _product(call.rows, call.of_kind("w_ih"))
    # Without a gradient of h_0, there is no product with W_hh at each direction's first step.
    if not (call.states and needs[1]):
        for d, w_hh in enumerate(call.of_kind("w_hh")):
            found -= _product(call.counts[-1 if call.reverses(d) else 0], [w_hh])
    return found


def _register_flops(counter: ModuleType) -> None:
    def register(op: Any, formula: Callable[..., int]) -> None:
        counter.register_flop_formula(op, get_raw=True)(lambda *args, **_: formula(*args))

    register(torch.ops.rnnkit.layer_forward, of_call(_forward_flops))
    register(torch.ops.rnnkit.layer_backward, of_backward(_backward_flops))


class _AfterImport:
    """An import hook that registers rnnkit's formulas as soon as the flop counter's module has been imported."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _FLOP_COUNTER or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)  # find_spec below must not come back here
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
