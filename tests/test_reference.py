"""The plain PyTorch reference in float64 against torch.nn in float64: results and every gradient."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import Call, Case, call, variants
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkit import reference
from rnnkit.specs import CELLS

#: The cells that torch.nn has, too.
MODULES = {
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
}


def by_torch(case: Case, it: Call) -> dict[str, Tensor]:
    """What `it.reference()` should return, by torch.nn."""
    module_class, options = MODULES[case.cell]
    module = module_class(
        it.input.size(-1),
        case.sizes[3],
        bias=case.bias,
        bidirectional=case.directions == 2,
        dtype=case.dtype,
        **options,
        **({"proj_size": case.projected} if case.projected else {}),
    )
    with torch.no_grad():
        weights = [weight for weight in it.weights if weight is not None]
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    x, *states = (t.clone().requires_grad_() for t in (it.input, *it.states))
    hx = (tuple(states) if len(states) > 1 else states[0]) if states else None
    output, finals = module(x if it.batch_sizes is None else PackedSequence(x, it.batch_sizes), hx)
    results = [output if it.batch_sizes is None else output.data]
    results += [finals] if isinstance(finals, Tensor) else finals
    torch.autograd.backward(results, it.grads)
    grads = [leaf.grad for leaf in (x, *states, *module.parameters())]
    names = ["output", "h_n", "c_n"][: len(results)] + it.gradient_names()
    return dict(zip(names, [*results, *grads], strict=True))


CASES = [
    case
    for cell, directions, sizes in product(
        MODULES, (1, 2), ((1, 1, 1, 1), (4, 3, 5, 17), (7, 2, 3, 16))
    )
    for case in variants(Case(cell, sizes, directions, dtype=torch.float64))
    if case.as_torchs  # the others: test_gradient_rule.py, test_reset.py and test_noise.py
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case: Case) -> None:
    it = call(case)
    torch.testing.assert_close(
        it.reference(), by_torch(case, it), rtol=1e-12, atol=1e-13, check_stride=False
    )


@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (2, 2)])
def test_all_states_against_cells_of_torch(lengths: tuple[int, ...]) -> None:
    it = call(Case("lstm", (0, 0, 5, 4), 2, lengths, dtype=torch.float64, all_states=True))
    assert it.batch_sizes is not None
    outputs, _ = reference.run(it)
    first_rows = it.batch_sizes.cumsum(0) - it.batch_sizes
    for d, n in product(range(2), range(len(lengths))):
        cell = nn.LSTMCell(5, 4, dtype=torch.float64)
        with torch.no_grad():
            for parameter, weight in zip(cell.parameters(), it.direction(d)[:4], strict=True):
                parameter.copy_(weight)
        state = [initial[d, n] for initial in it.states]
        rows = (first_rows[: lengths[n]] + n).tolist()
        for row in rows[::-1] if d else rows:
            state = cell(it.input[row], state)
            found = [output[row, d * 4 : (d + 1) * 4] for output in outputs]
            torch.testing.assert_close(found, list(state), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_initial_states(cell: str) -> None:
    it = call(Case(cell, (3, 2, 5, 4), 2, projected=3 if cell == "lstm" else 0))
    states = it.zero_states(2)
    assert [state.shape for state in states] == [state.shape for state in it.states]
    assert all(state.dtype == it.input.dtype and not state.any() for state in states)


@pytest.mark.parametrize("cell", CELLS)
def test_spec_fits_the_step(cell: str) -> None:
    """What layers and kernels read from a cell's spec is what its step takes and gives."""
    spec = CELLS[cell]
    assert spec.name == cell
    parts = [torch.randn(spec.gates, 3, 4) for _ in range(2)]
    new = spec.step(parts[0], parts[1], torch.randn(spec.states, 3, 4))
    assert [state.shape for state in new] == [(3, 4)] * spec.states
    assert spec.saved >= spec.states - 1


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_device_and_dtype_are_the_input_s(cell: str, dtype: torch.dtype, device: str) -> None:
    it = call(replace(Case(cell), dtype=dtype)).map(lambda t: t.to(device))
    outputs, finals = reference.run(it)
    assert {(t.device.type, t.dtype) for t in (*outputs, *finals)} == {(device, dtype)}
