"""The CUDA kernels' host build (host_build.py): every kernel, size and layout on the CPU, against the reference."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import host_build
import pytest
import test_kernels
import torch
from kernel_cases import (
    NOISE,
    NOISE_OF_FEW,
    NORMS_OF_FEW,
    NORMS_OF_LSTM,
    RESETS,
    RESETS_AND_NOISE,
    Case,
    assert_case_matches_reference,
    assert_matches_reference,
    assert_same_bits,
    call,
    small_cases,
)
from test_kernels import BAD_BACKWARDS, BAD_CALLS
from tolerances import assert_close_to_truth

from rnnkit import cuda, gpu, instances, plan
from rnnkit import ops as rnnkit_ops
from rnnkit.call import Keep
from rnnkit.specs import CELLS

pytestmark = pytest.mark.skipif(
    bool(host_build.why_not()), reason=host_build.why_not() or "it can be built"
)

#: The kernels that are one launch for all steps.
IN_ONE_LAUNCH = [name for name in plan.KERNELS if name != "stepwise"]

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", host_build.DTYPES, ids=str)
each_kernel = pytest.mark.parametrize("kernel", plan.KERNELS)
#: Small cases on each kernel that runs them: projections and layer normalization go step by step.
each_small_case = pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (case, kernel)
        for case, kernel in product(small_cases(), plan.KERNELS)
        if kernel == "stepwise" or not (case.projected or case.norm)
    ],
    ids=str,
)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compiles ahead of the tests, whose time is limited."""
    host_build.library()


@pytest.fixture
def ops(built: None) -> Iterator[None]:
    """The test runs on the host build."""
    with host_build.ops():
        yield


on_host = pytest.mark.usefixtures("ops")


def kernels_of(case: Case, precise: bool = True) -> list[plan.Plan]:
    """The plans of both passes."""
    scans = (case.scan(backward, precise) for backward in (False, True))
    return [plan.choose(scan, host_build.DEVICE) for scan in scans]


# Numbers

