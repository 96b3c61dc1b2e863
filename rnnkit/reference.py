"""The scan in plain PyTorch, for every cell.

Every kernel is tested against it. It also runs on devices and dtypes without kernels, and serves calls that torch has
to differentiate twice, transform or trace.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkit.call import LayerCall


def run(call: LayerCall) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the outputs, [T, N, D*P] or [rows, D*P] for h, and the final states, shaped like the initial ones."""
    input, batch_sizes = call.input, call.batch_sizes
    # In an empty batch all steps are alike, so that one is enough.
    if (
        batch_sizes is None
        and not torch.compiler.is_compiling()
        and input.size(1) == 0
        and input.size(0) > 1
    ):
        of_one, last = run(replace(call, input=input[:1]))
        return [one.expand(input.size(0), -1, -1).clone() for one in of_one], last
    counts = call.counts
    steps = input.unbind(0) if batch_sizes is None else input.split(counts)
    initial = call.states if len(call.states) > 0 else call.zero_states(counts[0])
    join = torch.stack if batch_sizes is None else torch.cat
    outputs, finals = [], []
    for d in range(call.directions):
        states, final = _scan(call, d, steps, [state[d] for state in initial])
        outputs.append([join([new[k] for new in states]) for k in range(call.outputs)])
        finals.append(final)
    return (
        [torch.cat(of_state, -1) for of_state in zip(*outputs, strict=True)],
        [torch.stack(of_state) for of_state in zip(*finals, strict=True)],
    )


def _scan(
    call: LayerCall, d: int, steps: Sequence[Tensor], states: list[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Runs direction d. Returns the active rows' outputs after each step, and all rows' states after the last step.

    The first n rows of the states are active at a step of n rows; the others are carried.
    """
    gates = call.spec.gates
    w_ih, w_hh, b_ih, b_hh, w_hr = call.direction(d)
    after: list[list[Tensor]] = []
    for x in reversed(steps) if d else steps:
        rows = x.size(0)
        active = [state[:rows] for state in states]
        new = list(
            call.spec.step(
                linear(x, w_ih, b_ih).chunk(gates, -1),
                linear(active[0], w_hh, b_hh).chunk(gates, -1),
                active,
            )
        )
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        after.append(new[: call.outputs])
        if rows < states[0].size(0):
            new = [torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True)]
        states = new
    return after[::-1] if d else after, states
