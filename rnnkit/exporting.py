"""One layer as an operator of ONNX, where torch.onnx exports a model: the standard `RNN`, `LSTM` and `GRU`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkit import reference
from rnnkit.packing import padded_with
from rnnkit.reference import CELLS, WEIGHTS

#: Of each cell: ONNX's name, its order of the gates as places in torch's, and attributes of its own.
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, int]]] = {
    "rnn_tanh": ("RNN", (0,), {}),
    "rnn_relu": ("RNN", (0,), {}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i o f g
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r n; r multiplies after W_hn
}
_ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`reference.layer` as one node of an ONNX graph.

    ONNX's operators take padded sequences and their lengths. They have no projection; there the reference is exported,
    step by step, for the T of the export.

    Source: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html.
    """
    if cell not in OPERATORS or weights[4] is not None:
        return reference.layer(cell, input, states, weights, batch_sizes)
    name, order, attributes = OPERATORS[cell]
    there = lengths = None
    if batch_sizes is not None:
        input, there = padded_with(input, batch_sizes, 0.0)
        lengths = there.sum(0, dtype=torch.int32)
    steps, batch, _ = input.shape
    w_hh = weights[1]
    assert w_hh is not None
    hidden, directions = w_hh.size(1), len(weights) // len(WEIGHTS)

    def stacked(kind: int) -> Tensor | None:
        """[D, G*H, ...] in ONNX's order of the gates."""
        found = []
        for of_direction in weights[kind :: len(WEIGHTS)]:
            if of_direction is None:
                return None
            gates = of_direction.chunk(CELLS[cell].gates)
            found.append(torch.cat([gates[g] for g in order]))
        return torch.stack(found)

    biases = [b for b in (stacked(2), stacked(3)) if b is not None]
    given = (
        input,
        stacked(0),
        stacked(1),
        torch.cat(biases, 1) if biases else None,
        lengths,
        *states,
    )
    if cell in _ACTIVATIONS:
        activations = {"activations": [_ACTIVATIONS[cell]] * directions}
    else:
        activations = {}
    final = [directions, batch, hidden]
    output, *finals = torch.onnx.ops.symbolic_multi_out(
        name,
        given,
        {
            "hidden_size": hidden,
            "direction": "bidirectional" if directions == 2 else "forward",
            **attributes,
            **activations,
        },
        dtypes=[input.dtype] * (1 + CELLS[cell].states),
        shapes=[[steps, directions, batch, hidden], *[final] * CELLS[cell].states],
    )
    output = output.transpose(1, 2).reshape(steps, batch, directions * hidden)  # of [T, D, N, H]
    return output if there is None else output[there], list(finals)
