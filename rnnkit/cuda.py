"""The scans of `rnnkit.gpu` on the CUDA extension (csrc/cuda/): one launch for all steps, or step by step.

`rnnkit.plan` chooses. A scan whose recurrent weights fit in shared memory runs on a persistent kernel; the others
are a product of cuBLAS and a kernel for the cell at each step.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rnnkit import backends, plan
from rnnkit.gpu import Backward, GpuCall, stacked
from rnnkit.specs import CELLS


@lru_cache
def device_of(index: int) -> plan.Gpu:
    """What the plan needs to know of CUDA device `index`, and of what the extension was built for."""
    facts = torch.cuda.get_device_properties(index)
    return plan.Gpu(
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        min((facts.major, facts.minor), backends.newest_architecture()),
    )


def why_not(scan: plan.Scan) -> str:
    """See `rnnkit.gpu.Scans`."""
    if scan.cell not in CELLS:
        return "the CUDA extension has no cells of one's own"
    return "the CUDA extension has no heads" if scan.heads > 1 else ""


def choose(scan: plan.Scan, device: torch.device) -> plan.Plan:
    """The plan that is expected to be fastest, or the one that `plan.forced` asks for."""
    return plan.choose(scan, device_of(device.index))


def _workspace(call: GpuCall, of_plan: plan.Plan) -> Tensor:
    return torch.zeros(of_plan.workspace_bytes, dtype=torch.uint8, device=call.input.device)


def forward(
    call: GpuCall,
    gates: Tensor,
    keep: int,
    output: Tensor | None,
    finals: Sequence[Tensor],
    reserve: Tensor,
    all_states: Sequence[Tensor | None] = (),
) -> None:
    """The scan forward, see `rnnkit.gpu.Scans`.

    Args:
        call: the call. States but h may be of the type of sums, as a reserve keeps them.
        gates: the inputs' part of the gates.
        keep: what goes into the reserve, see `rnnkit.call.Keep`.
        output: [rows, D*P]. None, with no finals, where a single step is to fill the reserve only.
        finals: the final states, or none.
        reserve: [D, rows, V, H], V values as `keep` says.
        all_states: [rows, D*H] for each state but h, its values after each step; None or missing: not wanted.
    """
    outputs = [output, *all_states, *[None] * (call.spec.states - 1 - len(all_states))]
    # The persistent kernels always write an output, and read states of the input's dtype.
    only_stepwise = output is None or any(state.dtype != gates.dtype for state in call.states)
    chosen = None if only_stepwise else choose(call.scan(backward=False), call.input.device)
    if chosen is None or chosen.kernel == "stepwise":
        _stepwise_forward(call, gates, keep, outputs, finals, reserve)
        return
    torch.ops.rnnkit.persistent_forward(
        call.cell,
        *chosen.arguments,
        gates,
        call.w_hh,
        call.b_ih,
        call.b_hh,
        *_before(call),
        *_noise(call),
        call.offsets(),
        call.steps,
        call.batch,
        keep,
        call.precise,
        _workspace(call, chosen),
        outputs,
        finals,
        reserve,
    )


def _before(call: GpuCall) -> tuple[Sequence[Tensor], Tensor | None, Sequence[Tensor]]:
    """What sequences begin with, where they are put back, and to which states."""
    return call.initial_states, call.reset, call.reset_states


def _noise(call: GpuCall) -> tuple[Tensor | None, Sequence[float], Tensor | None]:
    """Recurrent dropout and zoneout."""
    return call.operand_mask, call.zoneout, call.kept


def _between(call: GpuCall) -> Tensor:
    """Memory for the states, or their gradients, between two steps."""
    return call.input.new_empty(call.spec.states, *call.state_shape(1), dtype=call.sum_dtype)


def _stepwise_forward(
    call: GpuCall,
    gates: Tensor,
    keep: int,
    outputs: Sequence[Tensor | None],
    finals: Sequence[Tensor],
    reserve: Tensor,
) -> None:
    new = call.input.new_empty
    torch.ops.rnnkit.stepwise_forward(
        call.cell,
        gates,
        stacked(call.w_hh),
        call.b_ih,
        call.b_hh,
        stacked(call.w_hr),
        *call.norms(),
        *_before(call),
        *_noise(call),
        call.counts,
        keep,
        call.precise,
        _between(call) if call.steps > 1 else None,
        new(call.directions, call.batch, call.spec.gates * call.hidden),
        None if call.operand_mask is None else new(call.state_shape(0)),
        new(call.state_shape(1)) if call.projects and outputs[0] is not None else None,
        outputs,
        finals,
        reserve,
    )


def backward(
    back: Backward,
    initial_grads: Sequence[Tensor | None],
    grad_all_states: Sequence[Tensor | None] = (),
) -> Tensor | None:
    """The scan backward, see `rnnkit.gpu.Scans`.

    grad_all_states: gradients of `forward`'s all_states; None or missing: zeros.
    """
    call = back.call
    grad_output, *grad_finals = back.grads
    missing = call.spec.states - 1 - len(grad_all_states)
    grad_outputs = [grad_output, *grad_all_states, *[None] * missing]
    states = call.spec.states
    grad_initial, wanted = initial_grads[:states], initial_grads[states:]
    # Sums over the steps.
    grad_resets = [torch.zeros_like(state, dtype=call.sum_dtype) for state in call.reset_states]
    grads = grad_outputs, grad_finals, grad_initial, grad_resets
    chosen = choose(call.scan(backward=True), call.input.device)
    grad_projected = None
    if chosen.kernel == "stepwise":
        grad_projected = _stepwise_backward(back, *grads)
    else:
        _persistent_backward(back, chosen, *grads)
    for grad, found in zip(wanted, grad_resets, strict=True):
        if grad is not None:
            grad.copy_(found)
    return grad_projected


def _persistent_backward(
    back: Backward,
    chosen: plan.Plan,
    grad_outputs: Sequence[Tensor | None],
    grad_finals: Sequence[Tensor | None],
    grad_initial: Sequence[Tensor | None],
    grad_resets: Sequence[Tensor],
) -> None:
    call = back.call
    torch.ops.rnnkit.persistent_backward(
        call.cell,
        *chosen.arguments,
        [w.t().contiguous() for w in call.w_hh if w is not None],
        *_before(call),
        *_noise(call),
        call.offsets(),
        call.steps,
        call.batch,
        back.output,
        back.reserve,
        grad_outputs,
        grad_finals,
        call.grad_clip or math.inf,
        call.grad_cut,
        call.precise,
        _workspace(call, chosen),
        back.grad_gates,
        grad_initial,
        grad_resets,
        back.flow,
    )


def _stepwise_backward(
    back: Backward,
    grad_outputs: Sequence[Tensor | None],
    grad_finals: Sequence[Tensor | None],
    grad_initial: Sequence[Tensor | None],
    grad_resets: Sequence[Tensor],
) -> Tensor | None:
    call, new = back.call, back.call.input.new_empty
    grad_projected = new(call.directions, call.rows, call.projected) if call.projects else None
    torch.ops.rnnkit.stepwise_backward(
        call.cell,
        stacked(call.w_hh),
        stacked(call.w_hr),
        *call.norms(),
        *_before(call),
        *_noise(call),
        call.counts,
        call.precise,
        back.output,
        back.reserve,
        grad_outputs,
        grad_finals,
        call.grad_clip or math.inf,
        call.grad_cut,
        _between(call),
        new(call.state_shape(0)),
        new(call.state_shape(1)) if call.projects else None,
        grad_projected,
        back.grad_gates,
        grad_initial,
        grad_resets,
        back.flow,
    )
    return grad_projected


def unprojected(call: GpuCall, reserve: Tensor) -> Tensor:
    """h before its projection at all steps, [D, rows, H], from a reserve that holds everything."""
    h = call.input.new_empty(call.directions, call.rows, call.hidden)
    torch.ops.rnnkit.unprojected(call.cell, *call.norms(), reserve, h)
    return h
