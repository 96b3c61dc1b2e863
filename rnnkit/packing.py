"""torch.nn.utils.rnn's packing and padding, which graphs can hold: torch.export's, ONNX's and torch.compile's."""

import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence


def pack_padded_sequence(
    input: Tensor,
    lengths: Tensor | list[int],
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> PackedSequence:
    """`torch.nn.utils.rnn.pack_padded_sequence`, which a graph can hold, too.

    Outside of graphs it is torch's own. Inside, torch's breaks torch.compile's graph and fails in torch.export, while
    this one stays in the graph for any lengths and, in ONNX, becomes the `sequence_lens` of the recurrent operator.
    torch.compile needs `torch._dynamo.config.capture_dynamic_output_shape_ops = True` for it.

    Args:
        input: [T, N, ·], padded, or [N, T, ·] if `batch_first`.
        lengths: of each sequence, int64 [N] on the CPU, at least 1, the longest at most T.
        batch_first: see `input`.
        enforce_sorted: the lengths do not increase; else they are sorted.

    Raises:
        RuntimeError: a length does not fit, or they increase. In ONNX this is not looked at.
    """
    if not torch.compiler.is_compiling():
        return rnn.pack_padded_sequence(input, lengths, batch_first, enforce_sorted)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    if lengths.dim() != 1:
        raise RuntimeError(f"expected lengths of shape [N], got {tuple(lengths.shape)}")
    sorted_indices = unsorted_indices = None
    if batch_first:
        input = input.transpose(0, 1)
    if not enforce_sorted:
        lengths, sorted_indices = torch.sort(lengths, descending=True)
        unsorted_indices = torch.argsort(sorted_indices)
        input = input.index_select(1, sorted_indices)
    else:
        torch._check(lengths.size(0) == input.size(1))
        in_order = torch.sort(lengths, descending=True).values
        _check((lengths == in_order).all(), "expected lengths to be sorted in decreasing order")
    steps = input.size(0)
    _check(((lengths > 0) & (lengths <= steps)).all(), "expected lengths to be from 1 to T")
    there = torch.arange(steps).unsqueeze(1) < lengths  # [T, N]
    batch_sizes = there.sum(1)
    # Steps that no sequence reaches are none.
    return PackedSequence(
        input[there], batch_sizes[batch_sizes > 0], sorted_indices, unsorted_indices
    )


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.nn.utils.rnn.pad_packed_sequence`, which a graph can hold, too; see `pack_padded_sequence`.

    Args:
        sequence: packed.
        batch_first: the result is [N, T, ·] instead of [T, N, ·].
        padding_value: what stands after each sequence's end.
        total_length: T of the result, by default the longest sequence's; not less.

    Returns:
        The padded sequences, and their lengths, int64 [N] on the CPU.

    Raises:
        ValueError: `total_length` is less than the longest sequence; in a graph, RuntimeError.
    """
    if not torch.compiler.is_compiling():
        return rnn.pad_packed_sequence(sequence, batch_first, padding_value, total_length)
    data, batch_sizes, _, unsorted_indices = sequence
    padded, there = padded_with(data, batch_sizes, padding_value)
    lengths = there.sum(0)
    if total_length is not None:
        torch._check(total_length >= padded.size(0))
        missing = [0, 0] * (padded.dim() - 1) + [0, total_length - padded.size(0)]
        padded = torch.nn.functional.pad(padded, missing, value=padding_value)
    if unsorted_indices is not None:
        padded, lengths = padded.index_select(1, unsorted_indices), lengths[unsorted_indices]
    return padded.transpose(0, 1) if batch_first else padded, lengths


def _check(holds: Tensor, message: str) -> None:
    """In a graph, which knows lengths only as it runs. ONNX has no such operator."""
    if not torch.onnx.is_in_onnx_export():
        torch._assert_async(holds, message)


def padded_with(data: Tensor, batch_sizes: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """[rows, ...] of a PackedSequence -> [T, N, ...] and which of these are there, [T, N], by gathering alone."""
    batch = torch.arange(batch_sizes[0].item())
    there = batch < batch_sizes.unsqueeze(1)
    start = batch_sizes.cumsum(0) - batch_sizes
    row = torch.where(there, start.unsqueeze(1) + batch, 0)
    keep = there.view(*there.shape, *[1] * (data.dim() - 1)).to(data.device)
    return data[row].masked_fill(~keep, value), there
