"""The scans of `rnnkit.gpu` on Triton kernels: the plan of a scan, its tiles and launches, and the launching.

A `sequence` plan is one launch for the whole sequence, with a program for each tile of the batch; it needs room for all
hidden units in one program. A `stepwise` plan is one launch a step, and its programs share the units. The kernels are
the same (kernels.py).
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from rnnkit import specs
from rnnkit.call import Keep
from rnnkit.gpu import Backward, GpuCall, stacked
from rnnkit.graph import triton as printed
from rnnkit.graph.kernels import derived_of, graph_of
from rnnkit.plan import Scan, forced_kernel
from rnnkit.triton import kernels
from rnnkit.triton.cells import TRITON_CELLS, Cell

#: Time several plans for each size, once on each kind of GPU, and keep the fastest.
AUTOTUNE = os.environ.get("RNNKIT_TRITON_AUTOTUNE", "0") not in ("", "0")


@dataclass(frozen=True)
class TritonPlan:
    """How a scan is divided into programs and launches.

    Attributes:
        kernel: a name in `plan.TRITON_KERNELS`.
        reason: why this kernel.
        rows, units: of a program's tile.
        depth: products of each sum that are loaded and added up at a time.
        warps: of a program.
        stages: of the pipeline that loads the operands of these products.
        whole: whether a program must have all units of its rows.
    """

    kernel: str
    reason: str
    rows: int
    units: int
    depth: int
    warps: int
    stages: int
    whole: bool = False

    def __str__(self) -> str:
        return (
            f"{self.kernel}: programs of {self.rows} rows x {self.units} units, {self.warps} warps, "
            f"{self.depth} products at a time, {self.stages} stages; {self.reason}"
        )


#: The most units of a program that has all units, by the bytes of an element, of a cell no larger than an LSTM.
_MOST_UNITS = {2: 256, 4: 128, 8: 32}
#: Units of a program where programs share the units, by the bytes of an element.
_UNITS = {2: 32, 4: 32, 8: 16}
#: Weights that a thread loads at a time, by the bytes of an element.
_LOADS = {2: 128, 4: 32, 8: 16}
#: The kind of GPU that the kernels are compiled for, by Triton's name.
TARGET = "hip" if torch.version.hip else "cuda"
#: Bytes of shared memory of a program for operands that are loaded ahead: every GPU of the kind has them.
_SHARED = {"cuda": 90_000, "hip": 60_000}


def why_not(scan: Scan) -> str:
    """See `rnnkit.gpu.Scans`."""
    if scan.cell not in TRITON_CELLS and not scan.cell.startswith("{"):
        return "a registered cell has functions for the CPU alone"
    if specs.of(scan.cell).late > 0:
        return "it has no product of another value than h"
    most = _most_units(scan)
    if scan.normalizes and _all_units(scan) > most:
        return (
            "layer normalization needs all units in one program, which has no room for more than "
            f"{most} of {8 * scan.element_bytes} bits"
        )
    return ""


@cache
def _functions(cell: str) -> Cell:
    """The functions of a cell: of one that is built in, or printed from the graph whose JSON is its name."""
    if cell in TRITON_CELLS:
        return TRITON_CELLS[cell]
    module = printed.module(derived_of(graph_of(cell)), "cell")
    return Cell(*(getattr(module, f"cell_{name}", None) for name in Cell._fields))


def _times_lstm(scan: Scan) -> int:
    """How many times the tiles of an LSTM's gates and states a program of the cell has: a power of 2, at least 1."""
    spec = specs.of(scan.cell)
    tiles = max(spec.gates, spec.recurrent) + spec.states - 2
    return int(triton.next_power_of_2(max(tiles, 4))) // 4


def _most_units(scan: Scan) -> int:
    """The most units of a program that has all units: what fits in registers."""
    return _MOST_UNITS[scan.element_bytes] // _times_lstm(scan)


def _all_units(scan: Scan) -> int:
    """The units of a tile that has all of them."""
    return max(16, int(triton.next_power_of_2(scan.hidden)))


def choose(scan: Scan, device: torch.device | None = None) -> TritonPlan:
    """The plan of a scan, with tiles that fit on every GPU. `plan.forced` may ask for its kernel."""
    return _choose(scan, forced_kernel())


