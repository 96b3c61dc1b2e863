"""Registered cells: the scans of csrc/cpu with a pointwise part that another library has."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import (
    DTYPES,
    NOISE_OF_FEW,
    RESETS_AND_NOISE,
    SIZES,
    Call,
    Case,
    assert_case_matches_reference,
    assert_matches_reference,
    assert_same_bits,
    call,
    variants,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rnnkit import autograd, backends, ops
from rnnkit.call import Keep
from rnnkit.graph import compiled
from rnnkit.specs import CELLS, REGISTERED, CellSpec

pytestmark = pytest.mark.skipif(
    backends.EXTENSION is None or shutil.which("g++") is None,
    reason=f"no C++ kernels ({backends.EXTENSION_REASON}), or no g++",
)

ROOT = Path(__file__).parent.parent

Parts = Sequence[Tensor]


def _peephole(x: Parts, h: Parts, states: Parts, p: Parts) -> tuple[Tensor, ...]:
    c = states[1]
    i, f = (torch.sigmoid(x[k] + h[k] + p[k] * c) for k in (0, 1))
    c = f * c + i * torch.tanh(x[2] + h[2])
    return torch.sigmoid(x[3] + h[3] + p[2] * c) * torch.tanh(c), c


def _independent(x: Parts, h: Parts, states: Parts, p: Parts) -> tuple[Tensor, ...]:
    return (torch.tanh(x[0] + p[0] * states[0]),)


def _two_to_one(x: Parts, h: Parts, states: Parts) -> tuple[Tensor, ...]:
    f, n = torch.sigmoid(x[0] + h[0]), torch.tanh(x[1] + h[0])
    return (f * states[0] + (1 - f) * n,)


def _two_states(x: Parts, h: Parts, states: Parts) -> tuple[Tensor, ...]:
    a = torch.sigmoid(x[0] + h[0])
    c = a * states[1] + (1 - a)
    return torch.tanh(c), c


def _one_to_two(x: Parts, h: Parts, states: Parts) -> tuple[Tensor, ...]:
    return (torch.tanh(x[0] + h[0]) * torch.sigmoid(h[1]),)


def _four_states(x: Parts, h: Parts, states: Parts) -> tuple[Tensor, ...]:
    _, c, n, m = states
    a, b = torch.sigmoid(x[0] + h[0]), torch.tanh(x[1] + h[1])
    c = a * c + (1 - a) * b
    n, m = a * n + (1 - a) * c, m / 2 + b * n
    return torch.tanh(c + n - m), c, n, m


#: The structs in registered_cells.cpp that no built-in cell has, by their names there.
SPECS = {
    spec.name: spec
    for spec in (
        CellSpec("peephole", 4, 2, 5, (0, 1, 2, 3), _peephole, projects=True, parameters=3),
        CellSpec("independent", 1, 1, 0, (0,), _independent, recurrent_gates=0, parameters=1),
        CellSpec("two_to_one", 2, 1, 2, (1, 2), _two_to_one, recurrent_gates=1),
        CellSpec("two_states", 1, 2, 2, (0,), _two_states, uses_h=True),
        CellSpec("one_to_two", 1, 1, 2, (0,), _one_to_two, projects=True, recurrent_gates=2),
        CellSpec("four_states", 2, 4, 5, (0, 1), _four_states, projects=True),
    )
}
#: Cells that are built in and registered as "compiled_" and their name.
TWICE = ("rnn_tanh", "rnn_relu", "lstm", "gru")
USES_PREVIOUS_H = ("gru", "independent", "two_to_one")


def describe(library: ctypes.CDLL, spec: CellSpec, name: str) -> dict[str, Any]:
    """The arguments of `register_cell` for a struct of this name, after the first."""

    def addresses(dtype: str) -> list[int]:
        functions = ["forward", "backward", "grad_states", "output"][: 4 if spec.projects else 3]
        found = [
            ctypes.cast(getattr(library, f"{name}_{function}_{dtype}"), ctypes.c_void_p).value or 0
            for function in functions
        ]
        return [*found, *[0] * (6 - len(found))]

    return {
        "gates": spec.gates,
        "recurrent": spec.recurrent,
        "states": spec.states,
        "saved": spec.saved,
        "parameters": spec.parameters,
        "input_grads": spec.input_grads,
        "uses_h": spec.reads_h,
        "uses_previous_h": name in USES_PREVIOUS_H,
        "projects": spec.projects,
        "f32": addresses("f32"),
        "f64": addresses("f64"),
    }


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The cells of registered_cells.cpp, compiled and registered."""
    assert backends.EXTENSION is not None
    to = tmp_path_factory.mktemp("cells") / "cells.so"
    flags = [*compiled._flags(), f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        ["g++", *flags, "registered_cells.cpp", "-o", to],
        cwd=ROOT / "tests",
        check=True,
    )
    loaded = ctypes.CDLL(str(to))
    twice = {f"compiled_{name}": replace(CELLS[name], name=f"compiled_{name}") for name in TWICE}
    for name, spec in (SPECS | twice).items():
        struct = name.removeprefix("compiled_")
        backends.EXTENSION.register_cell(name, **describe(loaded, spec, struct))
        REGISTERED[name] = spec
    yield loaded
    for name in (*SPECS, *twice):
        del REGISTERED[name]


