"""The scan in plain PyTorch, for every cell.

Every kernel is tested against it. It also runs on devices and dtypes without kernels, and serves calls that torch has
to differentiate twice, transform or trace.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from rnnkit.call import DirectionWeights, LayerCall
from rnnkit.specs import NORM_EPSILON


def run(
    call: LayerCall, seen: list[list[list[Tensor]]] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the outputs, [T, N, D*P] or [rows, D*P] for h, and the final states, shaped like the initial ones.

    If `seen` is given, each direction's states after each time step are appended to it, of active rows alone.
    """
    input, batch_sizes = call.input, call.batch_sizes
    # In an empty batch all steps are alike, so that one is enough.
    if (
        batch_sizes is None
        and not torch.compiler.is_compiling()
        and input.size(1) == 0
        and input.size(0) > 1
        and seen is None
    ):
        of_one, last = run(replace(call, input=input[:1]))
        return [one.expand(input.size(0), -1, -1).clone() for one in of_one], last
    counts = call.counts
    steps = input.unbind(0) if batch_sizes is None else input.split(counts)
    initial = call.initial_states if len(call.states) > 0 else call.zero_states(counts[0])
    join = torch.stack if batch_sizes is None else torch.cat
    outputs, finals = [], []
    for d in range(call.directions):
        count = call.outputs if seen is None else call.spec.states
        states, final = _scan(call, d, steps, [state[d] for state in initial], count)
        outputs.append([join([new[k] for new in states]) for k in range(call.outputs)])
        if seen is not None:
            seen.append(states)
        finals.append(final)
    return (
        [torch.cat(of_state, -1) for of_state in zip(*outputs, strict=True)],
        [torch.stack(of_state) for of_state in zip(*finals, strict=True)],
    )


class _PassBack(torch.autograd.Function):
    """The identity: (state, limit, rows) -> state. Its gradient is clipped to the limit, and 0 in the first rows.

    The rule is one for gradients alone: tangents of forward-mode AD pass as they are.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, limit: float, rows: int) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.limit, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.limit <= torch.finfo(grad.dtype).max:
            grad = grad.clamp(-ctx.limit, ctx.limit)
        if ctx.rows > 0:
            grad = torch.cat([torch.zeros_like(grad[: ctx.rows]), grad[ctx.rows :]])
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return tangent.view_as(tangent)


def _masked(mask: Tensor | None, operand: Tensor) -> Tensor:
    """An operand of the recurrent product, times its rows of the mask; as it is without one."""
    return operand if mask is None else operand * mask[: operand.size(0)]


def _reset(states: list[Tensor], rows: Tensor, put_back: list[Tensor]) -> list[Tensor]:
    """The states, with those of `rows`, a mask, put back: to `put_back`, or to zeros if it is empty."""
    mask = rows.unsqueeze(-1)
    if not put_back:
        return [state.masked_fill(mask, 0) for state in states]
    return [torch.where(mask, new, old) for new, old in zip(put_back, states, strict=True)]


def _of_direction(call: LayerCall, d: int, k: int) -> Sequence[Tensor]:
    """Where direction d's units keep state k at each time step, bool [rows of the step, width]; empty if not given."""
    mask = call.kept_of(k)
    if mask is None:
        return ()
    own: Tensor = mask.unflatten(-1, (call.directions, -1))[..., d, :]
    steps: Sequence[Tensor]
    steps = own.unbind(0) if call.batch_sizes is None else own.split(call.counts)
    return steps


def _zoned(old: Tensor, new: Tensor, p: float, kept: Tensor | None) -> Tensor:
    """The state after zoneout: `old` where it is kept, or the expectation of that for probability p."""
    return old * p + new * (1 - p) if kept is None else torch.where(kept, old, new)