@lru_cache(maxsize=4096)
def _choose(scan: Scan, forced: str) -> TritonPlan:
    units = _all_units(scan)
    most, rows = _most_units(scan), 16
    alone = specs.of(scan.cell).recurrent == 0  # a unit reads no other unit's h
    if scan.projected != scan.hidden:
        kernel, reason = "stepwise", "a projection is a product of its own"
    elif units > most and not alone:
        kernel = "stepwise"
        reason = (
            f"one program has no room for more than {most} units of {8 * scan.element_bytes} bits"
        )
    elif forced == "stepwise":
        kernel, reason = "stepwise", "forced"
    elif alone:
        kernel, reason = "sequence", "no gate has a recurrent part"
    else:
        reason = "forced" if forced == "sequence" else "one program has room for all units"
        kernel = "sequence"
    if (kernel == "stepwise" or alone) and not scan.normalizes:
        units = min(units, _UNITS[scan.element_bytes])
        most_rows = 64 if scan.element_bytes == 2 else 16 if scan.precise else 32
        most_rows = most_rows if _times_lstm(scan) == 1 else 16
        rows = min(most_rows, 16 if scan.batch <= 16 else 32 if scan.batch <= 32 else 64)
    warps = 4 if units * rows < 1024 else 8
    depth, stages = _pipeline(scan, rows, units, warps)
    return TritonPlan(kernel, reason, rows, units, depth, warps, stages, scan.normalizes)


