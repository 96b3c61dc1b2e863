"""The ops in `torch.ops.rnnkit`: schemas, fakes, composite reference.

`layer_forward` and `layer_backward` serve every cell, direction, layout and device; `autograd.layer` gives
them gradients. `packed_forward` runs on weights that `pack_weights` packed ahead.
Extensions add kernels under their dispatch key (csrc/cpu/register.cpp, gpu.py); where there is none, the
composite below runs.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rnnkit import reference
from rnnkit.reference import CELLS, WEIGHTS

library = torch.library.Library("rnnkit", "DEF")


class Keep(IntEnum):
    """What the forward pass keeps for the backward pass: the more, the less that one computes again."""

    NOTHING = 0
    STATES = 1  #: those but h, before each step; the gates are computed again
    EVERYTHING = 2


def kept_values(cell: str, keep: int) -> int:
    """Values kept for each hidden unit and step."""
    spec = CELLS[cell]
    return spec.saved if keep == Keep.EVERYTHING else spec.states - 1


# states: h [D, N, P] (and c [D, N, H]), or empty for zeros. weights: five for each direction, see WEIGHTS.
# keep: what the backward pass is to find, see `Keep`. Returns the output, the final states, and what was kept:
# [D, rows, values of each unit, H].
library.define(
    "layer_forward(str cell, Tensor input, Tensor[] states, Tensor?[] weights, Tensor? batch_sizes, int keep)"
    " -> (Tensor, Tensor[], Tensor)"
)
# grads: of the output, then of each final state; None for zero. needs: for the input, each of `states`, each of
# `weights`. Returns the gradients that are needed, in that order.
library.define(
    "layer_backward(str cell, Tensor?[] grads, Tensor input, Tensor[] states, Tensor?[] weights,"
    " Tensor? batch_sizes, Tensor output, Tensor reserve, bool[] needs) -> Tensor[]"
)


# Weights packed ahead for many calls without gradients; `packed` belongs to just these `weights`.
library.define("pack_weights(str cell, Tensor?[] weights) -> Tensor")
library.define(
    "packed_forward(str cell, Tensor input, Tensor[] states, Tensor?[] weights, Tensor packed,"
    " Tensor? batch_sizes) -> (Tensor, Tensor[])"
)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are added up in, and kept in for the backward pass."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def empty_results(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    keep: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What `layer_forward` returns, not written yet; its arguments are."""
    spec = CELLS[cell]
    w_hh = weights[1]
    assert w_hh is not None
    directions = len(weights) // len(WEIGHTS)
    hidden, projected = w_hh.size(0) // spec.gates, w_hh.size(1)
    rows = input.shape[:-1]
    batch: int | torch.SymInt
    if states:
        batch = states[0].size(1)
    elif batch_sizes is None:
        batch = input.size(1)
    elif isinstance(batch_sizes, FakeTensor):  # in a compiled graph it is known only as it runs
        batch = torch.library.get_ctx().new_dynamic_size()
    else:
        batch = int(batch_sizes[0])
    output = input.new_empty([*rows, directions * projected])
    finals = [input.new_empty(directions, batch, s) for s in [projected, hidden][: spec.states]]
    shape = [directions, math.prod(rows), kept_values(cell, keep), hidden] if keep else [0]
    return output, finals, input.new_empty(shape, dtype=accumulate_dtype(input.dtype))


def _check_devices(
    input: Tensor, batch_sizes: Tensor | None, *named: tuple[str, Sequence[Tensor | None]]
) -> None:
    """A fake serves any call that has one tensor without memory: the results of others must not be without, too."""
    for name, tensors in named:
        for tensor in tensors:
            if tensor is not None and tensor.device != input.device:
                raise RuntimeError(
                    f"expected {name} on {input.device} like the input, got one on {tensor.device}"
                )
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"expected batch_sizes on the CPU, got {batch_sizes.device}")


