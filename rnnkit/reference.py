"""The cells and the scan in plain PyTorch.

The truth that every kernel is tested against, and the path of last resort: it runs on any device and
dtype, and whatever torch can differentiate, transform or trace goes through it. One `CellSpec` a cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]

#: The weights of one direction: w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H], b_hh [G*H], w_hr [P, H].
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


@dataclass(frozen=True)
class CellSpec:
    """What the layers need to know of a cell.

    Attributes:
        name: its name in ops and kernels.
        gates: G, the blocks of H rows in w_ih and w_hh.
        states: tensors carried from step to step; the first is h, the output.
        saved: values per hidden unit and step that a kernel keeps, beside the output, for the backward pass.
        input_grads: a kernel's gradients of the gates are those of the recurrent parts, in gate order, and where
            a gate's input part has another one, that; here the place of each gate's input part's.
        step: (input's part of each gate, recurrent part of each gate, states) -> new states, all [N, H].
    """

    name: str
    gates: int
    states: int
    saved: int
    input_grads: tuple[int, ...]
    step: Step


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    """h' = activation(x + h), with x and h the input's and the recurrent part."""

    def step(
        x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        return (activation(x[0] + h[0]),)

    return step


def _lstm(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """i, f, o = σ(x + h); g = tanh(x + h); c' = f⊙c + i⊙g; h' = o⊙tanh(c'); gate order i, f, g, o."""
    i, f, o = (torch.sigmoid(x[k] + h[k]) for k in (0, 1, 3))
    g = torch.tanh(x[2] + h[2])
    c = f * states[1] + i * g
    return o * torch.tanh(c), c


def _gru(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """r, z = σ(x + h); n = tanh(x + r⊙h); h' = (1 - z)⊙n + z⊙h; gate order r, z, n."""
    r, z = (torch.sigmoid(x[k] + h[k]) for k in (0, 1))
    n = torch.tanh(x[2] + r * h[2])
    return ((1 - z) * n + z * states[0],)


#: Every cell there is. The ops' fakes and the tests iterate this.
CELLS = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", gates=1, states=1, saved=0, input_grads=(0,), step=_rnn(torch.tanh)),
        CellSpec("rnn_relu", gates=1, states=1, saved=0, input_grads=(0,), step=_rnn(torch.relu)),
        CellSpec("lstm", gates=4, states=2, saved=5, input_grads=(0, 1, 2, 3), step=_lstm),
        CellSpec("gru", gates=3, states=1, saved=4, input_grads=(0, 1, 3), step=_gru),
    )
}


def initial_states(
    cell: str, input: Tensor, rows: int, weights: Sequence[Tensor | None]
) -> list[Tensor]:
    """Zeros for the states of one layer: h [D, N, P], and c [D, N, H] if the cell has one."""
    w_hh = weights[1]
    assert w_hh is not None
    sizes = [w_hh.size(1)] + [w_hh.size(0) // CELLS[cell].gates] * (CELLS[cell].states - 1)
    return [input.new_zeros(len(weights) // len(WEIGHTS), rows, size) for size in sizes]


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One layer, one or both directions, over a dense or packed sequence.

    Args:
        cell: a name in `CELLS`.
        input: [T, N, I], or the data [rows, I] of a PackedSequence with its `batch_sizes`.
        states: h [D, N, P] and, for the LSTM, c [D, N, H]; empty for zeros.
        weights: for each direction the five of `WEIGHTS`, None for what the layer does not have.
        batch_sizes: int64 [T] on the CPU, not increasing.

    Returns:
        The output [T, N, D*P] or [rows, D*P], and the final states, shaped like `states`.
    """
    if (
        batch_sizes is None
        and not torch.compiler.is_compiling()
        and input.size(1) == 0
        and input.size(0) > 1
    ):  # of no rows all steps are alike
        one, last = layer(cell, input[:1], states, weights)
        return one.expand(input.size(0), -1, -1).clone(), last
    counts = [input.size(1)] * input.size(0) if batch_sizes is None else batch_sizes.tolist()
    steps = input.unbind(0) if batch_sizes is None else input.split(counts)
    if len(states) == 0:
        states = initial_states(cell, input, counts[0], weights)
    outputs, finals = [], []
    for d in range(len(weights) // len(WEIGHTS)):
        direction = weights[d * len(WEIGHTS) : (d + 1) * len(WEIGHTS)]
        output, final = _scan(cell, steps, [state[d] for state in states], direction, d == 1)
        outputs.append(torch.stack(output) if batch_sizes is None else torch.cat(output))
        finals.append(final)
    return torch.cat(outputs, -1), [torch.stack(state) for state in zip(*finals, strict=True)]


def _scan(
    cell: str,
    steps: Sequence[Tensor],
    states: list[Tensor],
    weights: Sequence[Tensor | None],
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """One direction. At a step with n rows the first n rows of the states are alive; the rest wait."""
    spec = CELLS[cell]
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    outputs: list[Tensor] = []
    for x in reversed(steps) if reverse else steps:
        rows = x.size(0)
        alive = [state[:rows] for state in states]
        new = list(
            spec.step(
                linear(x, w_ih, b_ih).chunk(spec.gates, -1),
                linear(alive[0], w_hh, b_hh).chunk(spec.gates, -1),
                alive,
            )
        )
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        outputs.append(new[0])
        waiting = rows < states[0].size(0)
        states = (
            [torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True)] if waiting else new
        )
    return outputs[::-1] if reverse else outputs, states