KEEPS = (Keep.EVERYTHING, Keep.STATES)


def in_turn(found: list[Case]) -> list[Any]:
    """The cases, each with the next of what the reserve may keep and of numbers of threads."""
    turns = [(KEEPS[k % 2], (1, 3)[k // 2 % 2]) for k in range(len(found))]
    return [
        pytest.param(case, *turn, id=f"{case}-{turn[0].name}-{turn[1]}")
        for case, turn in zip(found, turns, strict=True)
    ]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Puts the number of threads back that a test has set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cases_like_built_in() -> list[Case]:
    """Cells that are built in, in every variant but layer normalization."""
    found = []
    for cell in TWICE:
        for dtype in (torch.float32, torch.float64):
            found += [Case(cell, sizes, 1 + k % 2, dtype=dtype) for k, sizes in enumerate(SIZES)]
        found += variants(Case(cell, (2, 18, 34, 64), 2))
        found += [Case(cell, (4, 3, 5, 33), 2, **noise) for noise in NOISE_OF_FEW]
        found.append(Case(cell, (3, 70, 9, 130), 2, dtype=torch.float64, **RESETS_AND_NOISE))
        found += [Case(cell, (5, 6, 9, 24), 2, dtype=dtype) for dtype in DTYPES[2:]]
    return found


@pytest.mark.parametrize(("case", "keep", "count"), in_turn(cases_like_built_in()))
def test_same_bits_as_built_in(case: Case, keep: Keep, count: int) -> None:
    torch.set_num_threads(count)
    built_in = call(case)
    registered = replace(built_in, cell=f"compiled_{case.cell}")
    if case.dtype == torch.bfloat16 and backends.EXTENSION.multiplies_bfloat16():  # type: ignore[union-attr]
        pytest.skip("registered cells multiply bfloat16 as float")
    if case.expects:  # what is multiplied by probabilities is rounded where a cell's function ends
        assert_matches_reference(registered, registered.run(keep))
        return
    flow = case.directions == 2
    assert_same_bits(registered.run(keep, flow), built_in.run(keep, flow))


def cases_of_other_cells() -> list[Case]:
    """Cells that are not built in: odd sizes, and every variant."""
    found = []
    for cell in SPECS:
        for dtype in (torch.float64, torch.float32):
            found += [Case(cell, sizes, 1 + k % 2, dtype=dtype) for k, sizes in enumerate(SIZES)]
            found += [
                Case(cell, (4, 3, 13, hidden), 2, dtype=dtype) for hidden in (1, 13, 33, 70, 130)
            ]
            several = variants_of(Case(cell, (3, 18, 34, 64), 2, dtype=dtype))
            found += several[dtype == torch.float32 :: 2]
            found += [Case(cell, (4, 3, 5, 33), 2, dtype=dtype, **noise) for noise in NOISE_OF_FEW]
            found.append(Case(cell, (3, 70, 9, 130), 2, dtype=dtype, **RESETS_AND_NOISE))
        found += [Case(cell, (5, 6, 9, 24), 2, dtype=dtype) for dtype in DTYPES[2:]]
    return found


def variants_of(case: Case) -> list[Case]:
    # `variants` looks the cell up, which is registered only later.
    spec = SPECS[case.cell]
    REGISTERED[case.cell] = spec
    found = variants(case)
    del REGISTERED[case.cell]
    return found


@pytest.mark.parametrize(("case", "keep", "count"), in_turn(cases_of_other_cells()))
def test_against_reference(case: Case, keep: Keep, count: int) -> None:
    torch.set_num_threads(count)
    assert_case_matches_reference(case, keep)


@pytest.mark.parametrize("cell", SPECS)
def test_threads_change_no_bit(cell: str) -> None:
    before = torch.get_num_threads()
    for sizes in ((5, 2, 130, 200), (4, 70, 33, 130), (40, 9, 13, 70)):
        it = call(Case(cell, sizes, 2, dtype=torch.float32))
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [it.run(flow=True)]
        torch.set_num_threads(before)
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("cell", SPECS)
def test_packed_weights(cell: str) -> None:
    it = call(Case(cell, (40, 9, 13, 70), 2))  # so much work that weights are packed in any case
    packed = torch.ops.rnnkit.pack_weights(cell, it.weights)
    expected = ops.layer_forward(it, None, Keep.NOTHING)
    assert_same_bits(
        [t for ts in ops.layer_forward(it, packed, Keep.NOTHING)[:2] for t in ts],
        [t for ts in expected[:2] for t in ts],
    )
    other = torch.ops.rnnkit.pack_weights(
        "compiled_lstm", call(Case("lstm", (40, 9, 13, 70), 2)).weights
    )
    with pytest.raises(RuntimeError, match="expected packed to be"):
        ops.layer_forward(it, other, Keep.NOTHING)


@pytest.mark.parametrize("cell", SPECS)
def test_gradients_by_autograd(cell: str) -> None:
    it = call(Case(cell, (4, 3, 5, 7), 2, dtype=torch.float64, all_states=True))
    tensors = [None if t is None else t.requires_grad_() for t in it.tensors]
    outputs, finals = autograd.run(it.with_tensors(tensors))
    given = [t for t in tensors if t is not None]
    found = torch.autograd.grad([*outputs, *finals], given, it.grads)
    expected = it.reference()
    for grad, name in zip(found, it.gradient_names(), strict=True):
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("cell", SPECS)
def test_fake_results_have_the_same_shapes(cell: str) -> None:
    it = call(Case(cell, (4, 3, 5, 7), 2, all_states=True))
    outputs, finals, reserve = it.forward()
    grads = it.backward(outputs, reserve)
    with FakeTensorMode() as mode:
        fake = it.map(mode.from_tensor)
        fakes = fake.forward()
        fake_grads = fake.backward(fakes[0], fakes[2])
    assert [t.shape for t in grads] == [t.shape for t in fake_grads]
    assert [t.shape for t in (*outputs, *finals)] == [t.shape for t in (*fakes[0], *fakes[1])]
    assert reserve.shape == fakes[2].shape


def test_registering_again(library: ctypes.CDLL) -> None:
    assert backends.EXTENSION is not None
    register = partial(backends.EXTENSION.register_cell)
    same = describe(library, SPECS["peephole"], "peephole")
    register("peephole", **same)
    for change in (
        {"saved": 6},
        {"uses_h": True, "projects": False},
        {"input_grads": [0, 1, 3, 2]},
    ):
        with pytest.raises(RuntimeError, match="expected peephole to be described as before"):
            register("peephole", **(same | change))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("lstm", {}, "expected a name that no built-in cell has, got 'lstm'"),
        ("", {}, "expected the name of a cell, got ''"),
        ("x" * 61, {"states": 5}, f"expected {'x' * 60}... to have 1 to 4 states, got 5"),
        ("new", {"states": 5}, "expected new to have 1 to 4 states, got 5"),
        ("new", {"gates": 17, "input_grads": range(17)}, "at most 16, got 17"),
        ("new", {"recurrent": 17}, "expected new to have 0 to 16 recurrent gates, got 17"),
        ("new", {"input_grads": [0, 1, 2]}, "expected input_grads of 4 gates"),
        (
            "new",
            {"input_grads": [0, 1, 2, 9]},
            "expected new to have 4 to 8 gradients of gates, got 10",
        ),
        ("new", {"input_grads": [0, 1, 2, -1]}, "expected the gradients of new's input gates"),
        ("new", {"uses_h": True}, "expected new to read neither h nor the previous h"),
        ("new", {"f32": [0] * 6}, "expected addresses of all functions of new, got 0"),
        ("new", {"late": 5, "projects": False}, "expected new to have 0 to 4 late gates, got 5"),
        ("new", {"late": 1}, "expected new to have no late gates, since it is to support proj"),
        ("new", {"late": 1, "projects": False}, "expected addresses of all functions of new"),
    ],
)
def test_refused_descriptions(library: ctypes.CDLL, name: str, change: dict, message: str) -> None:
    assert backends.EXTENSION is not None
    arguments = describe(library, SPECS["peephole"], "peephole") | change
    with pytest.raises(RuntimeError, match=message):
        backends.EXTENSION.register_cell(name, **arguments)


def _without(place: int) -> Callable[[Call], Call]:
    """A call without one weight of the second direction."""

    def change(it: Call) -> Call:
        weights = list(it.weights)
        weights[len(it.kinds) + place] = None
        return replace(it, weights=weights)

    return change


def _with(place: int, *shape: int) -> Callable[[Call], Call]:
    """A call with another weight in the first direction."""

    def change(it: Call) -> Call:
        weights = list(it.weights)
        weights[place] = torch.zeros(shape)
        return replace(it, weights=weights)

    return change


@pytest.mark.parametrize(
    "cell, change, message",
    [
        ("peephole", _without(5), "expected unit of direction 1 to be a tensor, got None"),
        ("peephole", _with(5, 2, 7), r"expected unit of direction 0 of shape \[3, 7\]"),
        ("peephole", _without(1), "expected w_hh of direction 1 to be a tensor, got None"),
        ("independent", _with(1, 7, 7), "expected w_hh of direction 0 to be None for independent"),
        ("independent", _with(3, 7), "expected b_hh of direction 0 to be None for independent"),
        ("independent", _with(4, 3, 7), "expected w_hr to be None for independent"),
        ("two_to_one", _with(1, 14, 7), "expected w_ih of direction 0 of shape"),
        ("two_to_one", _with(3, 14), r"expected b_hh of direction 0 of shape \[7\]"),
        ("two_to_one", _with(4, 3, 7), "expected w_hr to be None for two_to_one"),
        (
            "one_to_two",
            _with(1, 13, 7),
            "expected w_hh of direction 0 to have a multiple of 2 rows",
        ),
        (
            "peephole",
            lambda it: replace(it, weights=it.weights[:9]),
            "expected weights to hold 6 tensors for each of 1 or 2 directions of peephole, got 9",
        ),
        (
            "two_to_one",
            lambda it: replace(it, weights=[*it.weights, *[torch.zeros(7)] * 8]),
            "expected weights to hold 5 tensors for each of 1 or 2 directions of two_to_one, got 18",
        ),
    ],
)
def test_refused_calls(cell: str, change: Callable[[Call], Call], message: str) -> None:
    """By the kernels and by the composite with the same message."""
    it = call(Case(cell, (4, 3, 5, 7), 2))
    outputs, _, reserve = it.forward()
    wrong = change(it)
    for attempt in (
        lambda: wrong.forward(),
        lambda: ops.forward_composite(wrong, None, Keep.EVERYTHING),
        lambda: wrong.backward(outputs, reserve),
    ):
        with pytest.raises(RuntimeError, match=message):
            attempt()