def _pipeline(scan: Scan, rows: int, units: int, warps: int) -> tuple[int, int]:
    """The depth, as large as registers, shared memory and the length of the sums allow, and the stages."""
    gates = max(specs.of(scan.cell).recurrent, 1)
    together, summed = (1, gates * scan.hidden) if scan.backward else (gates, scan.projected)
    loads = _LOADS[scan.element_bytes]
    if _power_of_2_in(scan.hidden, scan.projected) * scan.element_bytes < 8:
        loads //= 4  # rows are not aligned to 8 bytes: elements are loaded one by one
    deepest = min(loads * 32 * warps // (units * together), 64)
    depth = max(16, min(1 << (deepest.bit_length() - 1), int(triton.next_power_of_2(summed))))
    stage, shared = (together * units + rows) * scan.element_bytes, _SHARED[TARGET]
    while depth > 16 and depth * stage > shared:
        depth //= 2
    return depth, 3 if 3 * depth * stage < shared else 2


def _alternatives(plan: TritonPlan) -> list[TritonPlan]:
    """The plans to time instead of `plan`: a short list, of which `plan` is the first."""
    changes: list[dict[str, Any]] = [{"warps": 8 if plan.warps == 4 else 4}, {"stages": 3}]
    if plan.depth > 16:
        changes.append({"depth": plan.depth // 2})
    if plan.kernel == "stepwise" and not plan.whole:
        changes.append({"units": 16} if plan.units > 16 else {"units": 32})
    if plan.kernel == "stepwise":
        changes.append({"depth": 2 * plan.depth, "stages": 2})
    return [*dict.fromkeys([plan, *(replace(plan, **change) for change in changes)])]


@lru_cache
def _tuned(kernel: Any, plan: TritonPlan) -> Any:
    """The kernel, timed with each alternative of `plan` at the first call of each size and dtype."""
    configs = [
        triton.Config(
            {"UNITS": each.units, "DEPTH": each.depth}, num_warps=each.warps, num_stages=each.stages
        )
        for each in _alternatives(plan)
    ]
    key = ["hidden", "projected", "GATES", "RECURRENT", "STATES", "PARAMETERS", "ROWS", "PRECISION"]
    return triton.autotune(configs=configs, key=key, cache_results=True)(kernel)


def _power_of_2_in(*sizes: int) -> int:
    """The largest power of 2, up to 16, that divides all sizes."""
    return math.gcd(16, *sizes)


#: Tuned kernels that were launched and so are loaded: while a graph is captured, nothing can be timed or loaded.
_launched: set[tuple[Any, ...]] = set()


def _launch(
    kernel: Any, grid: Any, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Launches a kernel on the current stream of a device."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:  # Triton 3.9 warns where the default of enable_fp_fusion is relied on
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


def _sum(call: GpuCall) -> Any:
    """The kernels' type of sums."""
    return tl.float64 if call.sum_dtype == torch.float64 else tl.float32


class _Launcher:
    """Launches one pass's kernel for a call, on its device."""

    def __init__(self, kernel: Any, call: GpuCall, plan: TritonPlan) -> None:
        self.kernel, self.plan = kernel, plan
        self.device = call.input.device
        tiles = triton.cdiv(call.batch, plan.rows)
        self.grid = lambda meta: (tiles, triton.cdiv(call.hidden, meta["UNITS"]), call.directions)
        self.constants = {
            "GATES": call.spec.gates,
            "RECURRENT": call.spec.recurrent,
            "STATES": call.spec.states,
            "PARAMETERS": call.spec.parameters,
            "PRECISION": self._precision(call),
            "SUM": _sum(call),
            "ROWS": plan.rows,
            "ALIGNED": _power_of_2_in(call.hidden, call.projected),
        }

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def _precision(call: GpuCall) -> str:
        """Triton's `input_precision`: three TF32 products are as exact as one of float32; few AMD GPUs have TF32."""
        if TARGET == "hip" or call.input.dtype != torch.float32:
            return "ieee"
        return "tf32x3" if call.precise else "tf32"

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        plan, constants = self.plan, self.constants | constants
        if self._is_tuned(arguments, constants):
            run = _tuned(self.kernel, plan)
        else:
            run = self.kernel
            constants |= {"UNITS": plan.units, "DEPTH": plan.depth}
            constants |= {"num_warps": plan.warps, "num_stages": plan.stages}
        _launch(run, self.grid, self.device, *arguments, **constants)

    def _is_tuned(self, arguments: Sequence[Any], constants: dict[str, Any]) -> bool:
        """Whether to launch the tuned kernel: if tuning is on and, in a captured graph, if it was launched before."""
        if not AUTOTUNE or kernels.INTERPRETED:
            return False
        *others, hidden, projected = arguments
        types = [
            getattr(t, "dtype", None) for a in others for t in (a if type(a) is tuple else [a])
        ]
        kind = (self.kernel, self.plan, self.device, hidden, projected, *types, *constants.values())
        if kind not in _launched and self._capturing():
            return False
        _launched.add(kind)
        return True

    def all_steps(
        self, steps: int, states: Tensor, launch: Callable[[Tensor, Tensor, int, int], None]
    ) -> Tensor:
        """The states after all steps, by calls of `launch` with states, new states, first step and number of steps."""
        at_once = steps if self.plan.kernel == "sequence" else 1
        new = torch.empty_like(states)
        for first in range(0, steps, at_once):
            launch(states, new, first, at_once)
            states, new = new, states
        return states


def _plan(call: GpuCall, backward: bool) -> TritonPlan:
    """The plan of a pass: step by step with a projection, also one of as many values as there are units."""
    plan = choose(call.scan(backward))
    return replace(plan, kernel="stepwise") if call.projects else plan


def _states(call: GpuCall, given: Sequence[Tensor | None]) -> Tensor:
    """The states, or gradients of states, `given` as one tensor [S, D, N, H] in the type of sums; zeros for None."""
    shape = (call.spec.states, *call.state_shape(1))
    if all(state is None for state in given):
        return call.input.new_zeros(shape, dtype=call.sum_dtype)
    states = call.input.new_empty(shape, dtype=call.sum_dtype)
    for into, state in zip(states, given, strict=True):
        if state is None:
            into.zero_()
        else:
            into.copy_(state)
    return states


def _of_width_h(call: GpuCall, states: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The states, or gradients of states, that the kernels carry: None for an h of P values."""
    return [None if call.projects and k == 0 else state for k, state in enumerate(states)]


def _zoneout(call: GpuCall) -> tuple[tuple[Tensor | None, ...] | None, tuple[float, ...] | None]:
    """The kernels' `kept` and `ZONEOUT`, see zoneout.py; both None if no state has zoneout."""
    if not any(p > 0 for p in call.zoneout):
        return None, None
    # With masks the probabilities do not count: another one compiles nothing.
    probabilities = [p if call.kept is None else 0.0 for p in call.zoneout]
    return tuple(map(call.kept_of, range(call.spec.states))), tuple(probabilities)


def forward(
    call: GpuCall,
    gates: Tensor,
    keep: int,
    output: Tensor | None,
    finals: Sequence[Tensor],
    reserve: Tensor,
    all_states: Sequence[Tensor] = (),
) -> None:
    """The scan forward, see `rnnkit.gpu.Scans`."""
    plan = _plan(call, backward=False)
    if call.steps == 1:  # programs may share the units, so that tuning tries tiles of fewer units
        plan = replace(plan, kernel="stepwise")
    launch = _Launcher(kernels.forward, call, plan)
    w_hh, w_hr = stacked(call.w_hh), call.w_hr
    b_ih, b_hh = stacked(call.b_ih), stacked(call.b_hh)
    norms, unit = call.norms(), call.unit()
    offsets, initial = call.offsets(), call.states[0] if call.states else None
    reset_h = call.reset_states[0] if call.reset_states else None
    reset_states = None
    if call.reset_states:
        reset_states = _states(call, _of_width_h(call, call.reset_states))
    kept, zoneout = _zoneout(call)
    projects = call.projects and output is not None
    new_h = call.input.new_empty(call.state_shape(1)) if projects else output
    history = gates if output is None else output  # where a single step reads nothing

    def step(states: Tensor, new_states: Tensor, first: int, steps: int) -> None:
        launch(
            *(gates, b_ih, b_hh, *norms, unit, w_hh, initial, states, new_states, offsets),
            *(call.reset, reset_h, reset_states, call.operand_mask, kept, history, new_h),
            tuple(all_states) or None,
            reserve if keep else None,
            *(gates.stride(0), call.batch, call.rows, call.steps - 1, call.heads, first, steps),
            *(call.hidden, call.projected),
            CELL=_functions(call.cell).forward,
            EVERYTHING=keep == Keep.EVERYTHING,
            VALUES=reserve.size(2) if keep else 0,
            KEEPS_GIVEN=call.keeps_given,
            ZONEOUT=zoneout,
            PROJECTS=projects,
        )
        for d in range(call.directions if projects else 0):
            weight = w_hr[d]
            assert output is not None and new_h is not None and weight is not None
            rows = call.rows_of(d, first)
            columns = slice(d * call.projected, (d + 1) * call.projected)
            output[rows, columns] = new_h[d, : rows.stop - rows.start] @ weight.t()

    given = _of_width_h(call, call.initial_states or [None] * call.spec.states)
    states = launch.all_steps(call.steps, _states(call, given), step)
    for k, final in enumerate(finals):
        if projects and k == 0:
            assert output is not None
            call.last_rows(output, out=final)
        else:
            final.copy_(states[k])


def backward(
    back: Backward,
    initial_grads: Sequence[Tensor | None],
    grad_all_states: Sequence[Tensor | None] = (),
) -> Tensor | None:
    """The scan backward, see `rnnkit.gpu.Scans`."""
    call = back.call
    launch = _Launcher(kernels.backward, call, _plan(call, backward=True))
    grad_output, *grad_finals = back.grads
    w_hh, w_hr = stacked(call.w_hh), stacked(call.w_hr)
    weights, norms, unit = w_hh if w_hr is None else w_hr, call.norms(), call.unit()
    functions = _functions(call.cell)
    offsets, initial = call.offsets(), call.states[0] if call.states else None
    reset_h = call.reset_states[0] if call.reset_states else None
    kept, zoneout = _zoneout(call)
    grad_resets = None if call.reset is None else _states(call, [None] * call.spec.states)
    grad_recurrent = grad_projected = grad_reset_h = None
    if call.projects:
        assert w_hr is not None
        grad_recurrent = call.input.new_zeros(call.state_shape(0))
        if grad_finals[0] is not None:
            grad_recurrent.copy_(grad_finals[0])
        if call.reset is not None:
            grad_reset_h = call.input.new_zeros(call.state_shape(0), dtype=call.sum_dtype)
        grad_projected = call.input.new_empty(call.directions, call.rows, call.projected)

    def step(grad_states: Tensor, new_grad_states: Tensor, first: int, steps: int) -> None:
        if grad_recurrent is not None and grad_projected is not None:
            _grad_projected(back, w_hh, grad_recurrent, grad_projected, grad_reset_h, first)
        launch(
            *(weights, *norms, unit, initial, grad_states, new_grad_states, offsets),
            *(
                call.reset,
                reset_h,
                grad_resets,
                call.operand_mask,
                kept,
                back.output,
                back.reserve,
                None if w_hr is not None else grad_output,
            ),
            tuple(grad_all_states) if any(g is not None for g in grad_all_states) else None,
            *(grad_projected, back.grad_gates, tuple(back.flow) or None),
            *(call.batch, call.rows, call.steps - 1, call.heads, first, steps),
            *(call.hidden, call.projected),
            CELL=functions.backward,
            SAVED=call.spec.saved,
            VALUES=back.reserve.size(2),
            GRAD_STATES=functions.grad_states if back.flow else None,
            GRAD_COLUMNS=back.grad_columns,
            GRAD_CLIP=call.grad_clip or None,
            GRAD_CUT=call.grad_cut,
            KEEPS_GIVEN=call.keeps_given,
            ZONEOUT=zoneout,
        )

    # One step more takes the gradients to the initial states.
    steps = call.steps + (bool(call.states) and not call.projects)
    states = call.spec.states
    given = _states(call, _of_width_h(call, grad_finals))
    grad_states = launch.all_steps(steps, given, step)
    for k, grad in enumerate(initial_grads[:states]):
        if grad is not None and k == 0 and grad_recurrent is not None:
            _grad_operand(back, w_hh, grad_recurrent, grad_reset_h, call.steps)
            grad.copy_(grad_recurrent)
        elif grad is not None:
            grad.copy_(grad_states[k])
    for k, grad in enumerate(initial_grads[states:]):
        if grad is not None and grad_resets is not None:
            grad.copy_(grad_resets[k] if k > 0 or grad_reset_h is None else grad_reset_h)
    return grad_projected


def _grad_operand(
    back: Backward,
    w_hh: Tensor | None,
    grad_recurrent: Tensor,
    grad_reset: Tensor | None,
    step: int,
) -> None:
    """Writes the gradient of the later step's operand, h, to the rows of that step in `grad_recurrent` [D, N, P].

    That of rows which are put back before the later step is added to `grad_reset` [D, N, P] instead. The other rows
    keep what they have. Steps are counted backward: step 0 is the last one, which has no later step.
    """
    call = back.call
    width = call.spec.recurrent * call.hidden
    for d in range(call.directions if step else 0):
        rows = call.rows_of(d, call.steps - step)
        first = d * back.grad_columns * call.hidden
        columns, count = slice(first, first + width), rows.stop - rows.start
        passed = grad_recurrent[d, :count]
        if w_hh is None:
            passed.zero_()
        else:
            torch.mm(back.grad_gates[rows, columns], w_hh[d], out=passed)
        if call.operand_mask is not None:
            passed.mul_(call.operand_mask[d, :count])
        if call.grad_clip > 0:
            passed.clamp_(-call.grad_clip, call.grad_clip)
        begins = call.resets(d, call.steps - step)
        if begins is not None and grad_reset is not None:
            mask = begins.unsqueeze(-1)
            continuing = passed[: begins.size(0)]
            grad_reset[d, : begins.size(0)] += continuing.where(mask, 0)
            continuing.masked_fill_(mask, 0)
        if call.cuts(d, call.steps - step):
            earlier = call.rows_of(d, call.steps - step - 1)
            passed[: earlier.stop - earlier.start].zero_()


def _grad_projected(
    back: Backward,
    w_hh: Tensor | None,
    grad_recurrent: Tensor,
    grad_projected: Tensor,
    grad_reset: Tensor | None,
    step: int,
) -> None:
    """Writes the whole gradient of h after its projection, of one step, to its rows in `grad_projected` [D, rows, P].

    grad_recurrent: [D, N, P], on entry the gradient of each row's h without that of the output, as the later steps left
    it, or of the final h; on return with the gradient of the later step's operand. grad_reset: see `_grad_operand`.
    """
    call = back.call
    _grad_operand(back, w_hh, grad_recurrent, grad_reset, step)
    for d in range(call.directions):
        rows = call.rows_of(d, call.steps - 1 - step)
        sums = grad_recurrent[d, : rows.stop - rows.start]
        if back.grads[0] is None:
            grad_projected[d, rows] = sums
        else:
            columns = slice(d * call.projected, (d + 1) * call.projected)
            grad_output = back.grads[0].view(call.rows, -1)[rows, columns]
            torch.add(sums, grad_output, out=grad_projected[d, rows])


def unprojected(call: GpuCall, reserve: Tensor) -> Tensor:
    """h before its projection at all steps, [D, rows, H], from a reserve [D, rows, V, H] of everything."""
    output = _functions(call.cell).output
    assert output is not None, f"{call.cell} has no projection"
    h = call.input.new_empty(call.directions, call.rows, call.hidden)
    units = _all_units(call.scan(backward=True)) if call.normalizes else 64
    rows, of_cell = 16, (*call.norms()[1:], call.unit())
    _launch(
        kernels.unprojected,
        (triton.cdiv(call.rows, rows), triton.cdiv(call.hidden, units), call.directions),
        call.input.device,
        *(reserve, *of_cell, h, call.rows, call.hidden),
        OUTPUT=output,
        SAVED=call.spec.saved,
        VALUES=reserve.size(2),
        PARAMETERS=call.spec.parameters,
        SUM=_sum(call),
        ROWS=rows,
        UNITS=units,
        ALIGNED=_power_of_2_in(call.hidden),
    )
    return h
