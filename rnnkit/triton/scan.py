"""The scans of `rnnkit.gpu` on Triton kernels: how they are cut into programs and launched.

`sequence` is one launch for the whole sequence, a program for each tile of the batch, where one program can hold all
hidden units; `stepwise` is one launch a step, whose programs share the units. The kernel is the same (kernels.py).
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from rnnkit import plan
from rnnkit.gpu import Backward, Call, stacked
from rnnkit.ops import Keep
from rnnkit.reference import CELLS as SPECS
from rnnkit.triton import kernels
from rnnkit.triton.cells import CELLS

#: Try several ways of cutting each size, once on each kind of GPU, and keep the fastest.
AUTOTUNE = os.environ.get("RNNKIT_TRITON_AUTOTUNE", "0") not in ("", "0")


@dataclass(frozen=True)
class Plan:
    """A design and its launch.

    Attributes:
        kernel: a name in `plan.TRITON_KERNELS`.
        reason: why this one.
        rows, units: of a program's tile.
        depth: how many products of each are added up at a time.
        warps: of a program.
        stages: of the pipeline from memory to these products.
    """

    kernel: str
    reason: str
    rows: int
    units: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return (
            f"{self.kernel}: programs of {self.rows} rows x {self.units} units, {self.warps} warps, "
            f"{self.depth} products at a time, {self.stages} stages; {self.reason}"
        )


#: The most units of a program that has all of them, by the bytes of an element: what fits in registers.
_MOST_UNITS = {2: 256, 4: 128, 8: 32}
#: Units of a program that shares them with others.
_UNITS = {2: 32, 4: 32, 8: 16}
#: Weights that a thread loads at a time.
_LOADS = {2: 128, 4: 32, 8: 16}
#: What the kernels are compiled for.
TARGET = "hip" if torch.version.hip else "cuda"
#: Shared memory of a program, for what is loaded ahead: every GPU of these kinds has as much.
_SHARED = {"cuda": 90_000, "hip": 60_000}


def choose(scan: plan.Scan, device: torch.device | None = None) -> Plan:
    """The design for a scan, and tiles that fit everywhere; or the design that `plan.forced` asks for."""
    return _choose(scan, plan.forced_kernel())


@lru_cache(maxsize=4096)
def _choose(scan: plan.Scan, forced: str) -> Plan:
    units = max(16, triton.next_power_of_2(scan.hidden))
    most = _MOST_UNITS[scan.element_bytes]
    rows = 16
    if scan.projected != scan.hidden:
        design, reason = "stepwise", "a projection is a product of its own"
    elif units > most:
        design = "stepwise"
        reason = (
            f"one program has no room for more than {most} units of {8 * scan.element_bytes} bits"
        )
    elif forced == "stepwise":
        design, reason = "stepwise", "forced"
    else:
        reason = "forced" if forced == "sequence" else "one program has room for all units"
        design = "sequence"
    if design == "stepwise":
        units = min(units, _UNITS[scan.element_bytes])
        most_rows = 64 if scan.element_bytes == 2 else 16 if scan.precise else 32
        rows = min(most_rows, 16 if scan.batch <= 16 else 32 if scan.batch <= 32 else 64)
    warps = 4 if units * rows < 1024 else 8
    depth, stages = _pipeline(scan, rows, units, warps)
    return Plan(design, reason, rows, units, depth, warps, stages)


def _pipeline(scan: plan.Scan, rows: int, units: int, warps: int) -> tuple[int, int]:
    """Depth, as registers and shared memory allow, and no deeper than what is to be added up; and stages."""
    gates = SPECS[scan.cell].gates
    together, summed = (1, gates * scan.hidden) if scan.backward else (gates, scan.projected)
    loads = _LOADS[scan.element_bytes]
    if _power_of_2_in(scan.hidden, scan.projected) * scan.element_bytes < 8:
        loads //= 4  # they are loaded one by one
    deepest = min(loads * 32 * warps // (units * together), 64)
    depth = max(16, min(1 << (deepest.bit_length() - 1), int(triton.next_power_of_2(summed))))
    stage, shared = (together * units + rows) * scan.element_bytes, _SHARED[TARGET]
    while depth > 16 and depth * stage > shared:
        depth //= 2
    return depth, 3 if 3 * depth * stage < shared else 2


def _others(cut: Plan) -> list[Plan]:
    """The ways to try of cutting it: a short list, of which `cut` is the first."""
    changes: list[dict[str, Any]] = [{"warps": 8 if cut.warps == 4 else 4}, {"stages": 3}]
    if cut.depth > 16:
        changes.append({"depth": cut.depth // 2})
    if cut.kernel == "stepwise":
        changes.append({"units": 16} if cut.units > 16 else {"units": 32})
        changes.append({"depth": 2 * cut.depth, "stages": 2})
    return [*dict.fromkeys([cut, *(replace(cut, **change) for change in changes)])]


@lru_cache
def _tuned(kernel: Any, cut: Plan) -> Any:
    """The kernel, timed in each of these ways at the first call of each size and dtype."""
    configs = [
        triton.Config(
            {"UNITS": way.units, "DEPTH": way.depth}, num_warps=way.warps, num_stages=way.stages
        )
        for way in _others(cut)
    ]
    key = ["hidden", "projected", "GATES", "ROWS", "PRECISION"]
    return triton.autotune(configs=configs, key=key, cache_results=True)(kernel)


def _power_of_2_in(*sizes: int) -> int:
    """The largest, up to 16, that divides them all."""
    together = math.gcd(16, *sizes)
    return together & -together


#: What was launched tuned, and so is loaded: while a graph is captured, nothing can be timed or loaded.
_launched: set[tuple[Any, ...]] = set()


def _launch(
    kernel: Any, grid: Any, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device:  # Triton 3.9 warns where the default of enable_fp_fusion is relied on
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)


class _Launcher:
    """Launches one pass's kernel for a call, on its device."""

    def __init__(self, kernel: Any, call: Call, cut: Plan) -> None:
        self.kernel, self.cut = kernel, cut
        self.device = call.input.device
        tiles = triton.cdiv(call.batch, cut.rows)
        self.grid = lambda meta: (tiles, triton.cdiv(call.hidden, meta["UNITS"]), call.directions)
        self.constants = {
            "GATES": call.spec.gates,
            "STATES": call.spec.states,
            "PRECISION": self._precision(call),
            "SUM": tl.float64 if call.sum_dtype == torch.float64 else tl.float32,
            "ROWS": cut.rows,
            "ALIGNED": _power_of_2_in(call.hidden, call.projected),
        }

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def _precision(call: Call) -> str:
        """Of float32's products; three in TF32 are as exact as one in float32. AMD's GPUs have no TF32, but for one."""
        if TARGET == "hip" or call.input.dtype != torch.float32:
            return "ieee"
        return "tf32x3" if call.precise else "tf32"

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        cut, constants = self.cut, self.constants | constants
        if self._is_tuned(arguments, constants):
            run = _tuned(self.kernel, cut)
        else:
            run = self.kernel
            constants |= {"UNITS": cut.units, "DEPTH": cut.depth}
            constants |= {"num_warps": cut.warps, "num_stages": cut.stages}
        _launch(run, self.grid, self.device, *arguments, **constants)

    def _is_tuned(self, arguments: Sequence[Any], constants: dict[str, Any]) -> bool:
        """Whether to launch what is fastest; in a captured graph only if it was launched before."""
        if not AUTOTUNE or kernels.INTERPRETED:
            return False
        *others, hidden, projected = arguments
        types = [
            getattr(t, "dtype", None) for a in others for t in (a if type(a) is tuple else [a])
        ]
        kind = (self.kernel, self.cut, self.device, hidden, projected, *types, *constants.values())
        if kind not in _launched and self._capturing():
            return False
        _launched.add(kind)
        return True

    def all_steps(
        self, steps: int, states: Tensor, launch: Callable[[Tensor, Tensor, int, int], None]
    ) -> Tensor:
        """Calls `launch` with states, new states, first step and steps, until all are done; the last states."""
        at_once = steps if self.cut.kernel == "sequence" else 1
        new = torch.empty_like(states)
        for first in range(0, steps, at_once):
            launch(states, new, first, at_once)
            states, new = new, states
        return states


