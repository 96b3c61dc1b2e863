"""The kernels of csrc/cpu and csrc/cuda through their ops: every size, dtype and layout against the reference."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from devices import on_each_device
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    STATES,
    Call,
    Case,
    assert_case_matches_reference,
    assert_matches_reference,
    assert_same_bits,
    call,
    cases,
    small_cases,
)
from torch import Tensor

from rnnkit import backends
from rnnkit.__main__ import _cpu
from rnnkit.call import Keep
from rnnkit.specs import CELLS, WEIGHTS

pytestmark = pytest.mark.skipif(
    backends.EXTENSION is None and backends.CUDA_REASON != "",
    reason=f"no C++ kernels: {backends.EXTENSION_REASON}; no CUDA kernels: {backends.CUDA_REASON}",
)

on_small_cases = pytest.mark.parametrize("case", on_each_device(small_cases()), ids=str)
on_small_cases_of_every_dtype = pytest.mark.parametrize(
    "case", on_each_device(case for dtype in DTYPES for case in small_cases(dtype)), ids=str
)


@pytest.mark.parametrize("case", on_each_device(cases()), ids=str)
def test_against_reference(case: Case) -> None:
    assert_case_matches_reference(case)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    cell = draw(st.sampled_from(sorted(CELLS)))
    steps, batch = draw(st.integers(1, 9)), draw(st.integers(0, 40))
    inputs, hidden = draw(st.integers(0, 70)), draw(st.integers(1, 70))
    ragged = draw(st.lists(st.integers(1, 9), max_size=40))
    return Case(
        cell,
        (steps, batch, inputs, hidden),
        directions=draw(st.integers(1, 2)),
        lengths=tuple(sorted(ragged, reverse=True)),
        projected=draw(st.integers(0, hidden - 1)) if cell == "lstm" else 0,
        bias=draw(st.booleans()),
        states=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@given(case=random_cases(), seed=st.integers(0, 2**31))
def test_random_cases(device: str, case: Case, seed: int) -> None:
    assert_matches_reference(call(replace(case, device=device), seed))


@pytest.mark.parametrize(
    "sizes", [(3, 2, 5, 0), (3, 0, 5, 4), (3, 2, 0, 4), (1, 0, 0, 0), (2, 0, 70, 130)]
)
@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(
    device: str, cell: str, dtype: torch.dtype, directions: int, sizes: tuple[int, int, int, int]
) -> None:
    case = Case(cell, sizes, directions, dtype=dtype, device=device)
    assert_matches_reference(call(case))
    assert_matches_reference(call(replace(case, heads=3)))
    assert_matches_reference(call(replace(case, heads=2, multiplies=False)))


@pytest.mark.parametrize("lengths", [(3, 2, 1), (2, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_is_each_sequence_alone(device: str, cell: str, lengths: tuple[int, ...]) -> None:
    it = call(Case(cell, (0, 0, 5, 4), 2, lengths, dtype=torch.float64, device=device))
    outputs, finals, _ = it.forward()
    assert it.batch_sizes is not None
    first_rows = it.batch_sizes.cumsum(0) - it.batch_sizes
    for n, length in enumerate(lengths):
        rows = first_rows[:length] + n
        states = [state[:, n : n + 1] for state in it.states]
        alone = replace(
            it, input=it.input[rows].unsqueeze(1), states=states, batch_sizes=None, grads=[]
        )
        (output_alone,), finals_alone, _ = alone.forward()
        torch.testing.assert_close(outputs[0][rows], output_alone[:, 0])
        torch.testing.assert_close([state[:, n : n + 1] for state in finals], finals_alone)


@on_small_cases_of_every_dtype
def test_what_is_kept_changes_no_bit(case: Case) -> None:
    it = call(case)
    outputs, finals, _ = it.forward()
    for keep in (Keep.NOTHING, Keep.STATES):
        outputs_alone, finals_alone, reserve = it.forward(keep)
        assert keep or reserve.numel() == 0
        assert_same_bits([*outputs, *finals], [*outputs_alone, *finals_alone])


@pytest.mark.parametrize(
    "case", on_each_device(c for c in cases() if c.dtype == torch.float32), ids=str
)
def test_gates_computed_again_against_reference(case: Case) -> None:
    assert_case_matches_reference(case, Keep.STATES)


@pytest.mark.parametrize("t", (1, 2, 64, 65, 66, 128, 129))
def test_one_reset_in_a_long_batch(device: str, t: int) -> None:
    """In the first and the last row of what the backward pass multiplies at once, and so wide that it reads y."""
    it = call(Case("rnn_tanh", (130, 3, 5, 16), 2, resets=1.0, reset_states=True, device=device))
    for row in (0, 2):
        reset = torch.zeros(130, 3, dtype=torch.bool)
        reset[t, row] = True
        assert_matches_reference(replace(it, reset=reset.to(device)))


def test_normalized_values_of_any_mean_and_size(device: str) -> None:
    """The variance is that of what is left of a large mean, and 0 of equal values."""
    it = call(Case("lstm", (2, 3, 4, 17), 2, device=device, norm=True))
    large = [w + 100 if w is not None and w.dim() == 2 else w for w in it.weights]
    equal = [torch.ones_like(w) if w is not None and w.dim() == 2 else w for w in it.weights]
    for weights in (large, equal):
        changed = replace(it, weights=weights)
        (output,), _, _ = changed.forward()
        truth = changed.to(torch.float64).on("cpu").reference()["output"]
        torch.testing.assert_close(output.cpu().double(), truth, rtol=2e-3, atol=2e-3)


def test_zoneout_selects(device: str) -> None:
    """What is kept comes through beside NaN, and an infinite gradient goes to one of its two parts."""
    it = call(Case("lstm", (1, 3, 4, 17), 2, zoneout=(0.5, 0.5), device=device))
    assert it.kept is not None
    every, nothing = torch.ones_like(it.kept), torch.zeros_like(it.kept)
    infinite = [torch.full_like(grad, torch.inf) for grad in it.grads if grad is not None]
    _, finals, _ = replace(it, input=it.input * torch.nan, kept=every).forward()
    all_kept = replace(it, grads=infinite, kept=every).run()
    none_kept = replace(it, grads=[*it.grads[:2], infinite[2]], kept=nothing).run()
    assert_same_bits(finals, [*it.states])
    assert not all_kept["grad w_hh"].any() and not all_kept["grad input"].any()
    assert all_kept["grad h_0"].isposinf().all() and all_kept["grad c_0"].isposinf().all()
    assert none_kept["grad c_0"].isposinf().all()


@pytest.mark.parametrize("cell", CELLS)
def test_gates_computed_again_are_the_same_to_the_last_bit(cell: str) -> None:
    it = call(Case(cell, (300, 3, 33, 40), directions=2))
    assert_same_bits(it.run(Keep.STATES), it.run())


@on_small_cases
def test_only_needed_gradients(case: Case) -> None:
    it = call(case)
    outputs, _, reserve = it.forward()
    full = it.backward(outputs, reserve)
    places = [place for place, need in enumerate(it.all_needs) if need]
    random = torch.Generator().manual_seed(0)
    wanted = [{place} for place in places] + [set(places) - {place} for place in places] + [set()]
    wanted += [
        {place for place in places if torch.rand((), generator=random) < 0.5} for _ in range(20)
    ]
    for want in wanted:
        found = it.backward(outputs, reserve, [place in want for place in range(len(it.all_needs))])
        assert_same_bits(
            found, [grad for place, grad in zip(places, full, strict=True) if place in want]
        )


@pytest.mark.parametrize("missing", ("b_ih", "b_hh"))
@on_small_cases
def test_one_bias_missing(case: Case, missing: str) -> None:
    it = call(replace(case, bias=True))
    weights = [
        None if place % len(it.kinds) == WEIGHTS.index(missing) else weight
        for place, weight in enumerate(it.weights)
    ]
    assert_matches_reference(replace(it, weights=weights))


@on_small_cases
def test_needing_what_is_not_there_gives_nothing(case: Case) -> None:
    it = call(replace(case, bias=False))
    outputs, _, reserve = it.forward()
    found = it.backward(outputs, reserve, [True] * len(it.all_needs))
    assert_same_bits(found, it.backward(outputs, reserve))


@on_small_cases
def test_missing_incoming_gradients_are_zero(case: Case) -> None:
    it = call(case)
    outputs, _, reserve = it.forward()
    for given_grads in product((True, False), repeat=len(it.grads)):
        grads = [g if keep else None for g, keep in zip(it.grads, given_grads, strict=True)]
        zeros = [g if keep else g * 0 for g, keep in zip(it.grads, given_grads, strict=True)]
        assert_same_bits(
            replace(it, grads=grads).backward(outputs, reserve),
            replace(it, grads=zeros).backward(outputs, reserve),
        )
        assert_matches_reference(replace(it, grads=grads))


@on_small_cases
def test_second_backward_is_the_same(case: Case) -> None:
    it = call(case)
    outputs, _, reserve = it.forward()
    assert_same_bits(it.backward(outputs, reserve), it.backward(outputs, reserve))


def _offset(tensor: Tensor) -> Tensor:
    """One element into its memory, so that no vector load is aligned."""
    room = tensor.new_full((tensor.numel() + 2,), _poison(tensor))
    return room[1:-1].view(tensor.shape).copy_(tensor)


def _spread(tensor: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor."""
    room = tensor.new_full([2 * size + 1 for size in tensor.shape], _poison(tensor))
    return room[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)


