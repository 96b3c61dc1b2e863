"""The scan in plain PyTorch, for every cell.

The truth that every kernel is tested against, and the path of last resort: it runs on any device and
dtype, and whatever torch can differentiate, transform or trace goes through it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkit.call import LayerCall


def run(call: LayerCall) -> tuple[Tensor, list[Tensor]]:
    """The output [T, N, D*P] or [rows, D*P], and the final states, shaped like the initial ones."""
    input, batch_sizes = call.input, call.batch_sizes
    if (
        batch_sizes is None
        and not torch.compiler.is_compiling()
        and input.size(1) == 0
        and input.size(0) > 1
    ):  # of no rows all steps are alike
        one, last = run(replace(call, input=input[:1]))
        return one.expand(input.size(0), -1, -1).clone(), last
    counts = call.counts
    steps = input.unbind(0) if batch_sizes is None else input.split(counts)
    initial = call.states if len(call.states) > 0 else call.zero_states(counts[0])
    outputs, finals = [], []
    for d in range(call.directions):
        output, final = _scan(call, d, steps, [state[d] for state in initial])
        outputs.append(torch.stack(output) if batch_sizes is None else torch.cat(output))
        finals.append(final)
    return torch.cat(outputs, -1), [torch.stack(state) for state in zip(*finals, strict=True)]


def _scan(
    call: LayerCall, d: int, steps: Sequence[Tensor], states: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Direction d. The first n rows of the states are active at a step of n rows; the others are carried."""
    gates = call.spec.gates
    w_ih, w_hh, b_ih, b_hh, w_hr = call.direction(d)
    outputs: list[Tensor] = []
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
        outputs.append(new[0])
        if rows < states[0].size(0):
            new = [torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True)]
        states = new
    return outputs[::-1] if d else outputs, states
