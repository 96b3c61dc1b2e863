"""Layers × directions × packed sequences × dropout: numbers, shapes and memory, as torch.nn's."""

import random

import hypothesis
import pytest
import torch
from configurations import (
    DTYPES,
    LAYERS,
    MODULES,
    SIZES,
    STACKED,
    Case,
    compare,
    covering_cases,
    named_results,
    run,
    run_on_cpu,
    tensors_of,
    valid_case,
)
from devices import on_each_device
from hypothesis import strategies
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import rnnkit

on_stacked = pytest.mark.parametrize("case", on_each_device(STACKED), ids=str)


@pytest.mark.parametrize("case", on_each_device(covering_cases(MODULES)), ids=str)
def test_results_and_gradients(backend: str, case: Case) -> None:
    compare(case)


@strategies.composite
def random_cases(draw: strategies.DrawFn) -> Case:
    """Any case; sizes lie close to where kernels change their ways, mostly small."""
    sizes = strategies.one_of(strategies.integers(1, 9), strategies.sampled_from(SIZES))
    fields = {
        "module": draw(strategies.sampled_from(list(MODULES))),
        "steps": draw(strategies.integers(1, 12)),
        "batch": draw(strategies.none() | sizes),
        "input_size": draw(sizes),
        "hidden_size": draw(sizes),
        "num_layers": draw(strategies.integers(1, 3)),
        "bias": draw(strategies.booleans()),
        "batch_first": draw(strategies.booleans()),
        "bidirectional": draw(strategies.booleans()),
        "proj_size": draw(strategies.integers(0, 3)),
        "hx": draw(strategies.booleans()),
    }
    # A sum of few terms may cancel, and then only float64 has digits left to compare.
    few_terms = min(fields["batch"] or 1, fields["input_size"], fields["hidden_size"]) < 3
    fields["dtype"] = torch.float64 if few_terms else draw(strategies.sampled_from(DTYPES))
    rng = random.Random(draw(strategies.integers(0, 99)))
    return valid_case(draw(strategies.booleans()), rng, **fields)


@hypothesis.given(case=random_cases())
def test_random_configuration(backend: str, device: str, case: Case) -> None:
    torch.manual_seed(0)
    compare(case.on(device))


# Packed sequences


@on_stacked
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (4, 4), (1, 1, 1), (7,)], ids=str)
def test_a_packed_batch_is_its_sequences_one_by_one(
    backend: str, case: Case, enforce_sorted: bool, lengths: tuple[int, ...]
) -> None:
    """So the reverse direction starts at each one's own end, and states go in and out in user order."""
    ours, _ = case.twins(dtype=torch.float64)
    if not enforce_sorted:
        lengths = lengths[::-1]
    options = {"dtype": torch.float64, "device": case.device}
    sequences = [torch.randn(length, case.input_size, **options) for length in lengths]
    shapes = [(4, len(lengths), case.proj_size or 6), (4, len(lengths), 6)]
    hx = tuple(torch.randn(shape, **options) for shape in shapes)[: 1 + ("lstm" in case.module)]

    def call(input: torch.Tensor | PackedSequence, states: tuple[torch.Tensor, ...]) -> tuple:
        output, finals = ours(input, states if len(states) == 2 else states[0])
        return output, finals if len(states) == 2 else (finals,)

    packed, finals = call(pack_sequence(sequences, enforce_sorted), hx)
    outputs, returned_lengths = pad_packed_sequence(packed)
    assert tuple(returned_lengths) == lengths
    for n, sequence in enumerate(sequences):
        alone, alone_finals = call(sequence, tuple(state[:, n] for state in hx))
        torch.testing.assert_close(outputs[: lengths[n], n], alone)
        for state, alone_state in zip(finals, alone_finals, strict=True):
            torch.testing.assert_close(state[:, n], alone_state)


