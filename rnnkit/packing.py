"""Packing and padding: by one gather each for a layer's `lengths`, and torch.nn.utils.rnn's functions for graphs.

The graphs are those of torch.compile, torch.export and ONNX.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from rnnkit import gpu


@dataclass(frozen=True)
class Packing:
    """Where each row of a padded batch stands in its PackedSequence, and the other way round.

    Attributes:
        batch_sizes: int64, active rows of each step up to the end of the longest sequence; on the CPU.
        sorted_indices, unsorted_indices: as of a PackedSequence, [N] on the batch's device; None if the lengths are
            sorted already.
        sources: int64 [rows], for each packed row its place among the T*N rows of the padded batch; on its device.
        targets: int64 [T*N], for each row of the padded batch its place among the packed rows, `rows` if it is padding.
        shape: (T, N), or (N, T) of a batch that has N first.
    """

    batch_sizes: Tensor
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None
    sources: Tensor
    targets: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Tensor, steps: int, batch_first: bool, device: torch.device) -> "Packing":
        """The packing of sequences of these lengths, int64 [N] on the CPU, in batches of T = `steps` on `device`.

        Of sequences that are equally long, the first stays first.
        """
        batch = lengths.numel()
        in_order, order = torch.sort(lengths, descending=True, stable=True)
        times = torch.arange(steps, device="cpu").unsqueeze(1)
        active = times < in_order  # [T, N]
        sizes = active.sum(1)[: int(in_order[0])]
        if batch_first:
            shape, places = (batch, steps), torch.add(times, order, alpha=steps)
        else:
            shape, places = (steps, batch), torch.add(order, times, alpha=batch)
        sources = places.masked_select(active)
        rows = sources.numel()
        in_packed = torch.arange(rows, device="cpu")
        targets = torch.full((steps * batch,), rows, device="cpu").scatter_(0, sources, in_packed)
        if torch.equal(in_order, lengths):
            orders: tuple[Tensor | None, Tensor | None] = None, None
        else:
            orders = gpu.sent(order, device), gpu.sent(torch.argsort(order), device)
        return cls(sizes, *orders, gpu.sent(sources, device), gpu.sent(targets, device), shape)

    def packed(self, padded: Tensor) -> PackedSequence:
        """Packs a batch of this `shape`, [T, N, ...] or [N, T, ...]."""
        data = _gather(padded.flatten(0, 1), self.sources, self.targets)
        return PackedSequence(data, self.batch_sizes, self.sorted_indices, self.unsorted_indices)

    def padded(self, sequence: PackedSequence) -> Tensor:
        """Pads a PackedSequence of these lengths with zeros, to a batch of this `shape`."""
        rows = _gather(sequence.data, self.targets, self.sources)
        return rows.view(*self.shape, *rows.shape[1:])


class _Gather(torch.autograd.Function):
    """`_gathered` with the gradient of a gather that takes no row twice: the gather with the two indices exchanged.

    autograd's own gradient of a gather adds up the rows one by one.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.save_for_forward(index, inverse)
        return _gathered(rows, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _gather(grad, inverse, index), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _gather(tangent, *ctx.saved_tensors)


def _gather(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`_gathered` with a fast gradient; `inverse` is the index that gives `rows` from the result.

    The torch.func transforms take apart what `_gathered` does: they cannot see a Function of this form, and the other
    form takes 70 microseconds a call.
    """
    needs = torch.is_grad_enabled() and rows.requires_grad
    if needs and torch._C._functorch.peek_interpreter_stack() is None:
        return cast(Tensor, _Gather.apply(rows, index, inverse))
    return _gathered(rows, index)


def _gathered(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`, with zeros where the index is `len(rows)`; only an index longer than `rows` has such places."""
    if index.numel() > rows.size(0):
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return rows.index_select(0, index)


def pack_padded_sequence(
    input: Tensor,
    lengths: Tensor | list[int],
    batch_first: bool = False,
    enforce_sorted: bool = True,
) -> PackedSequence:
    """`torch.nn.utils.rnn.pack_padded_sequence` that also works inside graphs.

    torch's own function breaks torch.compile's graph and fails in torch.export. This one can be compiled and exported
    for any lengths; in ONNX the lengths become the `sequence_lens` of the recurrent operator. torch.compile needs
    `torch._dynamo.config.capture_dynamic_output_shape_ops = True` for it. Outside of graphs it calls torch's function.

    Args:
        input: padded sequences, [T, N, ·], or [N, T, ·] if `batch_first`.
        lengths: length of each sequence, int64 [N] on the CPU, from 1 to T.
        batch_first: see `input`.
        enforce_sorted: whether the lengths are sorted in decreasing order already; else they are sorted here.

    Raises:
        RuntimeError: a length is out of range, or the lengths increase despite `enforce_sorted`. An ONNX graph does
            not check this.
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
        check((lengths == in_order).all(), "expected lengths to be sorted in decreasing order")
    steps = input.size(0)
    check(((lengths > 0) & (lengths <= steps)).all(), "expected lengths to be from 1 to T")
    there = torch.arange(steps).unsqueeze(1) < lengths  # [T, N]
    batch_sizes = there.sum(1)
    # Steps beyond the longest sequence have no rows, and a PackedSequence does not contain them.
    return PackedSequence(
        input[there], batch_sizes[batch_sizes > 0], sorted_indices, unsorted_indices
    )


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.nn.utils.rnn.pad_packed_sequence` that also works inside graphs; see `pack_padded_sequence`.

    Args:
        sequence: the packed sequences.
        batch_first: whether the result is [N, T, ·] instead of [T, N, ·].
        padding_value: the value after each sequence's end.
        total_length: T of the result, at least the longest sequence's length, which is the default.

    Returns:
        The padded sequences, and their lengths, int64 [N] on the CPU.

    Raises:
        ValueError: `total_length` is less than the longest sequence's length. In a graph this is a RuntimeError.
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


def ways(
    lengths: Tensor, steps: int, batch_first: bool, device: torch.device
) -> tuple[Callable[[Tensor], PackedSequence], Callable[[PackedSequence], Tensor]]:
    """How to pack a batch of sequences of these lengths, and how to pad it again with zeros, to T = `steps`.

    Args:
        lengths: see `as_lengths`.
        steps: T of the batch.
        batch_first: whether the batch is [N, T, ...] instead of [T, N, ...].
        device: the batch's.
    """
    if not torch.compiler.is_compiling():
        found = Packing.of(lengths, steps, batch_first, device)
        return found.packed, found.padded
    # A graph knows the number of rows only at run time, and ONNX no gather of autograd's.
    return (
        lambda batch: pack_padded_sequence(batch, lengths, batch_first, enforce_sorted=False),
        lambda packed: pad_packed_sequence(packed, batch_first, total_length=steps)[0],
    )


def as_lengths(lengths: Any, batch: Any, steps: Any) -> Tensor:
    """The lengths of the batch's sequences as int64 [N] on the CPU.

    Raises:
        TypeError: they are no integers.
        RuntimeError: they are not of shape [N], or, outside of graphs, one is not from 1 to T.
    """
    found = torch.as_tensor(lengths)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"expected lengths to be integers, got {found.dtype}")
    expected = "expected lengths of shape ({}), N of the input, got {}"
    if found.dim() == 1 and torch.compiler.is_compiling():
        torch._check(found.size(0) == batch, lambda: expected.format("N", "another"))
    elif found.shape != (batch,):
        raise RuntimeError(expected.format(f"{batch},", tuple(found.shape)))
    found = found.to("cpu", torch.int64)
    if not torch.compiler.is_compiling() and bool(((found < 1) | (found > steps)).any()):
        raise RuntimeError(f"expected lengths from 1 to T = {steps}, got {found.tolist()}")
    return found


def check(holds: Tensor, message: str) -> None:
    """Adds a check to the graph, which knows lengths only at run time. ONNX has no operator for it."""
    if not torch.onnx.is_in_onnx_export():
        torch._assert_async(holds, message)


def check_batch(states: Sequence[Tensor], batch_sizes: Tensor, name: str) -> None:
    """Adds a check to the graph that the states [L*D, N, width] have the batch of these `batch_sizes`."""
    for state in states:
        check(batch_sizes[0] == state.size(1), f"expected {name} to have the batch of the input")


def padded_with(data: Tensor, batch_sizes: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Pads the data [rows, ...] of a PackedSequence by a gather, which graphs can hold.

    Returns [T, N, ...], with `value` where a sequence is over, and a mask [T, N] of the rows that are active.
    """
    batch = torch.arange(batch_sizes[0].item())
    there = batch < batch_sizes.unsqueeze(1)
    start = batch_sizes.cumsum(0) - batch_sizes
    row = torch.where(there, start.unsqueeze(1) + batch, 0)
    keep = there.view(*there.shape, *[1] * (data.dim() - 1)).to(data.device)
    return data[row].masked_fill(~keep, value), there