def _normalized(values: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """(values - their mean) / sqrt(their variance + epsilon) * factor + bias, over the last dimension."""
    return layer_norm(values, factor.shape, factor, bias, NORM_EPSILON)


def _input_parts(x: Tensor, of: DirectionWeights, bias: Tensor | None = None) -> Tensor:
    """x W_ih^T + bias, or x + bias where the input is the product already."""
    if of.w_ih is not None:
        return linear(x, of.w_ih, bias)
    return x if bias is None else x + bias


def _recurrent_parts(
    operand: Tensor, of: DirectionWeights, hidden: int, gates: range
) -> Sequence[Tensor]:
    """operand W_hh^T + b_hh of some gates that follow one another."""
    assert of.w_hh is not None
    w_hh, b_hh = of.w_hh, of.b_hh
    if len(gates) * hidden < w_hh.size(0):
        rows = slice(gates.start * hidden, gates.stop * hidden)
        w_hh, b_hh = w_hh[rows], None if b_hh is None else b_hh[rows]
    return linear(operand, w_hh, b_hh).chunk(len(gates), -1)


def _step(
    call: LayerCall,
    of: DirectionWeights,
    x: Tensor,
    states: list[Tensor],
    masked: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The states after one step, before a projection. `masked`: h as the recurrent product reads it.

    With layer normalization its factors come before the biases, and h' is made of the normalized c'.
    """
    spec = call.spec
    gates = spec.gates
    if not call.normalizes:
        of_x = _input_parts(x, of, of.b_ih).chunk(gates, -1)
        parameters = () if of.unit is None else (of.unit.unbind(0),)
        early = spec.recurrent - spec.late
        of_h = _recurrent_parts(masked(states[0]), of, call.hidden, range(early)) if early else []
        if spec.operand is None:
            return list(spec.step(of_x, of_h, states, *parameters))
        operand, known = spec.operand(of_x, of_h, states, *parameters)
        late = range(early, spec.recurrent)
        of_h = [*of_h, *_recurrent_parts(masked(operand), of, call.hidden, late)]
        return list(spec.step(of_x, of_h, states, *parameters, known=known))
    assert of.w_hh is not None and of.norm_ih is not None and of.norm_hh is not None
    parts = (
        _normalized(_input_parts(x, of), of.norm_ih, of.b_ih),
        _normalized(linear(masked(states[0]), of.w_hh), of.norm_hh, of.b_hh),
    )
    of_state = []
    if of.norm_c is not None:
        of_state = [partial(_normalized, factor=of.norm_c, bias=of.norm_c_bias)]
    return list(spec.step(*(part.chunk(gates, -1) for part in parts), states, *of_state))


def _scan(
    call: LayerCall, d: int, steps: Sequence[Tensor], states: list[Tensor], count: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Runs direction d. Returns the active rows' first `count` states after each step, and all rows' final states.

    The first n rows of the states are active at a step of n rows; the others are carried.
    """
    of_direction = call.direction(d)
    w_hr = of_direction.w_hr
    after: list[list[Tensor]] = []
    times = range(len(steps))
    before = 0  # the rows of the step before
    resets: Sequence[Tensor] = ()
    if call.reset is not None:
        resets = call.reset.unbind(0) if call.batch_sizes is None else call.reset.split(call.counts)
    put_back = [state[d] for state in call.reset_states]
    mask = None if call.operand_mask is None else call.operand_mask[d]
    stays = [_of_direction(call, d, k) for k in range(call.spec.states)]
    clips = call.grad_clip > 0 and torch.is_grad_enabled()
    reverses = call.reverses(d)
    for t in reversed(times) if reverses else times:
        x = steps[t]
        if not call.multiplies_input:
            x = x.unflatten(-1, (call.directions, -1))[..., d, :]
        rows = x.size(0)
        active = [state[:rows] for state in states]
        cuts = call.grad_cut > 0 and (t + reverses) % call.grad_cut == 0
        continuing = min(before, rows)
        stopped = continuing if cuts else 0
        if clips or (stopped > 0 and torch.is_grad_enabled()):
            limit = call.grad_clip or math.inf
            active = [_PassBack.apply(state, limit, stopped) for state in active]
        if resets and continuing > 0:
            begins = resets[t + reverses][:continuing]
            if continuing < rows:
                begins = torch.cat([begins, begins.new_zeros(rows - continuing)])
            new_states = [state[:rows] for state in put_back]
            if clips:
                new_states = [_PassBack.apply(state, call.grad_clip, 0) for state in new_states]
            active = _reset(active, begins, new_states)
        before = rows
        new = _step(call, of_direction, x, active, partial(_masked, mask))
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        for k, p in enumerate(call.zoneout):
            if p > 0:
                new[k] = _zoned(active[k], new[k], p, stays[k][t] if stays[k] else None)
        after.append(new[:count])
        if rows < states[0].size(0):
            new = [torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True)]
        states = new
    return after[::-1] if reverses else after, states
