"""The Triton kernels: every cell, dtype and size on either kernel, in the interpreter and, compiled, on a GPU."""

import copy
import importlib
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import interpreter
import pytest
import test_kernels
import torch
from configurations import LAYERS, MODULES, compare
from configurations import Case as ModuleCase
from devices import on_gpu
from graph_cells import CELLS as GRAPH_CELLS
from graph_cells import LATE, Cell, xlstm
from kernel_cases import (
    DTYPES,
    NOISE_OF_FEW,
    NORMS_OF_FEW,
    TWINS,
    Case,
    assert_case_matches_reference,
    assert_matches_reference,
    assert_same_bits,
    call,
    small_cases,
)
from tolerances import FORWARD, GRADIENT, assert_close_to_truth, relative_error

import rnnkit
from rnnkit import backends, cuda, gpu, library, ops, plan, specs
from rnnkit.call import Keep, LayerCall
from rnnkit.graph import Graph
from rnnkit.graph import triton as printed
from rnnkit.graph.kernels import derived_of
from rnnkit.specs import CELLS, REGISTERED, CellSpec

interpreted = pytest.mark.skipif(
    bool(interpreter.why_not()), reason=interpreter.why_not() or "it can run"
)


def each(cases: list[Case]) -> list:
    """The cases in the interpreter, and on a GPU."""
    return [
        *(pytest.param(case, marks=interpreted) for case in cases),
        *on_gpu(cases),
    ]


each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kernel = pytest.mark.parametrize("kernel", plan.TRITON_KERNELS)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The test runs in the interpreter, on CPU tensors, and on a GPU."""
    if request.param == "cuda":
        return "cuda"
    if reason := interpreter.why_not():
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(autouse=True)
def triton(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on Triton's kernels."""
    if request.node.get_closest_marker("gpu"):
        if backends.TRITON_REASON:
            pytest.skip(backends.TRITON_REASON)
        with rnnkit.backend("triton"):
            yield
    elif interpreter.why_not():
        yield
    else:
        with interpreter.ops():
            yield


def _products_in_order(device: str) -> AbstractContextManager[None]:
    """For equal bits of rows in other places: see `interpreter.products_in_order`; a GPU needs nothing."""
    return nullcontext() if device == "cuda" else interpreter.products_in_order()


# Numbers