def _turned(tensor: Tensor) -> Tensor:
    """Dimensions in memory the other way round."""
    back = tuple(reversed(range(tensor.dim())))
    return tensor.permute(back).contiguous().permute(back)


def _swapped(tensor: Tensor) -> Tensor:
    """The first two dimensions the other way round in memory, as of a batch-first tensor."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def _poison(tensor: Tensor) -> float:
    return math.nan if tensor.is_floating_point() else -1


LAYOUTS = (_offset, _spread, _turned, _swapped)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@on_small_cases_of_every_dtype
def test_layout_changes_no_bit(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    it = call(replace(case, sizes=(3, 3, 5, 7)))
    assert_same_bits(it.map(layout).run(), it.run())


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@on_small_cases
def test_layout_of_what_the_forward_saved(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    it = call(case)
    outputs, _, reserve = it.forward()
    found = it.backward([layout(output) for output in outputs], layout(reserve))
    assert_same_bits(found, it.backward(outputs, reserve))


@on_small_cases
def test_expanded_tensors(case: Case) -> None:
    """Strides of zero, as `output.sum().backward()` makes them."""
    it = call(case).map(lambda t: t if t.dtype == torch.int64 else t[:1].expand_as(t))
    assert_same_bits(it.run(), it.map(Tensor.clone).run())
    it = replace(it, grads=[g[(0,) * g.dim()].expand_as(g) for g in it.grads if g is not None])
    assert_same_bits(it.run(), it.map(Tensor.clone).run())


@on_small_cases_of_every_dtype
def test_arguments_are_only_read(case: Case) -> None:
    it = call(case)
    before = it.map(Tensor.clone)
    outputs, _, reserve = it.forward()
    saved = [tensor.clone() for tensor in (*outputs, reserve)]
    it.backward(outputs, reserve)
    assert_same_bits(it.every_tensor(), before.every_tensor())
    assert_same_bits([*outputs, reserve], saved)


@on_small_cases_of_every_dtype
def test_results_have_memory_of_their_own(case: Case) -> None:
    it = call(case)
    outputs, finals, reserve = it.forward()
    results = [*outputs, *finals, reserve, *it.backward(outputs, reserve)]
    memory = [tensor.untyped_storage().data_ptr() for tensor in [*results, *it.every_tensor()]]
    assert len(set(memory)) == len(memory)
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("value", "grad_clip"),
    ((math.nan, 0.0), (math.nan, 0.1), (math.inf, 0.0), (-math.inf, 0.0)),
)
@pytest.mark.parametrize("place", ("input", "state", "grad"))
@pytest.mark.parametrize("lengths", ((), (4, 4, 3, 2, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize("cell", CELLS)
def test_special_values_stay_in_their_row(
    device: str,
    cell: str,
    lengths: tuple[int, ...],
    place: str,
    value: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> None:
    """A NaN or infinity goes where the reference sends it, and into no other row of the batch."""
    it = call(Case(cell, (4, 5, 6, 19), 2, lengths, dtype=dtype, device=device))
    it = replace(it, grad_clip=grad_clip)
    clean = it.run()
    row = 2
    it = it.map(Tensor.clone)
    target = {"input": it.input, "state": it.states[-1], "grad": it.grads[0]}[place]
    assert target is not None
    if place == "state":
        target[:, row, 3] = value
    elif lengths:
        target[len(lengths) + row, 3] = value
    else:
        target[1, row, 3] = value
    results, expected = it.run(), it.reference()
    for name, result in results.items():
        if name.startswith("grad"):  # inf - inf or inf, as the formula is written
            assert torch.equal(result.isfinite(), expected[name].isfinite()), name
        else:
            torch.testing.assert_close(result, expected[name], rtol=5e-2, atol=5e-2, equal_nan=True)
    others = torch.arange(5) != row
    for name in (n for state in STATES for n in (f"{state}_n", f"grad {state}_0")):
        if name in results:
            assert_same_bits([results[name][:, others]], [clean[name][:, others]])
    if not lengths:
        assert_same_bits([results["output"][:, others]], [clean["output"][:, others]])
        assert_same_bits([results["grad input"][:, others]], [clean["grad input"][:, others]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_large_values(device: str, cell: str, dtype: torch.dtype) -> None:
    """Pre-activations of ±1e4 saturate; no exponential overflows into NaN."""
    it = call(Case(cell, (1, 9, 17, 33), 2, dtype=dtype, device=device))
    large = it.input.sign() * (1e4 if cell != "rnn_relu" else 1e2)
    weights = [None if w is None else w.sign() if w.dim() == 2 else w for w in it.weights]
    it = replace(it, input=large, weights=weights)
    results = it.run()
    assert all(result.isfinite().all() for result in results.values())
    assert_matches_reference(it, results)


@pytest.mark.parametrize("place", ("input", "states", "weights", "grads"))
@pytest.mark.parametrize("cell", CELLS)
def test_denormals(device: str, cell: str, place: str) -> None:
    it = call(Case(cell, (3, 5, 17, 33), 2, device=device))
    tiny = it.map(lambda t: t if t.dim() == 1 else torch.full_like(t, 1e-40))  # biases stay
    it = replace(it, **{place: getattr(tiny, place)})
    torch.testing.assert_close(it.run(), it.reference(), rtol=1e-4, atol=1e-5)


LSTM = Case("lstm", (3, 4, 5, 6), 2, projected=2)
GIVEN = Case("lstm", (3, 2, 5, 6), heads=2, multiplies=False)
NORMALIZED = Case("lstm", (3, 4, 5, 6), 2, norm=True)
RAGGED = Case("gru", (0, 0, 5, 6), 1, (3, 2, 2, 1))
MASKED = Case(
    "lstm",
    (3, 4, 5, 6),
    2,
    resets=0.3,
    reset_states=True,
    operand_mask=True,
    zoneout=(0.2, 0.3),
)

Change = Callable[[Call], dict]


def _replaced(tensors: list, place: int, tensor: object) -> list:
    return [tensor if index == place else old for index, old in enumerate(tensors)]


def _with(name: str, place: int, change: Callable[[Tensor], Tensor | None]) -> Change:
    """Changes one tensor of one of the call's lists."""
    return lambda it: {name: _replaced(getattr(it, name), place, change(getattr(it, name)[place]))}