def _states(call: Call, given: Sequence[Tensor | None]) -> Tensor:
    """[S, D, N, H] in the type of sums; zeros for what is not given, and for h where it is projected."""
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


def _not_projected(call: Call, states: Sequence[Tensor | None]) -> list[Tensor | None]:
    wide = not call.projects and call.projected == call.hidden
    return [state if wide or k > 0 else None for k, state in enumerate(states)]


def forward(
    call: Call,
    gates: Tensor,
    keep: int,
    output: Tensor,
    finals: Sequence[Tensor],
    reserve: Tensor,
    all_states: Sequence[Tensor] = (),
) -> None:
    """The scan forward, see `rnnkit.gpu.Scans`.

    A call may ask for the reserve of a layer with a projection alone: without `w_hr`, but with h of P values before its
    one step. It writes neither output nor the final h.

    all_states: on return the states but h after each step, [rows, D*H] each; none where they are not wanted.
    """
    cut = choose(call.scan(backward=False))
    if call.steps == 1:  # whose programs may share the units, whatever the tile
        cut = replace(cut, kernel="stepwise")
    launch = _Launcher(kernels.forward, call, cut)
    w_hh, w_hr = stacked(call.w_hh), call.w_hr
    b_ih, b_hh = stacked(call.b_ih), stacked(call.b_hh)
    offsets, initial = call.offsets(), call.states[0] if call.states else None
    h = output if call.projected == call.hidden else None
    if call.projects:
        h = call.input.new_empty(call.state_shape(1))

    def step(states: Tensor, new_states: Tensor, first: int, steps: int) -> None:
        launch(
            *(gates, b_ih, b_hh, w_hh, initial, states, new_states, offsets, output, h),
            tuple(all_states) or None,
            reserve if keep else None,
            *(gates.stride(0), call.batch, call.rows, call.steps - 1, first, steps),
            *(call.hidden, call.projected),
            CELL=CELLS[call.cell].forward,
            EVERYTHING=keep == Keep.EVERYTHING,
            PROJECTS=call.projects,
        )
        for d in range(call.directions if call.projects else 0):
            weight = w_hr[d]
            assert h is not None and weight is not None
            rows = call.rows_of(d, first)
            columns = slice(d * call.projected, (d + 1) * call.projected)
            output[rows, columns] = h[d, : rows.stop - rows.start] @ weight.t()

    given = _not_projected(call, call.states or [None] * call.spec.states)
    states = launch.all_steps(call.steps, _states(call, given), step)
    for k, final in enumerate(finals):
        if call.projects and k == 0:
            call.last_rows(output, out=final)
        elif h is not None or k > 0:
            final.copy_(states[k])


