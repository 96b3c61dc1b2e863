"""How close a result must be: the one tolerance table, and the rule that every kernel is held to.

Errors are of a whole tensor, norm over norm: of a single element they say little, since its terms may
cancel, or a ReLU next to zero may fall to either side in low precision.
"""

import torch
from torch import Tensor

#: Beside the dtypes: float32 whose factors are rounded to TF32, which has float16's mantissa.
TF32 = "tf32"

#: Largest relative error against float64 of outputs and states, and of gradients. Nothing loosens it.
FORWARD: dict[torch.dtype | str, float] = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    TF32: 5e-3,
}
GRADIENT: dict[torch.dtype | str, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
    TF32: 1e-2,
}

#: torch's own error can be nil by luck, so twice of it is no less than this many roundings (forward, gradient).
#: In low precision kernels keep float32 inside, and round once a step.
FLOOR_ROUNDINGS = {
    torch.float32: (4, 8),
    torch.bfloat16: (1.5, 3),
    torch.float16: (1.5, 3),
    TF32: (1.5, 3),
}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The norm of the deviation from `truth` over the norm of `truth`; NaN if anything is NaN."""
    truth = truth.detach().to(actual.device, torch.float64)
    deviation = torch.linalg.vector_norm(actual.detach().double() - truth)
    return float(deviation / torch.linalg.vector_norm(truth)) if deviation != 0 else 0.0


def assert_close_to_truth(
    actual: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    *,
    gradient: bool = False,
    tf32: bool = False,
    name: str = "result",
) -> None:
    """`actual` is at most twice as far from the truth as torch.nn is, and within the table.

    Args:
        actual: rnnkit's result.
        torch_result: the same computation by torch.nn in the same dtype.
        truth: the same computation in float64, on the same (rounded) weights and inputs.
        gradient: whether the table for gradients holds.
        tf32: whether float32 is multiplied as TF32, by both.
        name: what is compared, for the message.
    """
    dtype = actual.dtype
    assert dtype == torch_result.dtype, f"{name}: {dtype}, torch.nn has {torch_result.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth is in {truth.dtype}"
    shapes = tuple(actual.shape), tuple(torch_result.shape), tuple(truth.shape)
    assert shapes[0] == shapes[1] == shapes[2], (
        f"{name}: shapes of actual, torch.nn, truth: {shapes}"
    )
    error, torch_error = relative_error(actual, truth), relative_error(torch_result, truth)
    precision = TF32 if tf32 and dtype == torch.float32 else dtype
    limit = (GRADIENT if gradient else FORWARD)[precision]
    # In float64 the truth itself has as large an error, and of a few values torch's error is chance.
    if dtype != torch.float64 and truth.numel() >= 8:
        rounding = torch.finfo(torch.float16 if precision == TF32 else dtype).eps
        floor = FLOOR_ROUNDINGS[precision][gradient] * rounding
        limit = min(limit, max(2 * torch_error, floor))
    # Not `error > limit`: a NaN must fail.
    assert error <= limit, (
        f"{name}: relative error {error:.2e} against float64, torch.nn's is {torch_error:.2e}, "
        f"allowed {limit:.2e} in {precision}"
    )
