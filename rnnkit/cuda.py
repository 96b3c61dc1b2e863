"""The scans of `rnnkit.gpu` on the CUDA extension (csrc/cuda/): one launch for all steps, or step by step.

`rnnkit.plan` chooses. A scan whose recurrent weights fit in shared memory runs on a persistent kernel; the others
are a product of cuBLAS and a kernel for the cell at each step.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rnnkit import backends, plan
from rnnkit.gpu import Backward, GpuCall, stacked


@lru_cache
def device_of(index: int) -> plan.Device:
    """What the plan needs to know of CUDA device `index`, and of what the extension was built for."""
    facts = torch.cuda.get_device_properties(index)
    return plan.Device(
        facts.multi_processor_count,
        facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        min((facts.major, facts.minor), backends.newest_architecture()),
    )


def choose(scan: plan.Scan, device: torch.device) -> plan.Plan:
    """The plan that is expected to be fastest, or the one that `plan.forced` asks for."""
    return plan.choose(scan, device_of(device.index))


def _workspace(call: GpuCall, of_plan: plan.Plan) -> Tensor:
    return torch.zeros(of_plan.workspace_bytes, dtype=torch.uint8, device=call.input.device)


def _padded(states: Sequence[Tensor | None]) -> list[Tensor | None]:
    """h and c, None for what is not there."""
    return [*states, None, None][:2]


def forward(
    call: GpuCall,
    gates: Tensor,
    keep: int,
    output: Tensor,
    finals: Sequence[Tensor],
    reserve: Tensor,
) -> None:
    """The scan forward, see `rnnkit.gpu.Scans`."""
    chosen = choose(call.scan(backward=False), call.input.device)
    if chosen.kernel == "stepwise":
        _stepwise_forward(call, gates, keep, output, finals, reserve)
        return
    torch.ops.rnnkit.persistent_forward(
        call.cell,
        chosen.numbers,
        gates,
        call.w_hh,
        call.b_ih,
        call.b_hh,
        *_padded(call.states),
        call.offsets(),
        call.steps,
        keep,
        call.precise,
        _workspace(call, chosen),
        output,
        *_padded(finals),
        reserve,
    )


def _stepwise_forward(
    call: GpuCall,
    gates: Tensor,
    keep: int,
    output: Tensor,
    finals: Sequence[Tensor],
    reserve: Tensor,
) -> None:
    new, sums = call.input.new_empty, call.sum_dtype
    size = call.state_shape(1)
    h = call.states[0].clone() if call.states else new(call.state_shape(0)).zero_()
    h_state = new(size, dtype=sums).zero_() if call.projects else h.to(sums, copy=True)
    c_state = None
    if call.spec.states > 1:
        c_state = (
            call.states[1].to(sums, copy=True) if call.states else new(size, dtype=sums).zero_()
        )
    torch.ops.rnnkit.stepwise_forward(
        call.cell,
        gates,
        stacked(call.w_hh),
        call.b_ih,
        call.b_hh,
        stacked(call.w_hr),
        call.counts,
        not call.states,
        keep,
        call.precise,
        h,
        h_state,
        c_state,
        new(call.directions, call.batch, call.spec.gates * call.hidden),
        new(size) if call.projects else None,
        output,
        reserve,
    )
    finals[0].copy_(h if call.projects else h_state)
    if c_state is not None:
        finals[1].copy_(c_state)


def backward(back: Backward, initial_grads: Sequence[Tensor | None]) -> Tensor | None:
    """The scan backward, see `rnnkit.gpu.Scans`."""
    call = back.call
    chosen = choose(call.scan(backward=True), call.input.device)
    if chosen.kernel == "stepwise":
        return _stepwise_backward(back, initial_grads)
    grad_output, *grad_finals = back.grads
    torch.ops.rnnkit.persistent_backward(
        call.cell,
        chosen.numbers,
        [w.t().contiguous() for w in call.w_hh if w is not None],
        call.states[0] if call.states else None,
        call.offsets(),
        call.steps,
        call.batch,
        back.output,
        back.reserve,
        grad_output,
        *_padded(grad_finals),
        call.precise,
        _workspace(call, chosen),
        back.grad_gates,
        *_padded(initial_grads),
    )
    return None


def _stepwise_backward(back: Backward, initial_grads: Sequence[Tensor | None]) -> Tensor | None:
    call = back.call
    new, low, sums = call.input.new_empty, call.input.dtype, call.sum_dtype
    grad_output, *finals = back.grads

    def started(grad: Tensor | None, index: int, dtype: torch.dtype) -> Tensor:
        if grad is None:
            return new(call.state_shape(index), dtype=dtype).zero_()
        return grad.to(dtype, copy=True)

    grad_h = started(None if call.projects else finals[0], 1, sums)
    grad_c = started(finals[1], 1, sums) if call.spec.states > 1 else None
    through = started(finals[0] if call.projects else None, 0, low)
    grad_projected = new(call.directions, call.rows, call.projected) if call.projects else None
    torch.ops.rnnkit.stepwise_backward(
        call.cell,
        stacked(call.w_hh),
        stacked(call.w_hr),
        call.counts,
        call.precise,
        back.output,
        call.states[0] if call.states else None,
        back.reserve,
        None if grad_output is None else grad_output.view(call.rows, -1),
        grad_h,
        grad_c,
        through,
        new(call.state_shape(1)) if call.projects else None,
        grad_projected,
        back.grad_gates,
        back.values,
    )
    grad_h_0, grad_c_0 = _padded(initial_grads)
    if grad_h_0 is not None and call.projects:
        grad_h_0.copy_(through)
    elif grad_h_0 is not None:
        for d in range(call.directions):
            last = call.counts[-1] if d else call.counts[0]
            grad_h[d, :last] += through[d, :last]
        grad_h_0.copy_(grad_h)
    if grad_c is not None and grad_c_0 is not None:
        grad_c_0.copy_(grad_c)
    return grad_projected


def gates_again(
    call: GpuCall,
    d: int,
    gates: Tensor,
    previous: Sequence[tuple[slice, Tensor | None]],
    states: Tensor,
    reserve: Tensor,
) -> None:
    """What the forward pass did not keep, see `rnnkit.gpu.Scans`."""
    w_hh = call.w_hh[d]
    assert w_hh is not None
    recurrent = call.input.new_zeros(call.rows, call.spec.gates * call.hidden)
    for rows, h in previous:
        if h is not None:
            torch.mm(h, w_hh.t(), out=recurrent[rows])
    torch.ops.rnnkit.gates_again(
        call.cell,
        gates,
        recurrent,
        call.b_ih[d],
        call.b_hh[d],
        d,
        states.new_zeros(call.rows, call.hidden),
        states[:, 0].contiguous().clone() if call.spec.states > 1 else None,
        reserve,
    )