def backward(
    back: Backward,
    initial_grads: Sequence[Tensor | None],
    grad_all_states: Sequence[Tensor | None] = (),
) -> Tensor | None:
    """The scan backward, see `rnnkit.gpu.Scans`.

    grad_all_states: gradients of the states but h after each step, [rows, D*H] each, None for zeros.
    """
    call = back.call
    launch = _Launcher(kernels.backward, call, choose(call.scan(backward=True)))
    grad_output, *grad_finals = back.grads
    w_hh, w_hr = stacked(call.w_hh), stacked(call.w_hr)
    assert w_hh is not None
    offsets, initial = call.offsets(), call.states[0] if call.states else None
    through = grad_projected = None
    if call.projects:
        assert w_hr is not None
        through = call.input.new_zeros(call.state_shape(0))
        if grad_finals[0] is not None:
            through.copy_(grad_finals[0])
        grad_projected = call.input.new_empty(call.directions, call.rows, call.projected)

    def step(grad_states: Tensor, new_grad_states: Tensor, first: int, steps: int) -> None:
        if through is not None and grad_projected is not None:
            _through_projection(back, w_hh, through, grad_projected, first)
        launch(
            *(w_hh if w_hr is None else w_hr, initial, grad_states, new_grad_states, offsets),
            *(back.output, back.reserve, None if w_hr is not None else grad_output),
            tuple(grad_all_states) if any(g is not None for g in grad_all_states) else None,
            *(grad_projected, back.grad_gates),
            *(call.batch, call.rows, call.steps - 1, first, steps, call.hidden, call.projected),
            CELL=CELLS[call.cell].backward,
            SAVED=call.spec.saved,
            GRADS=back.values,
        )

    # One step more brings the gradients to the states before the first.
    steps = call.steps + (bool(call.states) and not call.projects)
    given = _states(call, _not_projected(call, grad_finals))
    grad_states = launch.all_steps(steps, given, step)
    for k, grad in enumerate(initial_grads):
        if grad is not None and k == 0 and through is not None:
            _recurrent(back, w_hh, through, call.steps)
            grad.copy_(through)
        elif grad is not None:
            grad.copy_(grad_states[k])
    return grad_projected


def _recurrent(back: Backward, w_hh: Tensor, through: Tensor, step: int) -> None:
    """What the gates of the step processed before `step` send to h before them, into `through` [D, N, P]."""
    call = back.call
    width = call.spec.gates * call.hidden
    for d in range(call.directions if step else 0):
        rows = call.rows_of(d, call.steps - step)
        columns = slice(d * back.values * call.hidden, d * back.values * call.hidden + width)
        count = rows.stop - rows.start
        torch.mm(back.grad_gates[rows, columns], w_hh[d], out=through[d, :count])


def _through_projection(
    back: Backward, w_hh: Tensor, through: Tensor, grad_projected: Tensor, step: int
) -> None:
    """All that reaches the projected h of a step."""
    call = back.call
    _recurrent(back, w_hh, through, step)
    for d in range(call.directions):
        rows = call.rows_of(d, call.steps - 1 - step)
        sums = through[d, : rows.stop - rows.start]
        if back.grads[0] is None:
            grad_projected[d, rows] = sums
        else:
            columns = slice(d * call.projected, (d + 1) * call.projected)
            of_output = back.grads[0].view(call.rows, -1)[rows, columns]
            torch.add(sums, of_output, out=grad_projected[d, rows])


def unprojected(call: Call, reserve: Tensor) -> Tensor:
    """h before its projection at all steps, [D, rows, H], from a reserve [D, rows, V, H] of everything."""
    output = CELLS[call.cell].output
    assert output is not None, f"{call.cell} has no projection"
    h = call.input.new_empty(call.directions, call.rows, call.hidden)
    rows, units = 16, 64
    _launch(
        kernels.unprojected,
        (triton.cdiv(call.rows, rows), triton.cdiv(call.hidden, units), call.directions),
        call.input.device,
        *(reserve, h, call.rows, call.hidden),
        OUTPUT=output,
        SAVED=call.spec.saved,
        ROWS=rows,
        UNITS=units,
        ALIGNED=_power_of_2_in(call.hidden),
    )
    return h