#: T, N, I, H: one of everything; more and fewer than a tile's rows and units, and products at a time.
SIZES = (
    (1, 1, 2, 1),
    (2, 18, 3, 17),
    (3, 3, 1, 40),
    (4, 2, 5, 16),
)
VARIANTS: tuple[dict, ...] = (
    {},
    {"grad_clip": 0.1, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
    {"lengths": (4, 3, 3, 1)},
    {"bias": False, "states": False},
    {"lengths": (3,) * 9 + (1,) * 9, "states": False},
    {"lengths": (2, 1), "bias": False},
    {"states": False},
    {"grad_clip": 0.1},
    {"grad_cut": 2},
    {"resets": 0.4},
    {"resets": 0.4, "reset_states": True, "grad_clip": 0.1, "grad_cut": 2, "lengths": (4, 3, 3, 1)},
    {"resets": 0.4, "reset_states": True},
)


def cases() -> Iterator[tuple[Case, str, Keep]]:
    """Every cell in every dtype at every size on either kernel, and with noise and layer normalization.

    All else is drawn along diagonals.
    """
    for at, (cell, dtype) in enumerate(product(CELLS, DTYPES)):
        # Of a twin, a single value would be compared, whose relative error is chance.
        several = SIZES[1:] if cell in TWINS else SIZES
        runs = [
            (kernel, sizes, VARIANTS[(at + 5 * row) % len(VARIANTS)])
            for row, (kernel, sizes) in enumerate(product(plan.TRITON_KERNELS, several))
        ]
        runs += [
            (kernel, SIZES[1 + (at + row) % 3], NOISE_OF_FEW[(2 * at + row) % len(NOISE_OF_FEW)])
            for row, kernel in enumerate(plan.TRITON_KERNELS)
        ]
        runs += [
            # Few values of an LSTM's c can be nearly equal, and are then divided by a small deviation.
            (kernel, (3, 3, 4, 17 + 8 * row), NORMS_OF_FEW[(2 * at + row) % len(NORMS_OF_FEW)])
            for row, kernel in enumerate(plan.TRITON_KERNELS)
        ]
        for row, (kernel, sizes, variant) in enumerate(runs):
            case = Case(cell, sizes, 1 + (at + row // 2) % 2, dtype=dtype, off_kink=True)
            case = replace(case, all_states=CELLS[cell].states > 1 and (at + row) % 3 == 1)
            keep = Keep.STATES if (at + row) % 3 == 0 else Keep.EVERYTHING
            yield replace(case, **variant), kernel, keep


def on_devices(found: Iterable[tuple[Case, str, Keep]]) -> Any:
    """Parametrizes a test with the cases, in the interpreter and on a GPU."""
    return pytest.mark.parametrize(
        ("case", "kernel", "keep"),
        [
            pytest.param(
                replace(case, device=device),
                kernel,
                keep,
                marks=interpreted if device == "cpu" else pytest.mark.gpu,
                id=f"{replace(case, device=device)}-{kernel}-{keep.name}",
            )
            for device, (case, kernel, keep) in product(("cpu", "cuda"), found)
        ],
    )


@on_devices(cases())
@pytest.mark.thinned
def test_against_reference(case: Case, kernel: str, keep: Keep) -> None:
    with plan.forced(kernel):
        assert_case_matches_reference(case, keep)


#: Every variant of every cell, in one direction or two, in turn.
VARIED = [
    Case(cell, (3, 4, 2, 20), 1 + (at + index) % 2, off_kink=True, **variant)
    for at, cell in enumerate(CELLS)
    for index, variant in enumerate((*VARIANTS, *NOISE_OF_FEW, *NORMS_OF_FEW))
    if cell not in TWINS or index % 3 == 0
]


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        # The interpreter is slow: there each case is on one kernel.
        *(
            pytest.param(case, plan.TRITON_KERNELS[k // 2 % 2], marks=interpreted)
            for k, case in enumerate(VARIED)
        ),
        *(
            pytest.param(replace(case, device="cuda"), kernel, marks=pytest.mark.gpu)
            for case in VARIED
            for kernel in plan.TRITON_KERNELS
        ),
    ],
    ids=str,
)
@pytest.mark.thinned
def test_every_variant(case: Case, kernel: str) -> None:
    with plan.forced(kernel):
        assert_case_matches_reference(case)


@pytest.mark.parametrize(
    "variant",
    (
        {},
        {"lengths": (4, 3, 3, 1)},
        {"grad_clip": 0.1, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
        {"grad_cut": 2},  # of which the number of steps is a multiple
        {"operand_mask": True, "zoneout": (0.0, 0.3), "lengths": (4, 3, 3, 1)},
        {"operand_mask": True, "zoneout": (0.0, 0.3), "resets": 0.5, "grad_clip": 0.1},
        {"norm": True},
        {"norm": True, "operand_mask": True, "resets": 0.5, "lengths": (4, 3, 3, 1)},
    ),
    ids=(
        "dense",
        "ragged",
        "gradient rule",
        "cut",
        "noise",
        "noise and resets",
        "norm",
        "norm and resets",
    ),
)
@pytest.mark.parametrize("states", (True, False), ids=("states", "nostates"))
@each_dtype
@pytest.mark.thinned
def test_projection(device: str, dtype: torch.dtype, states: bool, variant: dict) -> None:
    case = Case("lstm", (2, 3, 4, 17), 2, projected=5, dtype=dtype, device=device, **variant)
    assert_case_matches_reference(replace(case, states=states))


@each_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("lengths", ((), (4, 3, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize(
    "noise", ({}, {"operand_mask": True, "zoneout": (0.0, 0.3)}), ids=("plain", "noise")
)
@pytest.mark.parametrize(
    ("cell", "projected"),
    (("lstm", 0), ("lstm", 5), ("gru", 0), ("peephole_lstm", 0), ("peephole_lstm", 5), ("sru", 0)),
)
@pytest.mark.parametrize("given", ({}, {"heads": 2, "multiplies": False}), ids=("x", "products"))
@pytest.mark.thinned
def test_recomputed_reserve_has_the_same_bits(
    device: str,
    cell: str,
    projected: int,
    noise: dict[str, Any],
    given: dict[str, Any],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    kernel: str,
) -> None:
    scan = importlib.import_module("rnnkit.triton.scan")
    case = own(Case(cell, (3, 4, 5, 33), 2, lengths, projected, dtype=dtype, device=device))
    it = call(replace(case, **noise, **given))
    with _products_in_order(device), plan.forced(kernel):
        (output,), _, expected = it.forward(Keep.EVERYTHING)
        _, _, states = it.forward(Keep.STATES)
        kept = it.backward_call([output], states, keep=Keep.STATES)
        back = gpu.Backward(kept, gpu.GpuCall.of(it), scan)
    assert_same_bits([back.reserve], [expected])


@each_kernel
@pytest.mark.parametrize("lengths", ((), (4, 3, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize(
    ("cell", "options"),
    (
        ("lstm", {"operand_mask": True, "resets": 0.4, "reset_states": True}),
        ("lstm", {"projected": 5}),
        ("gru", {}),
        ("rnn_tanh", {}),
        ("rnn_tanh", {"zoneout": (0.3, 0.0), "expects": True}),
    ),
    ids=("lstm", "projected", "gru", "rnn", "given"),
)
@pytest.mark.thinned
def test_recomputed_products_have_the_same_bits(
    device: str, cell: str, options: dict[str, Any], lengths: tuple[int, ...], kernel: str
) -> None:
    """With layer normalization; also of a cell whose reserve has nothing else, or the h that it gave."""
    scan = importlib.import_module("rnnkit.triton.scan")
    case = Case(cell, (3, 4, 5, 20), 2, lengths, dtype=torch.float64, device=device, norm=True)
    it = call(replace(case, **options))
    with _products_in_order(device), plan.forced(kernel):
        (output,), _, expected = it.forward(Keep.EVERYTHING)
        states = it.forward(Keep.STATES)[2]
        given = it.backward_call([output], states, keep=Keep.STATES)
        back = gpu.Backward(given, gpu.GpuCall.of(it), scan)
    assert expected.any(dim=-1).all()
    assert_same_bits([back.reserve], [expected])


#: Cells of one's own that Triton has kernels for, by their names here: the library, and steps that return or read what
#: few do.
OWN = {
    cell.name: cell.op_name
    for cell in vars(library).values()
    if isinstance(cell, rnnkit.Cell) and not cell.graph.late
}
OWN |= {
    name: cell.graph().to_json()
    for name, cell in {
        "xlstm": Cell(xlstm, "i f z o", "i f z o", "h c n m", 7),
        **{name: cell for name, cell in GRAPH_CELLS.items() if name in (
            *("odd_states", "common_factors", "choice", "infinite_constants", "unchanged"),
            *("constant", "every_operation"),
        )},
    }.items()
}  # fmt: skip
#: A cell whose divisor is 0 where a state is drawn at random, see `xlstm`.
FROM_ZEROS = ("slstm",)
#: Cells with a state after the step that is one before it or is constant: autograd has no gradient of it alone.
WITHOUT_FLOW = ("odd_states", "unchanged", "constant")

#: What cells of one's own run with: `VARIANTS`, noise, all states, heads, and inputs that are products already.
OWN_VARIANTS: tuple[dict, ...] = (
    *VARIANTS,
    *NOISE_OF_FEW,
    {"heads": 3},
    {"heads": 2, "lengths": (4, 3, 3, 1), "resets": 0.4, "reset_states": True},
    {"multiplies": False, "lengths": (4, 3, 1)},
    {"heads": 3, "multiplies": False, "grad_clip": 0.1, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
    {"heads": 2, "operand_mask": True, "zoneout": (0.2, 0.4), "expects": True, "bias": False},
)
OWN_PROJECTIONS: tuple[dict, ...] = (
    {"projected": 5, "lengths": (4, 3, 3, 1)},
    {"projected": 3, "resets": 0.4, "reset_states": True, "grad_clip": 0.1, "grad_cut": 2},
    {"projected": 4, "heads": 2, "multiplies": False, "operand_mask": True, "states": False},
)


def cases_of_own() -> Iterator[tuple[Case, str, Keep]]:
    """Every cell of one's own in three dtypes, with the next few of the variants; projected where it can be.

    In low precision the odd ones of graph_cells.py are as far from the truth as the tolerance is wide, or on a kink, as
    NAS is, whose relu is inside other functions.
    """
    for at, (name, dtype) in enumerate(product(OWN, DTYPES[:3])):
        odd = name == "nas" or (name in GRAPH_CELLS and not hasattr(library, name))
        if dtype == torch.bfloat16 and odd:
            continue
        spec = specs.of(OWN[name])
        found = [OWN_VARIANTS[(4 * at + row) % len(OWN_VARIANTS)] for row in range(4)]
        found += [OWN_PROJECTIONS[at % len(OWN_PROJECTIONS)]] * spec.projects
        for row, variant in enumerate(found):
            case = Case(name, SIZES[1 + (at + row) % 3], 1 + (at + row) % 2, dtype=dtype)
            case = replace(case, all_states=spec.states > 1 and (at + row) % 3 == 1, **variant)
            if name in FROM_ZEROS:
                case = replace(case, states=False, reset_states=False)
            kernel = plan.TRITON_KERNELS[(at + row // 2) % 2]
            yield case, kernel, Keep.STATES if (at + row) % 3 == 0 else Keep.EVERYTHING


def own(case: Case) -> Case:
    """The case with the cell's name in ops."""
    return replace(case, cell=OWN.get(case.cell, case.cell))


@on_devices(cases_of_own())
@pytest.mark.thinned
def test_own_cells(case: Case, kernel: str, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forward_composite", lambda *_: pytest.fail("the reference ran"))
    monkeypatch.setattr(ops, "backward_composite", lambda *_: pytest.fail("the reference ran"))
    with plan.forced(kernel):
        if case.cell in WITHOUT_FLOW:
            it = call(own(case))
            assert_matches_reference(it, it.run(keep))
        else:
            assert_case_matches_reference(own(case), keep)


@pytest.mark.parametrize("keep", (Keep.EVERYTHING, Keep.STATES), ids=lambda keep: keep.name)
@pytest.mark.parametrize("cell", ("star", "ind_rnn"))
def test_h_that_an_own_cell_gave_beside_what_it_saves(device: str, cell: str, keep: Keep) -> None:
    """The cells read it in their backward pass, and the expectation of zoneout hides it."""
    options = {"zoneout": (0.3, 0.0), "expects": True, "lengths": (4, 3, 3, 1)}
    assert_case_matches_reference(own(Case(cell, directions=2, device=device, **options)), keep)


#: Heads and given products of the cells that are built in.
OF_HEADS = [
    Case(cell, (3, 4, 2, 20), 1 + (at + index) % 2, dtype=dtype, off_kink=True, **variant)
    for at, (cell, dtype) in enumerate(product(CELLS, (torch.float32, torch.bfloat16)))
    for index, variant in enumerate(
        (
            {"heads": 3},
            {"heads": 3, "lengths": (4, 3, 3, 1), "resets": 0.4, "reset_states": True},
            {"heads": 2, "multiplies": False, "grad_clip": 0.1, "grad_cut": 2},
            {"multiplies": False, "lengths": (5, 4, 2, 1), "bias": False, "states": False},
            {"heads": 2, "norm": True, "lengths": (4, 3, 3, 1)},
            {"heads": 2, "norm": True, "multiplies": False},
        )
    )
    if cell not in TWINS or index % 3 == 0
]


@pytest.mark.parametrize("case", each(OF_HEADS), ids=str)
@pytest.mark.parametrize("keep", (Keep.EVERYTHING, Keep.STATES), ids=lambda keep: keep.name)
@pytest.mark.thinned
def test_heads_and_given_products(case: Case, keep: Keep) -> None:
    assert_case_matches_reference(case, keep)


def _many_gates(x: Any, r: Any, s: Any) -> Any:
    sums = [getattr(x, name) + getattr(r, name) for name in "abcdefghijklmnop"]
    keeps = sum(torch.sigmoid(a) for a in sums[::2]) / 8
    return (keeps * s.h + sum(torch.tanh(a) for a in sums[1::2]) / 8,)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_sixteen_gates(device: str, dtype: torch.dtype, kernel: str) -> None:
    names = " ".join("abcdefghijklmnop")
    cell = Cell(_many_gates, names, names, "h", 0).graph().to_json()
    with plan.forced(kernel):
        assert_case_matches_reference(Case(cell, (2, 3, 4, 17), 2, dtype=dtype, device=device))


@pytest.mark.parametrize("cell", ("sru", "ind_rnn"))
def test_without_recurrent_parts_programs_share_the_units_of_one_launch(
    device: str, cell: str
) -> None:
    scan = importlib.import_module("rnnkit.triton.scan")
    case = own(Case(cell, (4, 3, 5, 70), 2, lengths=(4, 3, 1), resets=0.3, device=device))
    chosen = [scan.choose(case.scan(backward)) for backward in (False, True)]
    assert all(each.kernel == "sequence" and each.units < 70 for each in chosen)
    assert "no gate has a recurrent part" in chosen[0].reason
    assert_case_matches_reference(case)


@pytest.mark.parametrize("options", ({}, {"heads": 2}, {"zoneout": 0.3}), ids=str)
@pytest.mark.parametrize("lengths", ((), (4, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize("cell", ("peephole_lstm", "fast_grnn", "ind_rnn"))
@pytest.mark.thinned
def test_layers_of_own_cells(
    device: str, cell: str, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Two layers, in both directions: results, gradients and their flow are those of the reference."""
    made = (getattr(library, cell), 4, 18)
    layer = rnnkit.Recurrent(*made, num_layers=2, bidirectional=True, device=device, **options)
    x: Any = torch.randn(4, 3, 4, device=device)
    if lengths:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        with rnnkit.gradient_flow(layer) as flow:
            output = layer(x)[0]
            output = output.data if lengths else output
            grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        seen = [flow[""].h.to(output.dtype)] if layer.cell.recurrent else []
        return [output, *grads, *seen]

    found = results()
    with mock.patch.object(backends, "serving", lambda _: "reference"):
        torch.testing.assert_close(found, results())


@pytest.mark.parametrize("cell", ("lstm", "sru"))
def test_projection_of_as_many_values_as_units(device: str, cell: str) -> None:
    assert_case_matches_reference(own(Case(cell, directions=2, projected=4, device=device)))


@each_dtype
def test_h_before_its_projection(device: str, dtype: torch.dtype) -> None:
    scan = importlib.import_module("rnnkit.triton.scan")
    it = call(Case("lstm", (3, 7, 4, 65), 2, projected=5, dtype=dtype, device=device))
    of = gpu.GpuCall.of(it)
    reserve = it.forward()[2]
    i, f, g, o, c = reserve.double().unbind(2)
    expected = (o * torch.tanh(f * c + i * g)).to(dtype)
    torch.testing.assert_close(scan.unprojected(of, reserve), expected)


@each_cell
def test_each_kernel_finds_what_the_other_kept(device: str, cell: str) -> None:
    it = call(Case(cell, (3, 2, 3, 17), 2, device=device, off_kink=True))
    truth, baseline = it.to(torch.float64).reference(), it.reference()
    for first, second in (("sequence", "stepwise"), ("stepwise", "sequence")):
        with plan.forced(first):
            outputs, finals, reserve = it.forward()
        with plan.forced(second):
            results = it.named(outputs, finals, it.backward(outputs, reserve))
        for name, result in results.items():
            gradient = name.startswith("grad")
            assert_close_to_truth(
                result, baseline[name], truth[name], gradient=gradient, name=f"{name}, {first}"
            )


@each_kernel
@each_cell
def test_tf32_is_as_torch_s_switch_says(
    device: str, cell: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in what is launched and, where products are rounded to it, in the results."""
    scan = importlib.import_module("rnnkit.triton.scan")
    launched, launch = [], scan._Launcher.__call__

    def seen(self: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(self.constants["PRECISION"])
        launch(self, *arguments, **constants)

    monkeypatch.setattr(scan._Launcher, "__call__", seen)
    it = call(Case(cell, (3, 5, 6, 33), 2, device=device, off_kink=True))
    truth, baseline = it.to(torch.float64).reference(), it.reference()
    with plan.forced(kernel):
        exact = it.run()
        in_full, launched[:] = set(launched), []
        torch.backends.cudnn.allow_tf32 = True
        rounded = it.run()
    nvidia = scan.TARGET == "cuda"
    assert in_full == {"tf32x3" if nvidia else "ieee"}
    assert set(launched) == {"tf32" if nvidia else "ieee"}
    for name, result in rounded.items():
        assert torch.equal(result, exact[name]) == (device == "cpu" or not nvidia), name
        gradient = name.startswith("grad")
        assert_close_to_truth(
            result, baseline[name], truth[name], gradient=gradient, tf32=True, name=name
        )


@each_kernel
def test_zoneout_selects(device: str, kernel: str) -> None:
    with plan.forced(kernel):
        test_kernels.test_zoneout_selects(device)


@each_kernel
def test_layer_normalization_runs_on_the_kernels(
    device: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has all units of its rows; where there is no room for them, the reference computes the call."""
    scan = importlib.import_module("rnnkit.triton.scan")
    for cell in CELLS:
        it = call(Case(cell, (2, 3, 4, 40), 2, device=device, norm=True, off_kink=True))
        with plan.forced(kernel), monkeypatch.context() as without:
            without.setattr(ops, "forward_composite", lambda *_: pytest.fail("the reference ran"))
            without.setattr(ops, "backward_composite", lambda *_: pytest.fail("the reference ran"))
            it.run()
    monkeypatch.setattr(scan, "_launch", lambda *_, **__: pytest.fail("a kernel ran"))
    monkeypatch.setitem(scan._MOST_UNITS, 4, 32)
    with plan.forced(kernel):
        assert_case_matches_reference(Case("gru", (2, 3, 4, 40), device=device, norm=True))


@each_kernel
def test_normalized_values_of_any_mean_and_size(device: str, kernel: str) -> None:
    with plan.forced(kernel):
        test_kernels.test_normalized_values_of_any_mean_and_size(device)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy, in the interpreter
@each_kernel
@each_cell
def test_saturated(device: str, cell: str, kernel: str) -> None:
    """Pre-activations of ±1e4 give neither infinities nor NaN."""
    it = call(Case(cell, (1, 3, 4, 17), 2, device=device))
    large = it.input.sign() * (1e4 if cell != "rnn_relu" else 1e2)
    weights = [None if w is None else w.sign() if w.dim() == 2 else w for w in it.weights]
    with plan.forced(kernel):
        it = replace(it, input=large, weights=weights)
        results = it.run()
    assert all(result.isfinite().all() for result in results.values())
    assert_matches_reference(it, results)


@pytest.mark.parametrize("exponent", (-30, -12, -6, -3, -1))
def test_tanh_of_small_values(device: str, exponent: int) -> None:
    """Each is as exact as its size asks for, where a formula with exponentials would cancel."""
    dtype = torch.float32
    x = torch.linspace(-1, 1, 33, dtype=dtype, device=device).view(1, 1, 33) * 2.0**exponent
    weights = [torch.eye(33, device=device), torch.zeros(33, 33, device=device), None, None, None]
    output = ops.layer_forward(LayerCall("rnn_tanh", x, [], weights), None, Keep.NOTHING)[0][0]
    torch.testing.assert_close(output, torch.tanh(x.double()).float(), rtol=1e-6, atol=0)


@each_kernel
@pytest.mark.parametrize("grad_clip", (0.0, 0.1))
@pytest.mark.parametrize("place", ("input", "state", "grad"))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
@pytest.mark.thinned
def test_nan_stays_in_its_row(
    device: str, cell: str, place: str, grad_clip: float, kernel: str
) -> None:
    with plan.forced(kernel):
        test_kernels.test_special_values_stay_in_their_row(
            device, cell, (4, 4, 3, 2, 1), place, float("nan"), grad_clip, torch.bfloat16
        )


@pytest.mark.parametrize("cell", ("rnn_tanh", "rnn_relu"))
def test_nan_is_not_lost(device: str, cell: str) -> None:
    it = call(Case(cell, (2, 3, 4, 5), device=device))
    it.input[0, 1, 2] = float("nan")
    (output,), (final,), _ = it.forward()
    assert output[:, 1].isnan().all() and final[:, 1].isnan().all()
    assert output[:, ::2].isfinite().all()


@each_kernel
@each_cell
def test_same_bits_again(device: str, cell: str, kernel: str) -> None:
    it = call(Case(cell, (3, 4, 5, 20), 2, device=device))
    with plan.forced(kernel):
        assert_same_bits(it.run(), it.run())


# Arguments


@pytest.mark.parametrize(
    "case",
    each(
        [
            *(c for c in small_cases() if c.lengths and (c.projected or c.cell == "gru")),
            Case("lstm", directions=2, operand_mask=True, zoneout=(0.3, 0.2)),
            Case("lstm", (2, 2, 3, 12), directions=2, norm=True),
            Case("lstm", directions=2, heads=2, multiplies=False),
            Case("peephole_lstm", directions=2, heads=2),
            Case("sru", directions=2, lengths=(4, 3, 1), multiplies=False),
        ]
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "check",
    [
        test_kernels.test_only_needed_gradients,
        test_kernels.test_missing_incoming_gradients_are_zero,
        test_kernels.test_expanded_tensors,
        test_kernels.test_arguments_are_only_read,
        test_kernels.test_results_have_memory_of_their_own,
        test_kernels.test_what_is_kept_changes_no_bit,
    ],
)
@pytest.mark.thinned
def test_as_the_other_kernels(check: Callable[[Case], None], case: Case) -> None:
    check(own(case))


@pytest.mark.parametrize("missing", ("b_ih", "b_hh"))
@each_cell
def test_one_bias_missing(device: str, cell: str, missing: str) -> None:
    test_kernels.test_one_bias_missing(Case(cell, directions=2, device=device), missing)


@pytest.mark.parametrize("sizes", [(3, 2, 5, 0), (3, 0, 5, 4), (3, 2, 0, 4), (1, 0, 0, 0)])
@each_cell
def test_empty(device: str, cell: str, sizes: tuple[int, int, int, int]) -> None:
    test_kernels.test_empty(device, cell, torch.float32, 2, sizes)


@pytest.mark.parametrize("what", test_kernels.BAD_CALLS)
@pytest.mark.thinned
def test_bad_calls_are_refused(device: str, what: str) -> None:
    test_kernels.test_bad_calls_are_refused(device, what)


@pytest.mark.parametrize("what", test_kernels.BAD_BACKWARDS)
def test_bad_backward_calls_are_refused(device: str, what: str) -> None:
    test_kernels.test_bad_backward_calls_are_refused(device, what)


# Layers


def modules() -> Iterator[ModuleCase]:
    """Every layer stacked, packed and bidirectional, and every cell, with gradients."""
    for name in MODULES:
        if name in LAYERS:
            yield ModuleCase(name, 3, 3, num_layers=2, bidirectional=True, off_kink=True)
            yield ModuleCase(name, lengths=(2, 3, 1), bidirectional=True, hx=True, off_kink=True)
        else:
            yield ModuleCase(name, hx=True, off_kink=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case.on(device), marks=interpreted if device == "cpu" else pytest.mark.gpu, id=str(case)
        )
        for device in ("cpu", "cuda")
        for case in modules()
    ],
)
def test_modules(case: ModuleCase) -> None:
    compare(case)


@pytest.mark.parametrize("module", ("LSTM", "GRU"))
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, marks=interpreted),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_autocast(device: str, dtype: torch.dtype, module: str) -> None:
    """Computes in the low type, returns what torch.nn returns; weights of float32 get gradients of float32."""
    layer = getattr(rnnkit, module)(4, 17, device=device)
    x = torch.randn(3, 2, 4, device=device, requires_grad=True)
    theirs = getattr(torch.nn, module)(4, 17, device=device)
    with torch.autocast(device, dtype):
        output = layer(x)[0]
        try:
            expected_dtype = theirs(x)[0].dtype
        except RuntimeError as error:  # oneDNN has no LSTM in bfloat16 on this CPU
            assert "could not create a primitive" in str(error)
            expected_dtype = dtype
        assert output.dtype == expected_dtype
    output.float().sum().backward()
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    exact.zero_grad()
    with rnnkit.backend("reference"):
        expected = exact(x.detach().cpu().double())[0]
    expected.sum().backward()
    assert relative_error(output.cpu(), expected) < 2 * FORWARD[dtype]
    for weight, truth in zip(layer.parameters(), exact.parameters(), strict=True):
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        assert relative_error(weight.grad.cpu(), truth.grad) < 2 * GRADIENT[dtype]


@pytest.mark.parametrize("lengths", ((), (4, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize(
    "options",
    (
        {"update_gate": "writes"},
        {"grad_clip": 0.05},
        {"grad_cut": 2},
        {"recurrent_dropout": 0.4, "zoneout": 0.3},
        {"layer_norm": True, "zoneout": 0.3},
    ),
    ids=str,
)
def test_options_and_gradient_flow(
    device: str, options: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    """A layer's results, gradients and the norms of its states' gradients are those of the reference."""
    layer = rnnkit.GRU(4, 17, bidirectional=True, device=device, **options)
    x: Any = torch.randn(4, 3, 4, device=device)
    if lengths:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        with rnnkit.gradient_flow(layer) as flow:
            output = layer(x)[0]
            output = output.data if lengths else output
            grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        return [output, *grads, flow[""].h.to(output.dtype)]

    found = results()
    with mock.patch.object(backends, "serving", lambda _: "reference"):
        torch.testing.assert_close(found, results())


def test_inference_mode(device: str) -> None:
    layer = rnnkit.GRU(4, 17, bidirectional=True, device=device)
    x = torch.randn(3, 2, 4, device=device)
    with torch.inference_mode():
        output = layer(x)[0]
    assert output.is_inference()
    torch.testing.assert_close(output, layer(x)[0].detach(), rtol=0, atol=0)


# What only a GPU has


@pytest.mark.gpu
@each_kernel
@each_dtype
@each_cell
def test_large_sizes(cell: str, dtype: torch.dtype, kernel: str) -> None:
    for sizes in ((5, 40, 33, 200), (4, 100, 64, 256), (3, 7, 20, 650), (3, 130, 8, 512)):
        case = Case(cell, sizes, 2, dtype=dtype, device="cuda", off_kink=True)
        with plan.forced(kernel):
            assert_case_matches_reference(case)
            if sizes[-1] <= 256:
                assert_case_matches_reference(replace(case, norm=True))


@pytest.mark.gpu
@each_kernel
def test_a_new_length_or_batch_compiles_nothing(kernel: str) -> None:
    """But for what the number of rows of a tile is chosen by: up to 16, up to 32, more."""
    kernels = importlib.import_module("rnnkit.triton.kernels")
    compiled = lambda: sum(  # noqa: E731
        len(cache[0])
        for each in (kernels.forward, kernels.backward)
        for cache in each.device_caches.values()
    )
    with plan.forced(kernel):
        call(Case("lstm", (3, 4, 5, 48), device="cuda")).run()
        before = compiled()
        for steps, batch in ((1, 1), (16, 16), (17, 3), (64, 8)):
            call(Case("lstm", (steps, batch, 5, 48), device="cuda")).run()
        assert compiled() == before


@pytest.mark.gpu
@each_kernel
@pytest.mark.parametrize("module", ("LSTM", "GRU"))
def test_captured_in_a_graph(module: str, kernel: str) -> None:
    layer = getattr(rnnkit, module)(20, 40, device="cuda")
    x = torch.randn(5, 3, 20, device="cuda")
    with plan.forced(kernel), torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)[0]
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(output, layer(x)[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_compiled_by_torch() -> None:
    layer = rnnkit.LSTM(8, 24, bidirectional=True, device="cuda")
    x = torch.randn(4, 3, 8, device="cuda", requires_grad=True)
    expected = layer(x)[0]
    found = torch.compile(layer, fullgraph=True)(x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(found.sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


@pytest.mark.gpu
def test_the_backward_pass_runs_on_the_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where autograd runs it in another thread."""
    scan = importlib.import_module("rnnkit.triton.scan")
    ran = []
    monkeypatch.setattr(scan, "backward", lambda *a, real=scan.backward: ran.append(1) or real(*a))
    layer = rnnkit.GRU(4, 8, device="cuda")
    layer(torch.randn(3, 2, 4, device="cuda"))[0].sum().backward()
    assert ran


@pytest.mark.gpu
@each_kernel
def test_tuned(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Whichever way is fastest, the results are right, also at the call that tries them."""
    scan = importlib.import_module("rnnkit.triton.scan")
    monkeypatch.setattr(scan, "AUTOTUNE", True)
    with plan.forced(kernel):
        for _ in range(2):
            assert_case_matches_reference(Case("lstm", (4, 5, 6, 48), 2, device="cuda"))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_values() -> None:
    """Offsets have 64 bits: the last sequences are as if they were alone."""
    it = call(Case("rnn_tanh", (2, 3, 4, 1024), dtype=torch.bfloat16, device="cuda"))
    batch = 2**20 + 40
    x = it.input[:, :1].expand(-1, batch, -1)
    weights = it.weights
    output = ops.layer_forward(LayerCall("rnn_tanh", x, [], weights), None, Keep.NOTHING)[0][0]
    assert output.numel() > 2**31
    few = ops.layer_forward(LayerCall("rnn_tanh", x[:, :64], [], weights), None, Keep.NOTHING)[0][0]
    assert_same_bits([output[:, -64:]], [few])


# Plans


@interpreted
@pytest.mark.parametrize("backward", (False, True))
@each_dtype
@each_cell
def test_tiles(cell: str, dtype: torch.dtype, backward: bool) -> None:
    """What is loaded ahead fits in every GPU's shared memory; one program has all units, or a step is a launch."""
    scan = importlib.import_module("rnnkit.triton.scan")
    hiddens, batches = (1, 16, 33, 64, 128, 200, 256, 512, 1500, 4096), (1, 17, 64, 500)
    for hidden, batch, norm in product(hiddens, batches, (False, True)):
        sizes = Case(cell, (1, batch, 1, hidden), dtype=dtype, norm=norm).scan(backward)
        if scan.why_not(sizes):
            assert norm and scan.choose(replace(sizes, normalizes=False)).kernel == "stepwise"
            continue
        chosen = scan.choose(sizes)
        gates, of_rows = (1, 1) if backward else (CELLS[cell].gates, 2)  # h, and its mask
        ahead = chosen.depth * (gates * chosen.units + of_rows * chosen.rows) * dtype.itemsize
        assert (chosen.stages - 1) * ahead <= 99 * 1024, (sizes, chosen)
        for tried in [chosen, *scan._alternatives(chosen)]:
            assert tried.units >= hidden or (tried.kernel == "stepwise" and not norm), (
                sizes,
                tried,
            )
            assert min(tried.rows, tried.units, tried.depth) >= 16
            assert {n.bit_count() for n in (tried.rows, tried.units, tried.depth)} == {1}


@interpreted
def test_kernels_and_reasons() -> None:
    scan = importlib.import_module("rnnkit.triton.scan")
    small, large = (Case("lstm", (1, 8, 4, hidden)).scan(False) for hidden in (64, 512))
    assert scan.choose(small).kernel == "sequence"
    assert scan.choose(large).kernel == "stepwise"
    assert "no room for more than 128 units" in str(scan.choose(large))
    projected = Case("lstm", (1, 8, 4, 64), projected=5).scan(False)
    assert "projection" in scan.choose(projected).reason
    with plan.forced("stepwise"):
        assert scan.choose(small).kernel == "stepwise"
    with plan.forced("sequence"):
        assert scan.choose(large).kernel == "stepwise"
    normalized = [replace(sizes, normalizes=True) for sizes in (small, large, projected)]
    assert [bool(scan.why_not(sizes)) for sizes in normalized] == [False, True, False]
    assert "no room for more than 128 of 32 bits" in scan.why_not(normalized[1])
    with plan.forced("stepwise"):
        assert scan.choose(normalized[0]).units == 64
    late = replace(small, cell=LATE["reset_before"].graph().to_json())
    assert scan.why_not(late) == "it has no product of another value than h"


@pytest.fixture
def x_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `explain` looks at of a tensor [4, 4, 4] on a GPU, for whose lack it does not fail."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = mock.Mock(device=torch.device("cuda"), dtype=torch.float32)
    x.configure_mock(**{"dim.return_value": 3, "size.return_value": 4})
    return x


@interpreted
def test_explain_says_where_layer_normalization_is_computed(
    x_on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "serving", lambda device: "triton")
    x = x_on_gpu
    for hidden in (64, 512):
        found = rnnkit.explain(rnnkit.LSTM(4, hidden, layer_norm=True), x)
        if hidden == 64:
            assert found.kernel == "sequence" and found.forward.whole and not found.reason
            continue
        assert found.backend == found.kernel == "reference" and found.forward is None
        assert (
            "needs all units" in found.reason and str(found) == f"reference on cuda: {found.reason}"
        )


OF_OWN = {
    "own": lambda: rnnkit.Recurrent(library.peephole_lstm, 4, 64),
    "heads": lambda: rnnkit.Recurrent(library.slstm, 4, 64, heads=4, bidirectional=True),
    "built in": lambda: rnnkit.LSTM(4, 64),
}


@interpreted
@pytest.mark.parametrize("serving", ("triton", "cpp", "reference"))
@pytest.mark.parametrize("beside", (True, False))
@pytest.mark.parametrize("kind", OF_OWN)
def test_what_computes_own_cells(
    kind: str, beside: bool, serving: str, x_on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton, also beside the CUDA extension, which has none; without Triton the reference."""
    module = importlib.import_module("rnnkit.triton.scan")
    monkeypatch.setattr(backends, "serving", lambda device: serving)
    monkeypatch.setattr(backends, "has_kernels", lambda name, device: beside)
    monkeypatch.setattr(cuda, "device_of", lambda index: plan.Gpu(132, 232448, (9, 0)))
    layer = OF_OWN[kind]()
    found = rnnkit.explain(layer, x_on_gpu)
    if serving != "cpp" or kind == "built in":
        assert found.backend == serving and not found.reason
    else:
        assert found.backend == ("triton" if beside else "reference")
        assert "the CUDA extension has no cells of one's own" in str(found)
    heads = getattr(layer, "heads", 1)
    case = Case(layer._cell, (4, 4, 4, 64 // heads), 1 + layer.bidirectional, heads=heads)
    of_backend = {"triton": module, "cpp": cuda, "reference": None}
    assert gpu.serving(call(case)) is of_backend[found.backend]
    if found.backend == "triton":
        assert found.forward == module.choose(case.scan(backward=False))
        assert found.backward == module.choose(case.scan(backward=True))


@interpreted
@pytest.mark.parametrize(
    ("serving", "case", "expected"),
    (
        ("cpp", Case("lstm", heads=2), "triton"),
        ("cpp", Case("lstm", multiplies=False), "cpp"),
        ("cpp", Case("lstm", (2, 2, 2, 512), norm=True), "cpp"),
        ("cpp", Case("lstm", (2, 2, 2, 512), norm=True, heads=2), None),
        ("triton", Case("lstm", (2, 2, 2, 512), norm=True), None),
        ("triton", Case("lstm", (2, 2, 2, 512), heads=2), "triton"),
        ("triton", Case("of a library"), None),
    ),
    ids=str,
)
def test_what_computes_heads_and_given_products(
    serving: str, case: Case, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        REGISTERED, "of a library", CellSpec("of a library", 1, 1, 0, (0,), CELLS["rnn_tanh"].step)
    )
    modules = {"triton": importlib.import_module("rnnkit.triton.scan"), "cpp": cuda, None: None}
    monkeypatch.setattr(backends, "serving", lambda device: serving)
    monkeypatch.setattr(backends, "has_kernels", lambda name, device: True)
    assert gpu.serving(call(case)) is modules[expected]


# The text that is printed


@interpreted
def test_the_text_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKIT_CACHE", str(tmp_path / "cache"))
    derived = derived_of(Graph.from_json(OWN["ind_rnn"]))
    text = printed.source(derived, "cell")
    for _ in range(2):
        module = printed.module(derived, "cell")
        linecache.checkcache()  # as a traceback does
        assert inspect.getsource(module.cell_forward.fn) in text
        assert not Path(str(module.__file__)).exists() and not (tmp_path / "cache").exists()


def test_cells_are_the_reference_s() -> None:
    cells = pytest.importorskip("rnnkit.triton.cells", reason="triton is not installed")
    assert cells.TRITON_CELLS.keys() == CELLS.keys()
    projected = {name for name, cell in cells.TRITON_CELLS.items() if cell.output}
    assert projected == {name for name, spec in CELLS.items() if spec.projects}
