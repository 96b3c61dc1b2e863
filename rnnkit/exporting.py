"""Exports one layer to ONNX as its standard operators `RNN`, `LSTM` and `GRU`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rnnkit import reference
from rnnkit.call import LayerCall
from rnnkit.packing import padded_with
from rnnkit.specs import CELLS
from rnnkit.update_gate import with_other_gate

#: For each cell: ONNX's operator, for each of its gates the index of torch's gate, and extra attributes.
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, int]]] = {
    "rnn_tanh": ("RNN", (0,), {}),
    "rnn_relu": ("RNN", (0,), {}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),  # i o f g
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r n; r multiplies after W_hn
}
_ACTIVATIONS = {"rnn_tanh": "Tanh", "rnn_relu": "Relu"}


def of_torchs_cell(call: LayerCall) -> LayerCall:
    """The call by a cell that torch.nn has, and ONNX: "gru_writes" is "gru" with the rows of z negated."""
    before = _before()
    keeps = {"gru_writes": "gru", before["writes"]: before["keeps"]}.get(call.cell)
    if keeps is None:
        return call
    weights = [None if weight is None else with_other_gate(weight) for weight in call.weights]
    return replace(call, cell=keeps, weights=weights)


def _before() -> Mapping[str, str]:
    """The cells of a GRU whose reset gate comes before the product; ONNX has it, torch.nn has not."""
    from rnnkit.graph.builtin import RESET_BEFORE

    return RESET_BEFORE


def _operator(cell: str) -> tuple[str, tuple[int, ...], dict[str, int]] | None:
    """What `OPERATORS` has for a cell; None if ONNX has none."""
    if cell == _before()["keeps"]:
        return "GRU", OPERATORS["gru"][1], {"linear_before_reset": 0}
    return OPERATORS.get(cell)


def run(call: LayerCall) -> tuple[list[Tensor], list[Tensor]]:
    """The results of `reference.run`, as one node of an ONNX graph.

    ONNX's operators take padded sequences with their lengths. They have no projection, resets, recurrent dropout,
    zoneout, layer normalization, heads or cells of one's own, and of the states after each step they return only h. A
    call that needs more is exported as the reference's steps, for the T of the export.

    Source: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html.
    """
    beyond = call.normalizes or call.projects or call.outputs > 1 or call.reset is not None
    beyond |= call.operand_mask is not None or len(call.zoneout) > 0
    known = call.cell in CELLS or call.cell in _before().values()
    beyond |= not known or call.heads > 1 or not call.multiplies_input
    if beyond and call.batch_sizes is not None:
        raise RuntimeError(
            "expected a dense input, without lengths, to export a layer to ONNX that its operators do not have"
        )
    call = call if beyond else of_torchs_cell(call)
    operator = None if beyond else _operator(call.cell)
    if operator is None:
        return reference.run(call)
    name, order, attributes = operator
    input, hidden, directions, states = call.input, call.hidden, call.directions, call.spec.states
    there = lengths = None
    if call.batch_sizes is not None:
        input, there = padded_with(input, call.batch_sizes, 0.0)
        lengths = there.sum(0, dtype=torch.int32)
    steps, batch, _ = input.shape

    def stacked(kind: str) -> Tensor | None:
        """The weights of this kind, [D, G*H, ...], with the gates in ONNX's order; None if the layer has none."""
        found = []
        for of_direction in call.of_kind(kind):
            if of_direction is None:
                return None
            gates = of_direction.chunk(call.spec.gates)
            found.append(torch.cat([gates[g] for g in order]))
        return torch.stack(found)

    biases = [b for b in (stacked("b_ih"), stacked("b_hh")) if b is not None]
    given = (
        input,
        stacked("w_ih"),
        stacked("w_hh"),
        torch.cat(biases, 1) if biases else None,
        lengths,
        *call.states,
    )
    if call.cell in _ACTIVATIONS:
        activations = {"activations": [_ACTIVATIONS[call.cell]] * directions}
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
        dtypes=[input.dtype] * (1 + states),
        shapes=[[steps, directions, batch, hidden], *[final] * states],
    )
    output = output.transpose(1, 2).reshape(steps, batch, directions * hidden)  # was [T, D, N, H]
    return [output if there is None else output[there]], list(finals)
