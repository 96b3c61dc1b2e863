"""What cells have and layers do not: no hidden units, biases that are None, a late look at the nonlinearity."""

import pytest
import torch
from configurations import CELLS, Case, named_results, run, run_on_cpu

import rnnkit


@pytest.mark.parametrize("module", CELLS)
def test_no_hidden_units(backend: str, device: str, module: str) -> None:
    case = Case(module, hidden_size=0, hx=True, device=device)
    ours, theirs = case.make(rnnkit), case.make(torch.nn)
    actual, expected = run(case, ours, case.leaves()), run_on_cpu(case, theirs)
    assert {n: t.shape for n, t in actual.items()} == {n: t.shape for n, t in expected.items()}
    assert not actual["grad input"].any()


@pytest.mark.parametrize("module", CELLS)
@pytest.mark.parametrize("missing", [("bias_ih", "bias_hh"), ("bias_ih",), ("bias_hh",)], ids=str)
def test_a_bias_taken_away_after_construction(
    backend: str, device: str, module: str, missing: tuple[str]
) -> None:
    case = Case(module, hx=True, device=device)
    ours, theirs = case.twins()
    for cell in (ours, theirs):
        for name in missing:
            setattr(cell, name, None)
    expected = run_on_cpu(case, theirs)
    for name, result in named_results(case, ours(*case.arguments(case.leaves()))).items():
        torch.testing.assert_close(result.cpu(), expected[name])


def test_the_nonlinearity_is_read_at_each_call(backend: str, device: str) -> None:
    case = Case("rnn_tanh_cell", hx=True, device=device)
    ours, theirs = case.twins()
    for nonlinearity in ("relu", "tanh"):
        ours.nonlinearity = theirs.nonlinearity = nonlinearity
        torch.testing.assert_close(
            ours(*case.arguments(case.leaves())), theirs(*case.arguments(case.leaves()))
        )


@pytest.mark.parametrize("module", CELLS)
def test_steps_of_a_cell_are_a_layer(backend: str, device: str, module: str) -> None:
    """States carried by hand through a loop, and gradients through it, as the layer's."""
    case = Case(module.removesuffix("_cell"), dtype=torch.float64, device=device)
    layer, _ = case.twins()
    cell = Case(module, dtype=torch.float64, device=device).make(rnnkit)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in layer.state_dict().items()})
    input = case.leaves()["input"]
    outputs, states = [], None
    for x in input:
        states = cell(x, states)
        outputs.append(states[0] if isinstance(states, tuple) else states)
    output = layer(input)[0]
    torch.testing.assert_close(torch.stack(outputs), output)
    torch.stack(outputs).square().sum().backward()
    output.square().sum().backward()
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(cell.get_parameter(name.removesuffix("_l0")).grad, weight.grad)