#: T, N, I, H: less and more than a chunk of the weights, a tile and a slice; odd, and in whole vectors.
SIZES = (
    (1, 1, 8, 1),
    (1, 9, 3, 33),
    (2, 70, 4, 20),
    (3, 19, 7, 40),
    (4, 3, 5, 17),
    (5, 8, 12, 64),
    (6, 2, 9, 100),
)
VARIANTS: tuple[dict, ...] = (
    {},
    {"lengths": (5, 3, 3, 1)},
    {"bias": False, "states": False},
    {"lengths": tuple(range(19, 0, -1)), "states": False},
    {"lengths": (4,) * 3 + (3,) * 9 + (1,) * 16, "bias": False},
    {"states": False},
    {"grad_clip": 0.05, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
    {"grad_clip": 0.05, "grad_cut": 3, "lengths": (7,) * 7 + (3,) * 9 + (2,) * 12},
    {"grad_clip": 0.05},
    *RESETS,
    *NOISE,
)


def cases() -> Iterator[tuple[Case, str]]:
    """Every cell in every dtype at every size, on every kernel; all else is drawn along diagonals."""
    for at, (cell, dtype) in enumerate(product(CELLS, (*host_build.DTYPES, torch.float64))):
        kernels = plan.KERNELS if dtype != torch.float64 else ("stepwise",)
        for row, (index, sizes) in product(range(len(kernels)), enumerate(SIZES)):
            draw = at + row + index
            case = Case(cell, sizes, 1 + draw % 2, dtype=dtype, off_kink=True)
            case = replace(case, all_states=CELLS[cell].states > 1 and draw % 3 == 0)
            yield replace(case, **VARIANTS[(at + 2 * row + index) % len(VARIANTS)]), kernels[row]


CASES = list(cases())


@on_host
@pytest.mark.parametrize(
    ("case", "kernel", "keep"),
    [
        (case, kernel, Keep.STATES if index % 3 == 0 else Keep.EVERYTHING)
        for index, (case, kernel) in enumerate(CASES)
    ],
    ids=lambda value: value.name if isinstance(value, Keep) else str(value),
)
def test_against_reference(case: Case, kernel: str, keep: Keep) -> None:
    with plan.forced(kernel):
        assert [chosen.kernel for chosen in kernels_of(case)] == [kernel] * 2
        assert_case_matches_reference(case, keep)


@on_host
@each_dtype
@pytest.mark.parametrize(
    "variant",
    (
        {},
        {"lengths": (4, 3, 3, 1)},
        {"grad_clip": 0.05, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
        {"resets": 0.4},
        {"resets": 0.4, "directions": 1, "reset_states": True},
        {"resets": 0.4, "directions": 1, "grad_clip": 0.05, "grad_cut": 2, "states": False},
        {"resets": 0.4, "reset_states": True, "lengths": (5, 4, 2, 1), "grad_clip": 0.05},
        {"operand_mask": True},
        {"operand_mask": True, "directions": 1, "zoneout": (0, 0.3)},
        {"operand_mask": True, "lengths": (5, 4, 2, 1), "grad_clip": 0.05, "grad_cut": 2},
        {**RESETS_AND_NOISE, "zoneout": (0, 0.3), "lengths": (5, 4, 2, 1), "all_states": True},
        {"zoneout": (0, 0.3), "expects": True, "states": False},
    ),
    ids=(
        *("dense", "ragged", "gradient rule", "reset", "to states", "with a rule", "ragged, reset"),
        *("masked", "direct, masked", "masked with a rule", "all of it", "expectation"),
    ),
)
def test_projection(variant: dict, dtype: torch.dtype) -> None:
    """Runs step by step, whatever is forced."""
    options: dict = {"directions": 2, "projected": 11, "dtype": dtype, **variant}
    case = Case("lstm", (4, 9, 5, 33), **options)
    with plan.forced(IN_ONE_LAUNCH[len(str(variant)) % len(IN_ONE_LAUNCH)]):
        assert [chosen.kernel for chosen in kernels_of(case)] == ["stepwise"] * 2
        assert_case_matches_reference(case)


def normalized_cases() -> Iterator[tuple[Case, Keep]]:
    """Every cell in every dtype in every variant; directions and what is kept are drawn along diagonals."""
    for at, (cell, dtype) in enumerate(product(CELLS, (*host_build.DTYPES, torch.float64))):
        variants = NORMS_OF_FEW + (NORMS_OF_LSTM if CELLS[cell].has_source else ())
        for row, variant in enumerate(variants):
            case = Case(cell, (3, 4, 5, 33), 1 + (at + row) % 2, dtype=dtype, off_kink=True)
            keep = Keep.STATES if (at + row // 2) % 2 else Keep.EVERYTHING
            yield replace(case, **variant), keep


@on_host
@pytest.mark.parametrize(
    ("case", "keep"),
    list(normalized_cases()),
    ids=lambda value: value.name if isinstance(value, Keep) else str(value),
)
def test_layer_normalization(case: Case, keep: Keep) -> None:
    """Runs step by step, whatever is forced."""
    with plan.forced("persistent"):
        assert [chosen.kernel for chosen in kernels_of(case)] == ["stepwise"] * 2
        assert_case_matches_reference(case, keep)


@on_host
def test_the_kernels_normalize(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call falls back to the reference."""
    for name in ("forward_composite", "backward_composite"):
        monkeypatch.setattr(rnnkit_ops, name, lambda *_: pytest.fail("the reference ran"))
    for cell in CELLS:
        call(Case(cell, (2, 3, 4, 33), 2, norm=True, off_kink=True)).run()


@on_host
def test_normalized_values_of_any_mean_and_size() -> None:
    test_kernels.test_normalized_values_of_any_mean_and_size("cpu")


@on_host
@each_kernel
@pytest.mark.parametrize("lengths", ((), (5, 3, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize("rule", ((0.05, 0), (0.0, 2), (0.1, 3)), ids=str)
@each_cell
def test_what_a_step_passes_back(
    cell: str, rule: tuple[float, int], lengths: tuple[int, ...], kernel: str
) -> None:
    """Clipped to the first number, cut every so many steps as the second says."""
    clip, cut = rule
    case = Case(cell, (5, 4, 3, 33), 2, lengths, off_kink=True, grad_clip=clip, grad_cut=cut)
    with plan.forced(kernel):
        assert_case_matches_reference(case)


@on_host
@each_kernel
@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize(
    "variant",
    (
        {"lengths": (5, 3, 3, 1)},
        {"reset_states": True, "lengths": (5, 5, 3, 2, 2, 1), "grad_clip": 0.05},
        {"reset_states": True, "grad_clip": 0.05, "grad_cut": 2},
        {"states": False, "grad_cut": 3},
    ),
    ids=("ragged", "ragged, to states", "with a rule", "cut"),
)
@each_cell
def test_resets(cell: str, variant: dict, directions: int, kernel: str) -> None:
    """At boundaries that are also cut, and of rows that end, begin later or do neither there."""
    all_states = directions == 2 and CELLS[cell].states > 1
    options = {"off_kink": True, "all_states": all_states, **variant}
    case = Case(cell, (5, 6, 3, 33), directions, resets=0.4, **options)
    with plan.forced(kernel):
        assert_case_matches_reference(case)


@on_host
@each_kernel
@pytest.mark.parametrize("lengths", ((), (5, 3, 3, 1)), ids=("dense", "ragged"))
@each_cell
def test_inputs_that_are_products(cell: str, lengths: tuple[int, ...], kernel: str) -> None:
    case = Case(cell, (5, 6, 3, 33), 2, lengths, multiplies=False, off_kink=True)
    with plan.forced(kernel):
        assert_case_matches_reference(case)


@on_host
@each_small_case
def test_a_mask_without_resets_changes_no_bit(case: Case, kernel: str) -> None:
    it = call(case)
    with plan.forced(kernel):
        expected = it.run()
        never = torch.zeros(it.input.shape[:-1], dtype=torch.bool)
        assert_same_bits(replace(it, reset=never).run(), expected)


@on_host
@each_kernel
@pytest.mark.parametrize("index", range(len(NOISE_OF_FEW)), ids=lambda k: "-".join(NOISE_OF_FEW[k]))
@each_cell
def test_noise(cell: str, index: int, kernel: str) -> None:
    """Of rows that begin late and end early, with cuts, clips and resets."""
    variant, at = NOISE_OF_FEW[index], index + list(CELLS).index(cell)
    # Every kernel has each variant of some cell with either number of directions and keeping either.
    directions, keep = 1 + at % 2, (Keep.STATES, Keep.EVERYTHING)[at // 2 % 2]
    all_states = directions == 2 and CELLS[cell].states > 1
    case = Case(cell, (4, 6, 3, 33), directions, off_kink=True, all_states=all_states, **variant)
    with plan.forced(kernel):
        assert_case_matches_reference(case, keep)


@on_host
@each_small_case
def test_noise_that_changes_nothing_changes_no_bit(case: Case, kernel: str) -> None:
    it = call(case)
    zoneout = (0.0 if case.projected else 0.5, 0.5)[-it.spec.states :]
    count = sum(p > 0 for p in zoneout)
    kept = torch.zeros(count, *it.output_shape(it.spec.states - 1), dtype=torch.bool)
    with plan.forced(kernel):
        expected = it.run()
        assert_same_bits(replace(it, zoneout=zoneout, kept=kept).run(), expected)
        ones = torch.ones(it.state_shape(0))
        assert_same_bits(replace(it, operand_mask=ones).run(), expected)


@on_host
@each_kernel
@pytest.mark.parametrize("expects", (False, True), ids=("masks", "expectation"))
@each_cell
def test_what_is_kept_of_noise_changes_no_bit(cell: str, expects: bool, kernel: str) -> None:
    case = Case(cell, (4, 6, 3, 33), operand_mask=True, zoneout=(0.3, 0.2), expects=expects)
    with plan.forced(kernel):
        test_kernels.test_what_is_kept_changes_no_bit(case)


@on_host
@each_cell
def test_masks_of_sequences_that_begin_late_in_a_second_group(cell: str) -> None:
    """A thread has the masks of one group at a time, and an initial h is masked after its sequence's last step."""
    lengths = (4,) * 3 + (2,) * 3 + (1,) * 9
    case = Case(cell, (4, 15, 5, 37), 2, lengths, operand_mask=True, off_kink=True)
    with plan.forced("cluster", units=16, batch_tile=16):
        assert [(p.tiles, p.batch_tile) for p in kernels_of(case)] == [(1, 16)] * 2
        assert_case_matches_reference(case)


@on_host
@each_kernel
def test_zoneout_selects(kernel: str) -> None:
    with plan.forced(kernel):
        test_kernels.test_zoneout_selects("cpu")


@on_host
@each_kernel
@pytest.mark.parametrize("projected", (0, 11))
@each_cell
def test_nan_does_not_pass_a_reset(cell: str, projected: int, kernel: str) -> None:
    """Into no row that is put back after it, in either direction, and into none beside it."""
    if projected and not CELLS[cell].projects:
        pytest.skip("h is not projected")
    case = Case(cell, (6, 3, 5, 33), 2, projected=projected, off_kink=True)
    it = call(replace(case, resets=0.5, reset_states=True))
    assert it.reset is not None
    it.reset.zero_()
    it.reset[3, 1] = it.reset[3, 2] = True
    broken = replace(it, input=it.input.clone())
    broken.input[0, 1] = broken.input[5, 2] = torch.nan
    with plan.forced(kernel):
        (expected,), _, _ = it.forward()
        (found,), _, _ = broken.forward()
    reached = torch.zeros(6, 3, 2, dtype=torch.bool)
    reached[:3, 1, 0] = reached[0, 1, 1] = True
    reached[5, 2, 0] = reached[3:, 2, 1] = True
    reached = reached.repeat_interleave(projected or 33, 2)
    assert torch.equal(found.isnan(), reached)
    assert_same_bits([found.where(~reached, expected)], [expected])


@on_host
@each_dtype
@each_cell
def test_every_kernel_that_is_built(cell: str, dtype: torch.dtype) -> None:
    """In one slice and in several, the last of them not full; those of most tiles also with more than they take."""
    for kernel in IN_ONE_LAUNCH:
        of_passes = [
            instances.units_of(kernel, backward, CELLS[cell].gates) for backward in (False, True)
        ]
        for units in sorted({*of_passes[0], *of_passes[1]}):
            built = [of_pass.get(units, ()) for of_pass in of_passes]
            for tiles in sorted({*built[0], *built[1]}):
                batch_tile = 8 * tiles
                batches = [(batch_tile - 3, batch_tile), (2 * batch_tile - 3, batch_tile)]
                batches.append(batches[0])
                if tiles == max(*built[0], *built[1]):
                    batches.append((2 * batch_tile - 3, 2 * batch_tile))
                for index, (batch, batch_tile) in enumerate(batches):
                    case = Case(cell, (3, batch, 5, 37), 1 + index % 2, dtype=dtype, off_kink=True)
                    if index != 1:  # also in several groups and in the first slice alone
                        noise = {"operand_mask": True, "zoneout": (0.3, 0.2)} if index > 1 else {}
                        case = replace(case, resets=0.3, reset_states=True, **noise)
                    with plan.forced(kernel, units=units, batch_tile=batch_tile):
                        for chosen, tiles_of in zip(kernels_of(case), built, strict=True):
                            found = (chosen.kernel, chosen.units, chosen.tiles)
                            assert tiles not in tiles_of or found == (kernel, units, tiles)
                        assert_case_matches_reference(case)


@on_host
@pytest.mark.parametrize("kernel", IN_ONE_LAUNCH)
@each_cell
def test_tf32(cell: str, kernel: str) -> None:
    """Where torch's switch allows it, factors are rounded, both of them; elsewhere they are not."""
    it = call(Case(cell, (5, 19, 6, 65), 2, off_kink=True))
    truth, baseline = it.to(torch.float64).reference(), it.reference()
    with plan.forced(kernel):
        exact = it.run()
        torch.backends.cudnn.allow_tf32 = True
        rounded = it.run()
    for name, result in rounded.items():
        gradient = name.startswith("grad")
        assert not torch.equal(result, exact[name]), name
        assert_close_to_truth(
            result, baseline[name], truth[name], gradient=gradient, tf32=True, name=name
        )


@on_host
@pytest.mark.parametrize("case", [case for case, _ in CASES[:: len(SIZES) - 1]], ids=str)
def test_the_kernels_find_what_another_kept(case: Case) -> None:
    """Every kernel's backward pass on every kernel's reserve."""
    it = call(case)
    truth, baseline = it.to(torch.float64).reference(), it.reference()
    for first, second in product(plan.KERNELS, repeat=2):
        with plan.forced(first):
            outputs, finals, reserve = it.forward()
        with plan.forced(second):
            results = it.named(outputs, finals, it.backward(outputs, reserve))
        for name, result in results.items():
            assert_close_to_truth(
                result,
                baseline[name],
                truth[name],
                gradient=name.startswith("grad"),
                name=f"{name} by {first}, {second}",
            )


# Beside the ops of a layer


@on_host
@pytest.mark.parametrize("lengths", ((), (4, 3, 3, 1)), ids=("dense", "ragged"))
@pytest.mark.parametrize("dtype", (*host_build.DTYPES, torch.float64), ids=str)
def test_h_before_its_projection(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    """Found from the reserve it is what the projection made the output of."""
    it = call(Case("lstm", (4, 9, 5, 33), 2, lengths, projected=11, dtype=dtype))
    layer = gpu.GpuCall.of(it)
    with host_build.ops():
        (output,), _, reserve = it.forward()
    h = cuda.unprojected(layer, reserve)
    assert h.shape == (2, layer.rows, 33) and h.dtype == dtype
    weights = [w for w in layer.w_hr if w is not None]
    products = [of_direction @ w.t() for of_direction, w in zip(h, weights, strict=True)]
    torch.testing.assert_close(output.view(layer.rows, -1), torch.cat(products, 1))


# Arguments


@on_host
@each_small_case
@pytest.mark.parametrize(
    "check",
    [
        test_kernels.test_only_needed_gradients,
        test_kernels.test_needing_what_is_not_there_gives_nothing,
        test_kernels.test_missing_incoming_gradients_are_zero,
        test_kernels.test_expanded_tensors,
        test_kernels.test_arguments_are_only_read,
        test_kernels.test_results_have_memory_of_their_own,
        test_kernels.test_what_is_kept_changes_no_bit,
    ],
)
def test_as_the_cpu_s_kernels(check: Callable[[Case], None], case: Case, kernel: str) -> None:
    with plan.forced(kernel):
        check(case)


@on_host
@each_kernel
@pytest.mark.parametrize("layout", test_kernels.LAYOUTS)
@each_dtype
@each_cell
def test_layout(cell: str, dtype: torch.dtype, layout: Callable, kernel: str) -> None:
    """At sizes whose rows are loaded in whole vectors where they lie well."""
    it = call(Case(cell, (2, 3, 8, 16), 1, dtype=dtype, off_kink=True))
    with plan.forced(kernel):
        assert_matches_reference(it, it.map(layout).run())
        outputs, finals, reserve = it.forward()
        grads = it.backward([layout(output) for output in outputs], layout(reserve))
        assert_matches_reference(it, it.named(outputs, finals, grads))


@on_host
@each_kernel
@pytest.mark.parametrize("missing", ("b_ih", "b_hh"))
@each_cell
def test_one_bias_missing(cell: str, missing: str, kernel: str) -> None:
    with plan.forced(kernel):
        test_kernels.test_one_bias_missing(Case(cell, directions=2), missing)


@on_host
@each_kernel
@pytest.mark.parametrize("sizes", [(3, 2, 5, 0), (3, 0, 5, 4), (3, 2, 0, 4), (1, 0, 0, 0)])
@each_cell
def test_empty(cell: str, sizes: tuple[int, int, int, int], kernel: str) -> None:
    with plan.forced(kernel):
        test_kernels.test_empty("cpu", cell, torch.float32, 2, sizes)


@on_host
@each_kernel
@pytest.mark.parametrize("grad_clip", (0.0, 0.1))
@pytest.mark.parametrize("place", ("input", "state", "grad"))
@pytest.mark.parametrize("lengths", ((), (4, 4, 3, 2, 1)), ids=("dense", "ragged"))
@each_cell
def test_nan_stays_in_its_row(
    cell: str, lengths: tuple[int, ...], place: str, grad_clip: float, kernel: str
) -> None:
    with plan.forced(kernel):
        test_kernels.test_special_values_stay_in_their_row(
            "cpu", cell, lengths, place, float("nan"), grad_clip, torch.bfloat16
        )


# Errors


@on_host
@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_are_refused(what: str) -> None:
    test_kernels.test_bad_calls_are_refused("cpu", what)


@on_host
@pytest.mark.parametrize("what", BAD_BACKWARDS)
def test_bad_backward_calls_are_refused(what: str) -> None:
    test_kernels.test_bad_backward_calls_are_refused("cpu", what)


@on_host
def test_the_plan_is_checked() -> None:
    """A plan that no kernel is built for, or with too little memory to exchange through, is an error."""
    it = call(Case("gru"))
    with plan.forced("persistent"), pytest.MonkeyPatch.context() as patch:
        real = plan.choose
        for wrong in (
            {"units": 5},
            {"tiles": 3},
            {"batch_tile": 12},
            {"workspace_bytes": 16},
        ):
            patch.setattr(plan, "choose", lambda *a, wrong=wrong: replace(real(*a), **wrong))
            with pytest.raises(RuntimeError, match=r"plan|kernel|workspace"):
                it.forward()


@on_host
@pytest.mark.parametrize("kernel", IN_ONE_LAUNCH)
@each_cell
def test_the_plan_counts_shared_memory_as_the_kernel_does(cell: str, kernel: str) -> None:
    """Each launch compares the numbers, so that every test on the host build does; this one sees that it refuses."""
    case, real = Case(cell), plan.choose
    it = call(case)
    with plan.forced(kernel):
        outputs, _, reserve = it.forward()
        runs = (it.forward, lambda: it.backward(outputs, reserve))
        for run, chosen in zip(runs, kernels_of(case), strict=True):
            for wrong in (chosen.shared_bytes - 4, chosen.shared_bytes + 4):
                expected = f"a plan with {chosen.shared_bytes} bytes of shared memory, got {wrong}"
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        plan,
                        "choose",
                        lambda *a, wrong=wrong: replace(real(*a), shared_bytes=wrong),
                    )
                    with pytest.raises(RuntimeError, match=expected):
                        run()
