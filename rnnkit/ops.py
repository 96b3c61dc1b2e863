"""The ops in `torch.ops.rnnkit`: their schemas, fakes and composite implementations.

`layer_forward` and `layer_backward` serve every cell, direction, layout and device; `autograd.run` makes them
differentiable. `pack_weights` packs weights once for many calls of `layer_forward`. Extensions add kernels under their
dispatch key (csrc/cpu/register.cpp, gpu.py). On devices without kernels the composite runs, which is the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkit import reference
from rnnkit.call import ARGUMENTS, LayerCall, Results, from_arguments
from rnnkit.specs import CELLS, WEIGHTS

library = torch.library.Library("rnnkit", "DEF")


def of_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of (LayerCall, other arguments) into one of an op's flat arguments."""

    def flat(*arguments: Any) -> Any:
        call, others = from_arguments(arguments)
        return function(call, *others)

    return flat


def _define(
    name: str, others: str, results: str, *, fake: Callable[..., Any], composite: Callable[..., Any]
) -> None:
    """Defines an op whose arguments are `call.ARGUMENTS`, followed by `others`."""
    library.define(f"{name}({ARGUMENTS}, {others}) -> {results}")
    torch.library.register_fake(f"rnnkit::{name}", of_call(fake), lib=library)
    library.impl(name, of_call(composite), "CompositeExplicitAutograd")


def forward_composite(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """`layer_forward` by the reference."""
    call.check_keep(keep)
    reserve = call.results(keep)[2]
    outputs, finals = reference.run(call)
    return outputs, finals, reserve.zero_()


def backward_composite(
    call: LayerCall,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    keep: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`layer_backward` by the reference."""
    found = differentiable_backward(call, grads, needs, create_graph=False)
    return [grad for grad in found if grad is not None]


def differentiable_backward(
    call: LayerCall, grads: Sequence[Tensor | None], needs: Sequence[bool], create_graph: bool
) -> list[Tensor | None]:
    """The gradients, by autograd through the reference; with `create_graph` they can be differentiated again.

    Returns a list like `call.tensors`, None where `needs` is False.
    """
    # An op runs below autograd, for example in a compiled graph, where enable_grad alone records nothing.
    autograd_on = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with torch.enable_grad(), autograd_on:
        # Aliases, so that a tensor that is passed twice (tied weights) has a separate gradient for each argument.
        tensors = [
            None
            if t is None
            else t.view_as(t)
            if t.requires_grad or not need
            else t.detach().requires_grad_()
            for t, need in zip(call.tensors, needs, strict=True)
        ]
        outputs, finals = reference.run(call.with_tensors(tensors))
        pairs = [
            (o, g)
            for o, g in zip([*outputs, *finals], grads, strict=True)
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


def _check_devices(call: LayerCall, **others: Sequence[Tensor | None]) -> None:
    """Checks that all tensors are on the same device.

    The fake runs if any tensor is fake or on meta. Without the check, a call that mixes devices would return fakes.
    """
    for name, tensors in {"states": call.states, "weights": call.weights, **others}.items():
        for tensor in tensors:
            if tensor is not None:
                call.check_device(tensor, name)
    if call.batch_sizes is not None and call.batch_sizes.device.type != "cpu":
        raise RuntimeError(f"expected batch_sizes on the CPU, got {call.batch_sizes.device}")


def _forward_fake(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    _check_devices(call)
    if packed is not None and packed.device.type != "cpu":
        raise RuntimeError(f"expected packed on the CPU, got {packed.device}")
    return call.results(keep)


def _backward_fake(
    call: LayerCall,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    keep: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    _check_devices(call, grads=grads, output=[output], reserve=[reserve])
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(call.tensors, needs, strict=True)
        if need and t is not None
    ]


# packed: what `pack_weights` returned for these weights, or None. keep: see `call.Keep`.
# Returns the outputs, the final states and the reserve [D, rows, values kept for each hidden unit, H].
_define(
    "layer_forward",
    "Tensor? packed, int keep",
    "(Tensor[], Tensor[], Tensor)",
    fake=_forward_fake,
    composite=forward_composite,
)
# grads: the gradient of each output, then of each final state; None for zeros.
# output, reserve, keep: h, the reserve and `keep` of the forward pass.
# needs: whether to compute the gradient of the input, of each of `states` and of each of `weights`.
# Returns the gradients that are needed, in that order.
_define(
    "layer_backward",
    "Tensor?[] grads, Tensor output, Tensor reserve, int keep, bool[] needs",
    "Tensor[]",
    fake=_backward_fake,
    composite=backward_composite,
)
# Packs a layer's weights for many calls of layer_forward without gradients. The result is stale once a weight changes.
library.define("pack_weights(str cell, Tensor?[] weights) -> Tensor")


@torch.library.impl(library, "pack_weights", "CompositeExplicitAutograd")
def _pack_composite(cell: str, weights: Sequence[Tensor | None]) -> Tensor:
    if cell not in CELLS:
        raise RuntimeError(f"expected cell to be the name of a cell, got {cell!r}")
    if len(weights) not in (len(WEIGHTS), 2 * len(WEIGHTS)):
        raise RuntimeError(
            f"expected weights to hold 5 tensors for each of 1 or 2 directions, got {len(weights)}"
        )
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def layer_forward(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """Calls the op. Returns the outputs, the final states and the reserve."""
    found: Results = torch.ops.rnnkit.layer_forward(*call.arguments, packed, keep)
    return found


def layer_backward(
    call: LayerCall,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    keep: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Calls the op. Returns the gradients that are needed."""
    found: list[Tensor] = torch.ops.rnnkit.layer_backward(
        *call.arguments, grads, output, reserve, keep, needs
    )
    return found
