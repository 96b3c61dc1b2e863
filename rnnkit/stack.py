"""Runs stacked layers, in one or both directions, with dropout, packed sequences and autocast, for every cell."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import dropout as drop
from torch.utils._python_dispatch import _disable_current_modes

from rnnkit import autograd, noise, resets
from rnnkit.call import Keep, LayerCall
from rnnkit.specs import WEIGHTS


def run(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    batch_sizes: Tensor | None = None,
    *,
    directions: int = 1,
    heads: int = 1,
    dropout: float = 0.0,
    step: bool = False,
    keep: Keep = Keep.EVERYTHING,
    packed: Sequence[Tensor] = (),
    grad_clip: float = 0.0,
    grad_cut: int = 0,
    reset: Tensor | None = None,
    reset_to: Sequence[Tensor] = (),
    all_states: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: Sequence[float] = (),
    draws: bool = False,
    has_output: bool = False,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Run a stack of layers.

    Args:
        cell: a name in `specs.CELLS`.
        input: [T, N, I], or the data [rows, I] of a PackedSequence with its `batch_sizes`.
        states: h [L*D, N, P] and, for the LSTM, c [L*D, N, H]; empty for zeros.
        weights: for each layer, direction and head, those of `LayerCall`.
        batch_sizes: int64 [T] on the CPU, not increasing.
        directions: D, 1 or 2.
        heads: of each direction; H and P are those of all heads, one after the other.
        dropout: probability of zeroing an element between layers; 0 when not training.
        step: whether this is the one step of a cell module, which uses only the final states.
        keep: what the forward pass keeps for the backward pass, if gradients are needed.
        packed: what `pack` returned, if the layers are frozen; else empty.
        grad_clip: see `LayerCall`.
        grad_cut: see `LayerCall`.
        reset: bool [T, N] or [rows]: the sequences that are put back before each time step, at the first one, too.
        reset_to: the states that they are put back to, shaped like `states`; empty for zeros.
        all_states: whether to return all states of the last layer after each step.
        recurrent_dropout: see `noise.drawn`; 0 when not training.
        zoneout: see `LayerCall`.
        draws: see `noise.drawn`.
        has_output: whether the cell's last state is its output, [T, N, D*H]. It is not among `states`, `reset_to` and
            the states that are returned.

    Returns:
        The last layer's output [T, N, D*P] or [rows, D*P], followed by its other states after each step if
        `all_states`, h among them if that is not the output; and the final states, shaped like `states`.

    Raises:
        RuntimeError: there is no time step, or a tensor's dtype or device is not the input's.
    """
    if _is_zero(input.size(0) if batch_sizes is None else batch_sizes.numel()):
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    plain_lstm = (
        cell == "lstm"
        and not step
        and batch_sizes is None
        and weights[0][WEIGHTS.index("w_hr")] is None
    )
    input, given, weights, result_dtypes = _autocast(
        cell, input, [*states, *reset_to], weights, plain_lstm
    )
    _check_like(input, given, weights)
    states, reset_to = given[: len(states)], given[len(states) :]
    if has_output:
        states, reset_to = _with_output(states), _with_output(reset_to)
        zoneout = (*zoneout, 0.0) if zoneout else ()
    if heads > 1:
        states, reset_to = _apart(states, heads), _apart(reset_to, heads)
    recurrences = directions * heads  # what a call counts as its directions
    if reset is not None:
        states = [*resets.at_first_step(states, reset_to, reset, recurrences, heads), *reset_to]
    layers = len(weights) // recurrences
    if packed and len(packed) != layers:
        raise RuntimeError(f"expected packed weights of {layers} layers, got {len(packed)}")
    outputs, finals = [input], []
    for index in range(layers):
        of_layer = slice(index * recurrences, (index + 1) * recurrences)
        output = outputs[-1 if has_output else 0]
        if index > 0 and dropout > 0:
            output = drop(output, dropout, training=True)
        call = LayerCall(
            cell,
            output,
            states if layers == 1 else [state[of_layer] for state in states],
            [w for direction in weights[of_layer] for w in direction],
            batch_sizes,
            has_output or (all_states and index == layers - 1),
            grad_clip=grad_clip,
            grad_cut=grad_cut,
            reset=reset,
            heads=heads,
        )
        if recurrent_dropout > 0 or len(zoneout) > 0:
            call = noise.drawn(call, recurrent_dropout, zoneout, draws)
        packed_here = packed[index] if packed and result_dtypes is None else None
        outputs, final = autograd.run(call, keep=keep, packed=packed_here)
        finals.append(final)
    if has_output:
        *after, output = outputs
        outputs = [output, *after] if all_states else [output]
        finals = [final[:-1] for final in finals]
    final_states = finals[0] if layers == 1 else [torch.cat(s) for s in zip(*finals, strict=True)]
    if heads > 1:
        final_states = _together(final_states, heads)
    if result_dtypes is not None:
        outputs = [s.to(result_dtypes[min(k, 1)]) for k, s in enumerate(outputs)]
        final_states = [s.to(result_dtypes[min(k, 1)]) for k, s in enumerate(final_states)]
    return outputs, tuple(final_states)