def _batch_sizes(*sizes: int, dtype: torch.dtype = torch.int64) -> Change:
    return lambda _: {"batch_sizes": torch.tensor(sizes, dtype=dtype)}


def _narrower(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


def _shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


# fmt: off
#: A call, what to change in it, and the text of the error that every backend then raises.
BAD_CALLS: dict[str, tuple[Case, Change, str]] = {
    "cell unknown": (LSTM, lambda _: {"cell": "lstmm"}, "expected cell to be the name of a cell, got 'lstmm'"),
    "cell empty": (LSTM, lambda _: {"cell": ""}, "expected cell to be the name of a cell, got ''"),
    "cell with other gates": (LSTM, lambda _: {"cell": "gru"}, "expected w_hr to be None for gru, got shape [2, 6]"),
    "input without steps": (LSTM, lambda it: {"input": it.input[:0]},
        "expected input to have at least 1 step, got shape [0, 4, 5]"),
    "input 2-D": (LSTM, lambda it: {"input": it.input[0]}, "expected input to have 3 dimensions, got 2"),
    "input 4-D": (LSTM, lambda it: {"input": it.input[None]}, "expected input to have 3 dimensions, got 4"),
    "input narrow": (LSTM, lambda it: {"input": _narrower(it.input)},
        "expected w_ih of direction 0 of shape [24, 4], got [24, 5]"),
    "input of another dtype": (LSTM, lambda it: {"input": it.input.double()},
        "expected w_ih of direction 0 to be torch.float64 like the input, got torch.float32"),
    "input of integers": (LSTM, lambda it: {"input": it.input.long()},
        "expected input to be floating-point, got torch.int64"),
    "every tensor of integers": (LSTM, lambda it: vars(it.map(Tensor.long)),
        "expected input to be floating-point, got torch.int64"),
    "every tensor complex": (LSTM, lambda it: vars(it.to(torch.complex64)),
        "expected input to be floating-point, got torch.complex64"),
    "states missing one": (LSTM, lambda it: {"states": it.states[:1]}, "expected hx to hold 2 states or none, got 1"),
    "states one too many": (LSTM, lambda it: {"states": [*it.states, it.states[0]]},
        "expected hx to hold 2 states or none, got 3"),
    "state narrow": (LSTM, _with("states", 1, _narrower), "expected hx[1] of shape [2, 4, 6], got [2, 4, 5]"),
    "state of fewer rows": (LSTM, _with("states", 1, lambda s: s[:, 1:]),
        "expected hx[1] of shape [2, 4, 6], got [2, 3, 6]"),
    "state of one direction": (LSTM, _with("states", 0, _shorter), "expected hx[0] of shape [2, 4, 2], got [1, 4, 2]"),
    "state 2-D": (LSTM, _with("states", 0, lambda s: s[0]), "expected hx[0] of shape [2, 4, 2], got [4, 2]"),
    "state of another dtype": (LSTM, _with("states", 1, Tensor.double),
        "expected hx[1] to be torch.float32 like the input, got torch.float64"),
    "grad_clip negative": (LSTM, lambda _: {"grad_clip": -0.5}, "expected grad_clip to be at least 0, got -0.5"),
    "grad_clip NaN": (LSTM, lambda _: {"grad_clip": math.nan}, "expected grad_clip to be at least 0, got nan"),
    "grad_cut negative": (LSTM, lambda _: {"grad_cut": -1}, "expected grad_cut to be at least 0, got -1"),
    "weights none": (LSTM, lambda _: {"weights": []},
        "expected weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 0"),
    "weights missing two": (LSTM, lambda it: {"weights": it.weights[:-2]},
        "expected weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 8"),
    "weights of more norms": (NORMALIZED, lambda it: {"weights": it.weights[:-1]},
        "expected weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 17"),
    "norm_c absent": (NORMALIZED, _with("weights", 7, lambda _: None),
        "expected norm_c of direction 0 to be a tensor for lstm, got None"),
    "norm_hh absent": (NORMALIZED, _with("weights", 15, lambda _: None),
        "expected norm_hh of direction 1 to be a tensor for lstm, got None"),
    "norm_c of a GRU": (replace(NORMALIZED, cell="gru"), _with("weights", 7, lambda _: torch.ones(6)),
        "expected norm_c of direction 0 to be None for gru, got a tensor"),
    "norm_ih narrow": (NORMALIZED, _with("weights", 5, lambda w: w[1:]),
        "expected norm_ih of direction 0 of shape [24], got [23]"),
    "norm_c_bias of another dtype": (NORMALIZED, _with("weights", 17, Tensor.double),
        "expected norm_c_bias of direction 1 to be torch.float32 like the input, got torch.float64"),
    "weights of three directions": (LSTM, lambda it: {"weights": it.weights + it.weights[:5]},
        "expected weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 15"),
    "w_ih absent": (LSTM, _with("weights", 0, lambda _: None),
        "expected w_ih in all directions or in none, got it in direction 1 alone"),
    "w_ih absent in the second direction": (LSTM, _with("weights", 5, lambda _: None),
        "expected w_ih in all directions or in none, got it in direction 0 alone"),
    "no w_ih and a narrow input": (GIVEN, lambda it: {"input": it.input[..., :-1]},
        "expected input without w_ih to have the 48 input parts of all gates, got shape [3, 2, 47]"),
    "heads zero": (LSTM, lambda _: {"heads": 0}, "expected heads to be at least 1, got 0"),
    "weights of other heads": (GIVEN, lambda _: {"heads": 3},
        "expected weights to hold 5 tensors, or 9 with layer normalization, for each of 3 heads of 1 or 2 directions, "
        "got 10"),
    "w_hh absent": (LSTM, _with("weights", 1, lambda _: None), "expected w_hh of direction 0 to be a tensor, got None"),
    "w_ih narrow": (LSTM, _with("weights", 0, _narrower), "expected w_ih of direction 0 of shape [24, 5], got [24, 4]"),
    "w_ih short": (LSTM, _with("weights", 0, _shorter), "expected w_ih of direction 0 of shape [24, 5], got [23, 5]"),
    "w_ih 1-D": (LSTM, _with("weights", 0, _flat), "expected w_ih of direction 0 to have 2 dimensions, got 1"),
    "w_hh narrow": (LSTM, _with("weights", 1, _narrower), "expected w_hr of direction 0 of shape [1, 6], got [2, 6]"),
    "w_hh rows not gates times hidden": (LSTM, _with("weights", 1, _shorter),
        "expected w_hh of direction 0 to have a multiple of 4 rows, got 23"),
    "w_hh 1-D": (LSTM, _with("weights", 1, _flat), "expected w_hh of direction 0 to have 2 dimensions, got 1"),
    "w_hh without projection": (LSTM, _with("weights", 4, lambda _: None),
        "expected w_hh of direction 0 of shape [24, 6], got [24, 2]"),
    "b_ih short": (LSTM, _with("weights", 2, _shorter), "expected b_ih of direction 0 of shape [24], got [23]"),
    "b_hh 2-D": (LSTM, _with("weights", 3, lambda b: b[None]),
        "expected b_hh of direction 0 of shape [24], got [1, 24]"),
    "w_hr narrow": (LSTM, _with("weights", 4, _narrower), "expected w_hr of direction 0 of shape [2, 6], got [2, 5]"),
    "w_hr short": (LSTM, _with("weights", 4, _shorter), "expected w_hr of direction 0 of shape [2, 6], got [1, 6]"),
    "second direction's w_hh narrow": (LSTM, _with("weights", 6, _narrower),
        "expected w_hh of direction 1 of shape [24, 2], got [24, 1]"),
    "second direction's w_hr absent": (LSTM, _with("weights", 9, lambda _: None),
        "expected w_hr in all directions or in none, got it in direction 0 alone"),
    "weight of another dtype": (LSTM, _with("weights", 5, Tensor.bfloat16),
        "expected w_ih of direction 1 to be torch.float32 like the input, got torch.bfloat16"),
    "packed input 3-D": (RAGGED, lambda it: {"input": it.input[None]}, "expected input to have 2 dimensions, got 3"),
    "packed state of fewer rows": (RAGGED, _with("states", 0, lambda s: s[:, 1:]),
        "expected hx[0] of shape [1, 4, 6], got [1, 3, 6]"),
    "batch_sizes empty": (RAGGED, lambda it: {"batch_sizes": it.batch_sizes[:0]},
        "expected batch_sizes to sum to the input's 8 rows, got 0"),
    "batch_sizes too short": (RAGGED, _batch_sizes(4, 3), "expected batch_sizes to sum to the input's 8 rows, got 7"),
    "batch_sizes too long": (RAGGED, _batch_sizes(4, 3, 1, 1),
        "expected batch_sizes to sum to the input's 8 rows, got 9"),
    "batch_sizes increasing": (RAGGED, _batch_sizes(3, 4, 1),
        "expected batch_sizes to be positive and not to increase, got 4 after 3 at step 1"),
    "batch_sizes negative": (RAGGED, _batch_sizes(6, 3, -1),
        "expected batch_sizes to be positive and not to increase, got -1 after 3 at step 2"),
    "batch_sizes zero": (RAGGED, _batch_sizes(4, 4, 0),
        "expected batch_sizes to be positive and not to increase, got 0 after 4 at step 2"),
    "batch_sizes overflowing": (RAGGED, _batch_sizes(2**62, 2**62, 2**62, 2**62),
        "expected batch_sizes to sum to the input's 8 rows, got 18446744073709551616"),
    "batch_sizes 2-D": (RAGGED, lambda it: {"batch_sizes": it.batch_sizes[None]},
        "expected batch_sizes to be an int64 vector on the CPU, got torch.int64 of shape [1, 3] on cpu"),
    "batch_sizes of int32": (RAGGED, _batch_sizes(4, 3, 1, dtype=torch.int32),
        "expected batch_sizes to be an int64 vector on the CPU, got torch.int32 of shape [3] on cpu"),
    "batch_sizes of floats": (RAGGED, _batch_sizes(4, 3, 1, dtype=torch.float32),
        "expected batch_sizes to be an int64 vector on the CPU, got torch.float32 of shape [3] on cpu"),
    "reset of integers": (MASKED, lambda it: {"reset": it.reset.int()},
        "expected reset to be bool of shape [3, 4], got torch.int32 of shape [3, 4]"),
    "reset short": (MASKED, lambda it: {"reset": _shorter(it.reset)},
        "expected reset to be bool of shape [3, 4], got torch.bool of shape [2, 4]"),
    "reset of another layout": (MASKED, lambda it: {"reset": it.reset.t()},
        "expected reset to be bool of shape [3, 4], got torch.bool of shape [4, 3]"),
    "packed reset short": (replace(RAGGED, resets=0.3), lambda it: {"reset": _shorter(it.reset)},
        "expected reset to be bool of shape [8], got torch.bool of shape [7]"),
    "reset_to without reset": (MASKED, lambda _: {"reset": None}, "expected hx to hold 2 states or none, got 4"),
    "reset_to missing one": (MASKED, lambda it: {"states": it.states[:3]},
        "expected hx to hold 2 states, twice as many with those to reset to, or none, got 3"),
    "reset_to narrow": (MASKED, _with("states", 3, _narrower),
        "expected reset_to[1] of shape [2, 4, 6], got [2, 4, 5]"),
    "reset_to of another dtype": (MASKED, _with("states", 2, Tensor.double),
        "expected reset_to[0] to be torch.float32 like the input, got torch.float64"),
    "operand_mask narrow": (MASKED, lambda it: {"operand_mask": _narrower(it.operand_mask)},
        "expected operand_mask of shape [2, 4, 6], got [2, 4, 5]"),
    "operand_mask of bool": (MASKED, lambda it: {"operand_mask": it.operand_mask.bool()},
        "expected operand_mask to be torch.float32 like the input, got torch.bool"),
    "zoneout of one state": (MASKED, lambda _: {"zoneout": (0.2,)},
        "expected zoneout to be 2 probabilities or none, got [0.2]"),
    "zoneout of three states": (MASKED, lambda _: {"zoneout": (0.2, 0.3, 0.0)},
        "expected zoneout to be 2 probabilities or none, got [0.2, 0.3, 0.0]"),
    "zoneout negative": (MASKED, lambda _: {"zoneout": (-0.2, 0.3), "kept": None},
        "expected zoneout to be 2 probabilities or none, got [-0.2, 0.3]"),
    "zoneout above 1": (MASKED, lambda _: {"zoneout": (0.2, 1.5)},
        "expected zoneout to be 2 probabilities or none, got [0.2, 1.5]"),
    "zoneout NaN": (MASKED, lambda _: {"zoneout": (math.nan, 0.3), "kept": None},
        "expected zoneout to be 2 probabilities or none, got [nan, 0.3]"),
    "zoneout of a projected h": (LSTM, lambda _: {"zoneout": (0.2, 0.0)},
        "expected zoneout of h to be 0 with a projection, got [0.2, 0.0]"),
    "kept missing one": (MASKED, lambda it: {"kept": it.kept[:1]},
        "expected kept to be bool of shape [2, 3, 4, 12], got torch.bool of shape [1, 3, 4, 12]"),
    "kept where zoneout is 0": (MASKED, lambda _: {"zoneout": (0.2, 0.0)},
        "expected kept to be bool of shape [1, 3, 4, 12], got torch.bool of shape [2, 3, 4, 12]"),
    "kept without zoneout": (MASKED, lambda _: {"zoneout": ()}, "expected zoneout to be given with kept, got none"),
    "kept of integers": (MASKED, lambda it: {"kept": it.kept.int()},
        "expected kept to be bool of shape [2, 3, 4, 12], got torch.int32 of shape [2, 3, 4, 12]"),
    "kept narrow": (MASKED, lambda it: {"kept": _narrower(it.kept)},
        "expected kept to be bool of shape [2, 3, 4, 12], got torch.bool of shape [2, 3, 4, 11]"),
    "kept of c as wide as a projected h": (replace(LSTM, zoneout=(0.0, 0.3)), lambda it: {"kept": it.kept[..., :4]},
        "expected kept to be bool of shape [1, 3, 4, 12], got torch.bool of shape [1, 3, 4, 4]"),
}

#: As `BAD_CALLS`, with changes to what only the backward pass is given: (grads, output, reserve, needs, keep).
BAD_BACKWARDS: dict[str, tuple[Case, Callable, str]] = {
    "grads missing one": (LSTM, lambda g, o, r, n, k: (g[:-1], o, r, n, k),
        "expected grads of 1 outputs and of 2 final states, got 2"),
    "grads one too many": (LSTM, lambda g, o, r, n, k: ([*g, None], o, r, n, k),
        "expected grads of 1 outputs and of 2 final states, got 4"),
    "grad of output narrow": (LSTM, lambda g, o, r, n, k: ([g[0][..., 1:], *g[1:]], o, r, n, k),
        "expected grads[0] of shape [3, 4, 4], got [3, 4, 3]"),
    "grad of output of another dtype": (LSTM, lambda g, o, r, n, k: ([g[0].double(), *g[1:]], o, r, n, k),
        "expected grads[0] to be torch.float32 like the input, got torch.float64"),
    "grad of state short": (LSTM, lambda g, o, r, n, k: ([g[0], g[1][:1], g[2]], o, r, n, k),
        "expected grads[1] of shape [2, 4, 2], got [1, 4, 2]"),
    "grad of packed output short": (RAGGED, lambda g, o, r, n, k: ([g[0][1:], g[1]], o, r, n, k),
        "expected grads[0] of shape [8, 6], got [7, 6]"),
    "output narrow": (LSTM, lambda g, o, r, n, k: (g, o[..., 1:], r, n, k),
        "expected output of shape [3, 4, 4], got [3, 4, 3]"),
    "output short": (LSTM, lambda g, o, r, n, k: (g, o[1:], r, n, k),
        "expected output of shape [3, 4, 4], got [2, 4, 4]"),
    "output of another dtype": (LSTM, lambda g, o, r, n, k: (g, o.double(), r, n, k),
        "expected output to be torch.float32 like the input, got torch.float64"),
    "reserve empty": (LSTM, lambda g, o, r, n, k: (g, o, r.flatten()[:0], n, k),
        "expected reserve to be torch.float32 of shape [2, 12, 5, 6], got torch.float32 of shape [0]"),
    "reserve short": (LSTM, lambda g, o, r, n, k: (g, o, r[:, 1:], n, k),
        "expected reserve to be torch.float32 of shape [2, 12, 5, 6], got torch.float32 of shape [2, 11, 5, 6]"),
    "reserve of another dtype": (LSTM, lambda g, o, r, n, k: (g, o, r.double(), n, k),
        "expected reserve to be torch.float32 of shape [2, 12, 5, 6], got torch.float64 of shape [2, 12, 5, 6]"),
    "needs missing one": (LSTM, lambda g, o, r, n, k: (g, o, r, n[:-1], k),
        "expected needs to have 13 entries, got 12"),
    "needs one too many": (LSTM, lambda g, o, r, n, k: (g, o, r, [*n, True], k),
        "expected needs to have 13 entries, got 14"),
    "needs empty": (LSTM, lambda g, o, r, n, k: (g, o, r, [], k), "expected needs to have 13 entries, got 0"),
    "keep of another reserve": (LSTM, lambda g, o, r, n, k: (g, o, r, n, Keep.STATES),
        "expected reserve to be torch.float32 of shape [2, 12, 1, 6], got torch.float32 of shape [2, 12, 5, 6]"),
    "keep nothing": (LSTM, lambda g, o, r, n, k: (g, o, r, n, Keep.NOTHING), "expected keep to be 1 or 2, got 0"),
    "keep nothing, no reserve": (LSTM, lambda g, o, r, n, k: (g, o, r[0, 0, 0, :0], n, Keep.NOTHING),
        "expected keep to be 1 or 2, got 0"),
    "keep of no name": (LSTM, lambda g, o, r, n, k: (g, o, r, n, 3), "expected keep to be 1 or 2, got 3"),
}
# fmt: on


def refused(text: str) -> AbstractContextManager[object]:
    """The block raises a RuntimeError with this text."""
    return pytest.raises(RuntimeError, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_are_refused(device: str, what: str) -> None:
    case, change, text = BAD_CALLS[what]
    it = call(replace(case, device=device))
    outputs, _, reserve = it.forward()
    bad = replace(it, **change(it))
    for run in (bad.forward, lambda: bad.backward(outputs, reserve)):
        with refused(text):
            run()
    assert_matches_reference(it)


@pytest.mark.parametrize("what", BAD_BACKWARDS)
def test_bad_backward_calls_are_refused(device: str, what: str) -> None:
    case, change, text = BAD_BACKWARDS[what]
    it = call(replace(case, device=device))
    outputs, _, reserve = it.forward()
    given = (it.grads, outputs[0], reserve, it.all_needs, Keep.EVERYTHING)
    grads, output, reserve, needs, keep = change(*given)
    with refused(text):
        replace(it, grads=grads).backward([output], reserve, needs, keep)


def test_kernels_are_for_this_cpu() -> None:
    """What torch may use, they do, so that ATEN_CPU_CAPABILITY lowers both."""
    expected = {"AVX512": "avx512", "AVX2": "avx2"}
    of_torch = torch.backends.cpu.get_cpu_capability()
    assert backends.EXTENSION.capability() == expected.get(of_torch, "baseline")


def test_cells_are_the_reference_s() -> None:
    specs = [
        (s.name, s.gates, s.states, s.saved, [*s.input_grads], s.projects, s.has_source)
        for s in CELLS.values()
    ]
    assert backends.EXTENSION.cells() == specs


def passes(tests: str, **environment: str) -> None:
    """These tests of this file pass in a process that has this environment."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__, "-k", tests],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    closing = run.stdout.splitlines()[-1]
    assert "passed" in closing and "skipped" not in closing, closing


@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_other_cpu_capabilities(capability: str) -> None:
    """The kernels that a lesser processor would run pass a part of these tests."""
    tests = "test_against_reference and D2 and float32 or test_large_values or test_kernels_are_for_this_cpu"
    passes(tests, ATEN_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("way", ("direct", "float"))
def test_bfloat16_either_way(way: str) -> None:
    """Multiplied directly, where this CPU can, and as float, whichever is the faster on it."""
    passes(
        "test_against_reference and bfloat16 or test_special_values or test_bfloat16_is_multiplied",
        RNNKIT_BFLOAT16=way,
    )


def multiplies_pairs() -> bool:
    """Whether this CPU, with what it is held to, has instructions for bfloat16."""
    features = _cpu()["features"]
    assert isinstance(features, list)
    return backends.EXTENSION.capability() == "avx512" and "avx512_bf16" in features


def test_a_choice_that_is_none() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import torch, rnnkit._C as c; print(c.multiplies_bfloat16())"],
        env={**os.environ, "RNNKIT_BFLOAT16": "both", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    error = "expected RNNKIT_BFLOAT16 to be direct or float, got both"
    assert (error in told.stderr) == multiplies_pairs()
    assert multiplies_pairs() or told.stdout.strip() == "False"  # where there is no choice


def test_bfloat16_is_multiplied_as_chosen() -> None:
    """Else as float where the CPU has AMX, directly on others that can."""
    features = _cpu()["features"]
    assert isinstance(features, list)
    chosen = os.environ.get("RNNKIT_BFLOAT16", "float" if "amx_bf16" in features else "direct")
    assert backends.EXTENSION.multiplies_bfloat16() == (multiplies_pairs() and chosen == "direct")


@pytest.mark.parametrize("cell", CELLS)
def test_lazily_negated_tensors(device: str, cell: str) -> None:
    it = call(Case(cell, (3, 4, 5, 6), 2, device=device))
    negated = it.map(lambda t: t if t.dtype == torch.int64 else torch._neg_view(-t))
    for name, result in negated.run().items():
        torch.testing.assert_close(result, it.run()[name], msg=name)