@torch.library.register_fake("rnnkit::layer_forward", lib=library)
def _forward_fake(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    keep: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    _check_devices(input, batch_sizes, ("states", states), ("weights", weights))
    return empty_results(cell, input, weights, batch_sizes, states, keep)


@torch.library.register_fake("rnnkit::packed_forward", lib=library)
def _packed_forward_fake(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    packed: Tensor,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    _check_devices(input, batch_sizes, ("states", states), ("weights", weights))
    if packed.device.type != "cpu":
        raise RuntimeError(f"expected packed on the CPU, got {packed.device}")
    return empty_results(cell, input, weights, batch_sizes, states, Keep.NOTHING)[:2]


@torch.library.register_fake("rnnkit::layer_backward", lib=library)
def _backward_fake(
    cell: str,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    given = [("grads", grads), ("states", states), ("weights", weights)]
    _check_devices(input, batch_sizes, *given, ("output and reserve", [output, reserve]))
    tensors = [input, *states, *weights]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(tensors, needs, strict=True)
        if need and t is not None
    ]


@torch.library.impl(library, "layer_forward", "CompositeExplicitAutograd")
def forward_composite(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    keep: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`layer_forward` by the reference."""
    reserve = empty_results(cell, input, weights, batch_sizes, states, keep)[2]
    output, finals = reference.layer(cell, input, states, weights, batch_sizes)
    return output, finals, reserve.zero_()


@torch.library.impl(library, "pack_weights", "CompositeExplicitAutograd")
def _pack_composite(cell: str, weights: Sequence[Tensor | None]) -> Tensor:
    if cell not in CELLS:
        raise RuntimeError(f"expected cell to be the name of a cell, got {cell!r}")
    if len(weights) not in (len(WEIGHTS), 2 * len(WEIGHTS)):
        raise RuntimeError(
            f"expected weights to hold 5 tensors for each of 1 or 2 directions, got {len(weights)}"
        )
    return torch.empty(0, dtype=torch.uint8, device="cpu")


@torch.library.impl(library, "packed_forward", "CompositeExplicitAutograd")
def _packed_forward_composite(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    packed: Tensor,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    output, finals, _ = torch.ops.rnnkit.layer_forward(
        cell, input, states, weights, batch_sizes, Keep.NOTHING
    )
    return output, finals


@torch.library.impl(library, "layer_backward", "CompositeExplicitAutograd")
def backward_composite(
    cell: str,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`layer_backward` by the reference."""
    found = differentiable_backward(
        cell, grads, input, states, weights, batch_sizes, needs, create_graph=False
    )
    return [grad for grad in found if grad is not None]


def differentiable_backward(
    cell: str,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
    needs: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients by autograd through the reference; with `create_graph` they can be differentiated again.

    Returns a list like [input, *states, *weights], None where `needs` is False.
    """
    # The op may run below autograd, as in a compiled graph, where enable_grad alone records nothing.
    autograd_on = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with torch.enable_grad(), autograd_on:
        # Aliases, so that a tensor given twice (tied weights) gets each place's own gradient.
        tensors = [
            None
            if t is None
            else t.view_as(t)
            if t.requires_grad or not need
            else t.detach().requires_grad_()
            for t, need in zip([input, *states, *weights], needs, strict=True)
        ]
        x, h, w = tensors[0], tensors[1 : 1 + len(states)], tensors[1 + len(states) :]
        assert x is not None
        output, finals = reference.layer(cell, x, [s for s in h if s is not None], w, batch_sizes)
        pairs = [
            (o, g)
            for o, g in zip([output, *finals], grads, strict=True)
            if g is not None and o.requires_grad
        ]
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        if not pairs or not wanted:
            return [
                torch.zeros_like(t) if need and t is not None else None
                for t, need in zip(tensors, needs, strict=True)
            ]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    remaining = iter(found)
    return [
        next(remaining) if need and t is not None else None
        for t, need in zip(tensors, needs, strict=True)
    ]