def _with_output(states: Sequence[Tensor]) -> list[Tensor]:
    """States with one for the output, which no step reads; none stay none."""
    return [*states, *(torch.zeros_like(state) for state in states[:1])]


def _apart(states: Sequence[Tensor], heads: int) -> list[Tensor]:
    """States [L*D, N, H] with the units of each head apart, [L*D*heads, N, H/heads]."""
    return [s.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for s in states]


def _together(states: Sequence[Tensor], heads: int) -> list[Tensor]:
    """The inverse of `_apart`. Never a view, since users may detach a result in place."""
    return [torch.cat(s.unflatten(0, (-1, heads)).unbind(1), -1) for s in states]


def with_dropped_weights(
    weights: Sequence[Sequence[Tensor | None]], p: float
) -> list[list[Tensor | None]]:
    """The weights with dropout of probability p on each w_hh: one mask for all steps of a call."""
    found = [list(of_direction) for of_direction in weights]
    for of_direction in found:
        w_hh = of_direction[WEIGHTS.index("w_hh")]
        if w_hh is not None:
            of_direction[WEIGHTS.index("w_hh")] = drop(w_hh, p, training=True)
    return found


def pack(
    cell: str, weights: Sequence[Sequence[Tensor | None]], *, directions: int = 1, heads: int = 1
) -> tuple[Tensor, ...]:
    """For each layer, its weights in the kernels' layout, for `run`; stale once a weight has changed."""
    flat = [w for of_direction in weights for w in of_direction]
    size = directions * heads * len(weights[0])
    with torch.no_grad():
        return tuple(
            torch.ops.rnnkit.pack_weights(cell, flat[start : start + size], heads)
            for start in range(0, len(flat), size)
        )


def parameters(module: Module, names: Sequence[str]) -> list[Tensor | None]:
    """The module's parameters of these names, or whatever replaced them (functional_call, parametrizations)."""
    # A look-up in the dictionary takes a third of the time of an attribute.
    registered = module._parameters if type(module).__getattr__ is Module.__getattr__ else {}
    return [registered[name] if name in registered else getattr(module, name) for name in names]


def check_plain(name: str, tensor: Tensor) -> None:
    """Checks that `tensor` is neither nested nor sparse nor quantized.

    Raises:
        AttributeError: `tensor` is no Tensor.
        RuntimeError: `tensor` is nested, sparse or quantized.
    """
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"expected {name} to be a Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested, " * tensor.is_nested + "quantized, " * tensor.is_quantized
        raise RuntimeError(
            f"expected {name} to be a dense Tensor, got one that is {kind}of layout {tensor.layout}"
        )


def reshaped(tensor: Tensor, method: str, *dims: int) -> Tensor:
    """`tensor.method(*dims)`, done in place, for a tensor that nobody else holds.

    The result is not a view, so that users may detach it or write to it in place. The version counter, by which
    `autograd` detects writes to an output, does not change.
    """
    changed: Tensor
    if (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        changed = getattr(tensor, method)(*dims)
    elif tensor.is_inference():
        changed = getattr(tensor, f"{method}_")(*dims)
    else:
        preserved = torch.autograd._unsafe_preserve_version_counter(tensor)  # type: ignore[attr-defined]
        with preserved:
            changed = getattr(tensor, f"{method}_")(*dims)
    return changed


def as_states(hx: Tensor | None, name: str = "hx") -> tuple[Tensor, ...]:
    """The states of a cell with one state, from `hx`; empty, which stands for zeros, if `hx` is None."""
    if hx is None:
        return ()
    check_plain(name, hx)
    return (hx,)


def as_several_states(
    names: Sequence[str],
    cell: str,
    hx: Sequence[Tensor] | None,
    name: str = "hx",
    too_few: type[Exception] = IndexError,
) -> tuple[Tensor, ...]:
    """The states `names` of a cell with several, from `hx`; empty, which stands for zeros, if `hx` is None.

    Exceptions have the types that torch.nn raises for (h, c) of an LSTM.
    """
    if hx is None:
        return ()
    count = {2: "two", 3: "three"}.get(len(names), str(len(names)))
    of_them = "a pair of" if len(names) == 2 else count
    expected = f"expected {name} to be {of_them} Tensors ({', '.join(names)})"
    if isinstance(hx, Tensor):
        raise TypeError(f"{expected}, got a Tensor of shape {tuple(hx.shape)}")
    if not all(isinstance(state, Tensor) for state in hx):
        raise AttributeError(f"{expected}, got {[type(state).__name__ for state in hx]}")
    if len(hx) != len(names):
        wrong_number = too_few if len(hx) < len(names) else RuntimeError
        raise wrong_number(
            f"{cell} expects {count} hidden states: {expected}, got {len(hx)} of them"
        )
    for index, state in enumerate(hx):
        check_plain(f"{name}[{index}]", state)
    return tuple(hx)


def _is_zero(steps: int) -> bool:
    """Whether there is no time step; False in a graph that knows T only at run time."""
    if not torch.compiler.is_compiling():
        return steps == 0
    # Imported here since it imports sympy, which a compiler has loaded already.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(steps == 0))


def _check_like(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Sequence[Tensor | None]]
) -> None:
    """Checks that every tensor has the input's device and dtype."""
    _check_alike("hidden", input, states)
    for of_direction in weights:
        _check_alike("parameter", input, of_direction)