@on_stacked
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_output_keeps_batch_sizes_and_indices(
    backend: str, case: Case, enforce_sorted: bool
) -> None:
    ours, theirs = case.twins()
    padded = torch.randn(5, 3, case.input_size, device=case.device)
    packed = pack_padded_sequence(padded, torch.tensor([5, 4, 2]), enforce_sorted=enforce_sorted)
    output, expected = ours(packed)[0], theirs(packed)[0]
    assert isinstance(output, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        given, kept = getattr(packed, field), getattr(output, field)
        assert kept is given
        assert (given is None) == (getattr(expected, field) is None)


# What a call takes and gives


@on_stacked
@pytest.mark.parametrize("module", ["layer", "cell"])
def test_states_are_given_in_any_of_torch_s_ways(backend: str, case: Case, module: str) -> None:
    if module == "cell":
        case = Case(f"{case.module}_cell", hx=True, device=case.device)
    ours, theirs = case.twins()
    leaves = case.leaves()
    input, hx = case.arguments(leaves)
    expected = tensors_of(ours(input, hx))
    calls = {"keywords": lambda m: m(input=input, hx=hx), "keyword": lambda m: m(input, hx=hx)}
    if "cx" in leaves:
        calls["list"] = lambda m: m(input, list(hx))
    for way, call in calls.items():
        for result, same in zip(tensors_of(call(ours)), expected, strict=True):
            assert torch.equal(result, same), way
        assert [type(r) for r in call(ours)] == [type(r) for r in call(theirs)], way
    zeros = case.arguments({name: torch.zeros_like(leaf) for name, leaf in leaves.items()})[1]
    for way in (ours(input), ours(input, None)):
        for result, same in zip(tensors_of(way), tensors_of(ours(input, zeros)), strict=True):
            assert torch.equal(result, same)


EDGES = [
    *(Case(name, batch=0, hx=hx) for name in MODULES for hx in (False, True)),
    *(Case(name, batch=0, num_layers=2, bidirectional=True) for name in LAYERS),
    *(Case(name, steps=1, batch=1, bidirectional=True, hx=True) for name in LAYERS),
    *(Case(name, steps=1, batch=None, num_layers=2) for name in LAYERS),
    Case("lstm", batch=0, proj_size=2),
]


@pytest.mark.parametrize("case", on_each_device(EDGES), ids=str)
def test_an_empty_batch_or_a_single_step(backend: str, case: Case) -> None:
    ours, theirs = case.twins()
    actual, expected = run(case, ours, case.leaves()), run_on_cpu(case, theirs)
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        torch.testing.assert_close(
            result.cpu(), expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )


# Memory


def _strided(values: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor equal to `values`, laid out in memory in another way."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        larger = values.new_full([2 * size + 1 for size in values.shape], torch.nan)
        window = larger[tuple(slice(1, None, 2) for _ in values.shape)]
        return window.copy_(values)
    return values[:, :1].expand_as(values)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("module", MODULES)
def test_strided_input_and_states(backend: str, device: str, module: str, layout: str) -> None:
    stack = {"bidirectional": module in LAYERS}
    case = Case(module, hx=True, dtype=torch.float64, device=device, **stack)
    ours, theirs = case.twins()
    results = []
    for package in (ours, theirs):
        leaves = case.leaves()
        strided = {
            name: _strided(leaf.detach(), layout).requires_grad_() for name, leaf in leaves.items()
        }
        assert not any(leaf.is_contiguous() for leaf in strided.values())
        if package is theirs and device == "cuda":  # cuDNN refuses such states
            strided = {
                name: leaf.detach().contiguous().requires_grad_() for name, leaf in strided.items()
            }
        results.append(run(case, package, strided))
    for name, result in results[0].items():
        torch.testing.assert_close(
            result, results[1][name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_strided_weights(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    for name, weight in ours.named_parameters():
        if weight.dim() == 2:
            setattr(ours, name, nn.Parameter(_strided(weight.detach(), "transposed")))
    for name, result in run(case, ours, case.leaves()).items():
        torch.testing.assert_close(
            result, expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "case",
    on_each_device(
        [
            *STACKED,
            *(Case(name, hx=True) for name in MODULES),
            *(Case(name, batch=None) for name in MODULES),
            *(Case(name, batch_first=True, dtype=d) for name in LAYERS for d in DTYPES[:2]),
            *(Case(name, lengths=(2, 5, 3), bidirectional=True) for name in LAYERS),
        ]
    ),
    ids=str,
)
def test_results_are_contiguous_as_torch_s_and_share_no_memory(
    backend: str, case: Case, grad: bool
) -> None:
    ours, theirs = case.twins()
    leaves = case.leaves()
    with torch.set_grad_enabled(grad):
        results, expected = (
            named_results(case, module(*case.arguments(leaves))) for module in (ours, theirs)
        )
    for name, result in results.items():
        assert result.is_contiguous() or not expected[name].is_contiguous(), name
        assert result.requires_grad == grad
    own, given = (
        [tensor.untyped_storage().data_ptr() for tensor in tensors]
        for tensors in (results.values(), [*leaves.values(), *ours.parameters()])
    )
    assert len(set(own) - set(given)) == len(own)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_share_no_memory(backend: str, device: str, module: str) -> None:
    """Else an in-place clip or an optimizer's step on one of them changes another."""
    case = Case(module, hx=True, device=device)
    if module in LAYERS:
        case = Case(module, hx=True, num_layers=2, bidirectional=True, device=device)
    ours, _ = case.twins()
    results = run(case, ours, case.leaves())
    storages = [tensor.untyped_storage().data_ptr() for tensor in results.values()]
    assert len(set(storages)) == len(storages)


# Dropout


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize("lengths", [None, (5, 2, 4)], ids=["dense", "packed"])
def test_full_dropout_cuts_the_layers_apart(
    backend: str, device: str, module: str, lengths: tuple[int, ...] | None
) -> None:
    """Dropout of 1 is not random: every layer but the first sees zeros, and the output is not dropped."""
    stack = {"num_layers": 3, "bidirectional": True}
    case = Case(module, dtype=torch.float64, lengths=lengths, device=device, **stack)
    ours, theirs = case.twins(dropout=1)
    actual, expected = run(case, ours, case.leaves()), run_on_cpu(case, theirs)
    for name, result in actual.items():
        torch.testing.assert_close(result.cpu(), expected[name])
    assert actual["output"].any()
    theirs.dropout = 0  # not `eval`, where cuDNN has no backward pass
    compare(case, ours.eval(), theirs)


@pytest.mark.parametrize("module", LAYERS)
def test_dropout_has_torch_s_distribution(backend: str, device: str, module: str) -> None:
    """Mean, deviation and the two steps' correlation of the output over many sequences, and of a gradient."""
    sizes = {"steps": 2, "batch": 5000, "input_size": 1, "hidden_size": 2}
    case = Case(module, num_layers=2, device=device, **sizes)
    statistics = []
    for layer in case.twins(dropout=0.4):
        for weight in layer.parameters():
            weight.data.abs_()  # so that no ReLU is idle
        input = torch.ones(case.shapes()["input"], device=device, requires_grad=True)
        output = layer(input)[0]
        output.sum().backward()
        samples = torch.cat([output[0], output[1], input.grad[0], input.grad[1]], -1).double().T
        assert (samples.std(1) > 0).all(), "every element, step and gradient is random"
        statistics.append((samples.mean(1), samples.std(1), torch.corrcoef(samples)))
    (mean, std, correlation), (their_mean, their_std, their_correlation) = statistics
    error = 5 * (2 / case.batch) ** 0.5  # five standard errors of a difference
    assert ((mean - their_mean).abs() < error * std).all()
    assert ((std / their_std - 1).abs() < error).all()
    assert ((correlation - their_correlation).abs() < error).all()


def test_dropout_draws_anew_and_only_in_training(backend: str, device: str) -> None:
    layer = Case("gru", num_layers=2, device=device).make(rnnkit, dropout=0.5)
    input = torch.randn(5, 3, 4, device=device)
    assert not torch.equal(layer(input)[0], layer(input)[0])
    torch.manual_seed(7)
    first = layer(input)[0]
    torch.manual_seed(7)
    assert torch.equal(first, layer(input)[0])
    layer.eval()
    assert torch.equal(layer(input)[0], layer(input)[0])
