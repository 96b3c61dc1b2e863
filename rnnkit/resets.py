"""`reset=` of a layer's call: which sequences are put back to other states, before which steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def as_rows(reset: Any, input: Tensor | PackedSequence, batch_first: bool) -> Tensor:
    """The mask of a layer's call as bool [T, N], of a packed input [rows].

    Args:
        reset: a Tensor of any dtype, not 0 where a sequence is reset: [T, N], [N, T] if `batch_first`, [T] for an
            unbatched input, or a PackedSequence's rows; a trailing dimension of 1 is dropped.
        input: the input of the call.
        batch_first: whether the input has the batch first.

    Raises:
        TypeError: `reset` is no Tensor, or a PackedSequence where the input is none.
        RuntimeError: its shape or device does not fit the input's.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(reset, PackedSequence) and isinstance(input, PackedSequence):
        reset = reset.data
    if not isinstance(reset, Tensor):
        raise TypeError(f"expected reset to be a Tensor, got {type(reset).__name__}")
    shape = data.shape[:-1]
    if reset.dim() == len(shape) + 1 and reset.size(-1) == 1:
        reset = reset.squeeze(-1)
    if isinstance(input, PackedSequence) and torch.compiler.is_compiling():
        # A graph sees rows that were packed apart.
        torch._check(
            reset.size(0) == data.size(0), lambda: "expected reset to have the input's rows"
        )
    elif reset.shape != shape:
        raise RuntimeError(f"expected reset of shape {tuple(shape)}, got {tuple(reset.shape)}")
    if reset.device != data.device:
        raise RuntimeError(f"expected reset on {data.device} like the input, got {reset.device}")
    mask: Tensor = reset if reset.dtype == torch.bool else reset != 0
    if isinstance(input, PackedSequence):
        return mask
    if len(shape) == 1:
        return mask.unsqueeze(1)
    return mask.t() if batch_first else mask


def check_states(
    reset_to: Sequence[Tensor], layers: int, batch: int | None, widths: Sequence[int]
) -> None:
    """Checks the shapes of the states to reset to, [L*D, N, width] each; raises a RuntimeError.

    `layers`: L*D; `batch`: N, or None for any.
    """
    for k, (state, width) in enumerate(zip(reset_to, widths, strict=True)):
        shape = tuple(state.shape)
        fits = len(shape) == 3 and (shape[0], shape[2]) == (layers, width)
        if not fits or (batch is not None and shape[1] != batch):
            raise RuntimeError(
                f"expected reset_to[{k}] of shape {(layers, 'N' if batch is None else batch, width)}, got {shape}"
            )


def at_first_step(
    states: Sequence[Tensor],
    reset_to: Sequence[Tensor],
    reset: Tensor,
    directions: int,
    heads: int = 1,
) -> Sequence[Tensor]:
    """The initial states [L*D, N, width], put back where `reset`, [T, N] or [rows], has True in its first N elements.

    `states` and `reset_to` are empty for zeros. Only the first `heads` of the D begin at the first time.
    """
    if not states and not reset_to:
        return states
    some = states or reset_to
    batch = some[0].size(1)
    first = reset[0] if reset.dim() == 2 else reset[:batch]
    begins = [first if d < heads else torch.zeros_like(first) for d in range(directions)]
    mask = torch.stack(begins).view(1, directions, batch, 1)
    found = []
    for k, state in enumerate(some):
        old = states[k] if states else torch.zeros_like(state)
        new = reset_to[k] if reset_to else torch.zeros_like(state)
        of_layers = (state.size(0) // directions, directions, batch, state.size(-1))
        found.append(
            torch.where(mask, new.reshape(of_layers), old.reshape(of_layers)).flatten(0, 1)
        )
    return found