def _check_alike(what: str, input: Tensor, tensors: Sequence[Tensor | None]) -> None:
    dtype, device = input.dtype, input.device
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            raise RuntimeError(
                f"Input and {what} tensors are not at the same device, found input tensor at {device} "
                f"and {what} tensor at {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"Input and {what} tensors are not the same dtype, found input tensor with {dtype} "
                f"and {what} tensor with {tensor.dtype}"
            )


@functools.cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which torch.nn's LSTM runs on oneDNN on this CPU, under ONEDNN_MAX_CPU_ISA."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    of_onednn = torch.ops.mkldnn
    with _disable_current_modes():  # else torch.export would record these ops in its graph
        supported = {
            torch.float32: True,
            torch.bfloat16: of_onednn._is_mkldnn_bf16_supported(),  # needs AVX-512
            torch.float16: of_onednn._is_mkldnn_fp16_supported(),  # needs AVX512-FP16
        }
    return frozenset(dtype for dtype, is_supported in supported.items() if is_supported)


def _onednn_takes(dtype: torch.dtype, gradients: bool) -> bool:
    """Whether torch.nn runs a plain LSTM of this dtype on oneDNN on the CPU: ATen's `use_mkldnn`.

    `dtype` is the input's before autocast casts it. oneDNN gets no float16 where `gradients` are recorded.
    """
    # torch.export switches oneDNN off while it traces, but an exported torch.nn LSTM runs on oneDNN.
    switched_on = torch.backends.mkldnn.enabled or torch.compiler.is_exporting()
    return switched_on and dtype in _onednn_dtypes() and not (gradients and dtype == torch.float16)


# torch.compile cannot trace this function and takes its result as a constant. Setting the attribute is all that
# `torch.compiler.assume_constant_result` does, but that would import the compiler.
_onednn_takes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    plain_lstm: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Sequence[Tensor | None]], list[torch.dtype] | None]:
    """The tensors as autocast casts them, and the dtypes that torch.nn returns for output and states.

    Under autocast all tensors are cast to the low dtype; else they are returned as they are, with None for the dtypes.

    torch.nn returns the low dtype from an RNN, from an LSTM in oneDNN and on a GPU. Its other cells are made of
    pointwise ops, which promote to the dtype of the incoming state. Where oneDNN's LSTM raises, since it has no kernel
    for the low dtype, rnnkit returns the low dtype.

    `plain_lstm`: whether this is an LSTM layer, not packed and without projections, the only kind that oneDNN runs.
    """
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input, states, weights, None
    low = torch.get_autocast_dtype(kind)
    carried = states[-1].dtype if states else input.dtype
    state = torch.promote_types(carried, low)
    projected = weights[0][WEIGHTS.index("w_hr")] is not None
    in_onednn = (
        plain_lstm
        and kind == "cpu"
        and _onednn_takes(input.dtype, torch.is_grad_enabled())
        and not _is_zero(input.numel())
    )
    if cell.startswith("rnn") or in_onednn or kind != "cpu":
        state = low

    def cast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.to(low) for t in tensors]

    return (
        input.to(low),
        [s.to(low) for s in states],
        [cast(of_direction) for of_direction in weights],
        [low if projected else state, state],
    )
