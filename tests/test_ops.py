"""The ops as torch.library sees them: schema, fake results and functionalization, over every kind of call."""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import test_kernels
import torch
from devices import OpsOfGpu, on_each_device, on_gpu
from kernel_cases import Call, Case, call, small_cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import rnnkit
from rnnkit import ops
from rnnkit.call import Keep
from rnnkit.specs import CELLS, NORMS, WEIGHTS

on_small_cases = pytest.mark.parametrize(
    "case",
    on_each_device(
        case
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for case in small_cases(dtype)
    ),
    ids=str,
)


def described(results: tuple | list | Tensor) -> object:
    """Shape, strides, dtype and device of every tensor."""
    if isinstance(results, Tensor):
        return results.shape, results.stride(), results.dtype, results.device
    return [described(result) for result in results]


OPS = (torch.ops.rnnkit.layer_forward.default, torch.ops.rnnkit.layer_backward.default)


def arguments(it: Call, keep: Keep = Keep.EVERYTHING) -> tuple[list, list]:
    """Of both ops."""
    outputs, _, reserve = it.forward(keep)
    return (
        [*it.arguments, None, keep],
        [*it.backward_call(outputs, reserve, keep=keep).arguments],
    )


@pytest.mark.parametrize("case", [*small_cases(), *on_gpu(small_cases()[::2])], ids=str)
def test_opcheck(case: Case) -> None:
    pytest.importorskip("expecttest")
    it = call(case)
    forward, backward = arguments(it)
    opcheck(OPS[0], forward)
    opcheck(OPS[0], [*forward[:-1], Keep.NOTHING])
    opcheck(OPS[1], backward)
    for op, values in zip(OPS, arguments(it, Keep.STATES), strict=True):
        opcheck(op, values)
    packed = torch.ops.rnnkit.pack_weights(it.cell, it.weights)
    opcheck(OPS[0], [*it.arguments, packed, Keep.NOTHING])
    some = [need and place % 2 == 0 for place, need in enumerate(it.all_needs)]
    without_grads = [*it.grads[:1], *[None] * (len(it.grads) - 1)]
    outputs, _, reserve = it.forward()
    back = replace(it, grads=without_grads).backward_call(outputs, reserve, some, flow=True)
    opcheck(OPS[1], [*back.arguments])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("cell", ("rnn_relu", "lstm"))
def test_opcheck_in_other_dtypes(cell: str, dtype: torch.dtype) -> None:
    pytest.importorskip("expecttest")
    tolerances = {"rtol": 1e-2, "atol": 1e-2}
    forward, backward = arguments(call(Case(cell, dtype=dtype)))
    opcheck(OPS[0], forward, **tolerances)
    opcheck(OPS[1], backward, **tolerances)


@on_small_cases
def test_fakes_describe_the_results(case: Case) -> None:
    it = call(case)
    results = [it.forward(keep) for keep in Keep]
    back = it.backward_call(results[-1][0], results[-1][2], flow=True)
    grads = ops.layer_backward(back)
    with FakeTensorMode() as mode:
        fake = it.map(mode.from_tensor)
        fake_results = [fake.forward(keep) for keep in Keep]
        fake_grads = fake.backward(fake_results[-1][0], fake_results[-1][2], flow=True)
    assert described(fake_results) == described(results)
    assert described(fake_grads) == described(grads)
    count = sum(it.all_needs)
    assert len(grads) == count + it.spec.states
    assert described(ops.backward_composite(back)[count:]) == described(grads[count:])


@pytest.mark.parametrize("sizes", [(3, 0, 5, 4), (3, 2, 0, 4), (3, 2, 5, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_fakes_of_empty_results(device: str, cell: str, sizes: tuple[int, int, int, int]) -> None:
    it = call(Case(cell, sizes, 2, device=device))
    results = it.forward()
    with FakeTensorMode() as mode:
        fake = it.map(mode.from_tensor)
        fake_results = fake.forward()
        fake_grads = fake.backward(fake_results[0], fake_results[2])
    assert described(fake_results) == described(results)
    assert described(fake_grads) == described(it.backward(results[0], results[2]))


@on_small_cases
def test_reserve(case: Case) -> None:
    """[D, rows, values of each unit, H] in the type accumulated in, or nothing."""
    it, spec = call(case), CELLS[case.cell]
    rows = it.input.shape[:-1].numel()
    everything = spec.saved + 2 * spec.gates * case.norm  # all products, which are normalized
    for keep, values in ((Keep.EVERYTHING, everything), (Keep.STATES, spec.states - 1)):
        reserve = it.forward(keep)[2]
        assert reserve.shape == (case.directions, rows, values, case.sizes[3])
        low = case.dtype in (torch.bfloat16, torch.float16)
        assert reserve.dtype == (torch.float32 if low else case.dtype)
    assert it.forward(Keep.NOTHING)[2].shape == (0,)


@pytest.mark.parametrize("cell", CELLS)
def test_reserve_with_zoneout(device: str, cell: str) -> None:
    """A cell that saves nothing reads in its backward pass what the step gave, which the expectation hides."""
    spec = CELLS[cell]
    expects = Case(cell, zoneout=(0.2, 0.3), expects=True, device=device)
    without = replace(call(Case(cell, device=device)), zoneout=[0.0] * spec.states)
    for it, more in (
        (call(expects), spec.saved == 0),
        (call(replace(expects, expects=False)), 0),
        (without, 0),
    ):
        reserve = it.forward()[2]
        assert reserve.size(2) == spec.saved + more
        assert it.reserve_shape(Keep.EVERYTHING) == [*reserve.shape]


def test_weights_of_a_direction() -> None:
    """The order the ops are documented to take weights in is the one the tests build them in."""
    norms = call(Case("lstm", (3, 2, 5, 4), norm=True)).weights[len(WEIGHTS) :]
    assert NORMS == ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")
    assert [tuple(w.shape) for w in norms if w is not None] == [(16,), (16,), (4,), (4,)]
    it = call(Case("lstm", (3, 2, 5, 4), projected=3))
    assert WEIGHTS == ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    assert [tuple(w.shape) for w in it.weights if w is not None] == [
        (16, 5),
        (16, 3),
        (16,),
        (16,),
        (3, 4),
    ]


@pytest.fixture
def composites() -> Iterator[None]:
    """The ops run on the reference, as on a device without kernels."""
    with (
        rnnkit.backend("reference"),
        mock.patch.object(torch.ops, "rnnkit", OpsOfGpu(torch.ops.rnnkit)),
    ):
        yield


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("what", test_kernels.BAD_CALLS)
def test_composites_refuse_bad_calls(what: str) -> None:
    test_kernels.test_bad_calls_are_refused("cpu", what)


@pytest.mark.usefixtures("composites")
@pytest.mark.parametrize("what", test_kernels.BAD_BACKWARDS)
def test_composites_refuse_bad_backward_calls(what: str) -> None:
    test_kernels.test_bad_backward_calls_are_refused("cpu", what)
