"""What layers have and cells do not: the flat weights, the checks, the helpers of nn.RNNBase."""

from functools import partial
from typing import Any

import pytest
import torch
from configurations import LAYERS, Case, run
from devices import on_each_device
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit

CASES = [Case(name, num_layers=2, bidirectional=True) for name in LAYERS]
CASES += [
    Case("lstm", num_layers=2, bidirectional=True, proj_size=3),
    Case("lstm", num_layers=2, proj_size=3, bias=False),
    Case("gru", num_layers=2, bias=False, batch_first=True),
]


@pytest.mark.parametrize("case", on_each_device(CASES), ids=str)
def test_lists_of_weights(case: Case) -> None:
    ours, theirs = case.twins()
    for name in ("mode", "_all_weights", "_flat_weights_names"):
        assert getattr(ours, name) == getattr(theirs, name)
    for layer in (ours, theirs):
        assert all(
            weight is getattr(layer, name)
            for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
        )
    for weights, expected in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("case", on_each_device(CASES), ids=str)
def test_a_weight_set_as_an_attribute_is_used(backend: str, case: Case) -> None:
    ours, theirs = case.twins(dtype=torch.float64)
    for name in ours._flat_weights_names:
        replacement = torch.randn_like(getattr(ours, name))
        for layer in (ours, theirs):
            setattr(layer, name, nn.Parameter(replacement.clone()))
            assert layer._flat_weights[layer._flat_weights_names.index(name)] is getattr(
                layer, name
            )
        input = case.leaves(torch.float64)["input"]
        torch.testing.assert_close(ours(input), theirs(input))


@pytest.mark.parametrize("case", on_each_device(CASES), ids=str)
def test_flatten_parameters_and_apply_keep_the_weights(backend: str, case: Case) -> None:
    """Modules are moved, converted and flattened by frameworks; calls before and after agree."""
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    ours.flatten_parameters()
    ours.double().float().to(case.device).share_memory()
    ours._apply(lambda tensor: tensor.clone())
    assert all(
        weight is getattr(ours, name)
        for weight, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
    )
    for name, result in run(case, ours, case.leaves()).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expected_sizes_and_permutation(case: Case) -> None:
    ours, theirs = case.twins()
    input = torch.randn(case.shapes()["input"])
    packed = pack_padded_sequence(
        torch.randn(4, 7, case.input_size), [4, 3, 1, 1], batch_first=True
    )
    permutation = torch.tensor([2, 0, 1])
    states: Any = torch.randn(4, 3, 6)
    if "lstm" in case.module:
        states = states, torch.randn(4, 3, 6)
    for given, batch_sizes in ((input, None), (packed.data, packed.batch_sizes)):
        for method in ("get_expected_hidden_size", "get_expected_cell_size"):
            assert hasattr(ours, method) == hasattr(theirs, method)
            if hasattr(ours, method):
                assert getattr(ours, method)(given, batch_sizes) == getattr(theirs, method)(
                    given, batch_sizes
                )
        ours.check_input(given, batch_sizes)
    for order in (None, permutation):
        torch.testing.assert_close(
            ours.permute_hidden(states, order), theirs.permute_hidden(states, order)
        )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", ["check_input", "check_hidden_size", "check_forward_args"])
def test_checks_refuse_what_torch_s_refuse(case: Case, check: str) -> None:
    wrong: Any = torch.randn(9, 9, 9)
    arguments = {
        "check_input": (wrong, None),
        "check_hidden_size": (wrong, (1, 2, 3)),
        "check_forward_args": (
            torch.randn(case.shapes()["input"]),
            (wrong, wrong) if "lstm" in case.module else wrong,
            None,
        ),
    }[check]
    texts = []
    for layer in case.twins():
        with pytest.raises(RuntimeError) as caught:
            getattr(layer, check)(*arguments)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_subclass_may_override_the_checks(backend: str, name: str) -> None:
    """The layer calls its methods, not copies of them; with gradients and without."""

    class Refuses:
        def check_input(self, *args: Any) -> None:
            raise NotImplementedError("refused")

    class Checked(getattr(rnnkit, name)):  # type: ignore[misc]
        check_input = Refuses.check_input

    class Mixed(Refuses, getattr(rnnkit, name)):  # type: ignore[misc]
        pass

    class Later(Checked):
        pass

    class After(getattr(rnnkit, name)):  # type: ignore[misc]
        pass

    After.check_input = Refuses.check_input
    instance = getattr(rnnkit, name)(4, 6)
    instance.check_input = partial(Refuses.check_input, instance)
    for layer in (*(cls(4, 6) for cls in (Checked, Mixed, Later, After)), instance):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context, pytest.raises(NotImplementedError, match="refused"):
                layer(torch.randn(5, 3, 4))
