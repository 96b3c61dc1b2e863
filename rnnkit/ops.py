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
from rnnkit.call import (
    ARGUMENTS,
    BACKWARD_ARGUMENTS,
    BackwardCall,
    LayerCall,
    Results,
    from_arguments,
)
from rnnkit.specs import CELLS, WEIGHTS

library = torch.library.Library("rnnkit", "DEF")


def of_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of (LayerCall, other arguments) into one of an op's flat arguments."""

    def flat(*arguments: Any) -> Any:
        call, others = from_arguments(arguments)
        return function(call, *others)

    return flat


def of_backward(function: Callable[[BackwardCall], Any]) -> Callable[..., Any]:
    """Turns a function of a BackwardCall into one of the flat arguments of `layer_backward`."""
    return of_call(lambda call, *others: function(BackwardCall(call, *others)))


def _define(
    name: str, others: str, results: str, *, fake: Callable[..., Any], composite: Callable[..., Any]
) -> None:
    """Defines an op of flat arguments: `call.ARGUMENTS`, then `others`."""
    library.define(f"{name}({ARGUMENTS}, {others}) -> {results}")
    torch.library.register_fake(f"rnnkit::{name}", fake, lib=library)
    library.impl(name, composite, "CompositeExplicitAutograd")


def forward_composite(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """`layer_forward` by the reference."""
    call.check_keep(keep)
    reserve = call.results(keep)[2]
    outputs, finals = reference.run(call)
    return outputs, finals, reserve.zero_()


def backward_composite(back: BackwardCall) -> list[Tensor]:
    """`layer_backward` by the reference."""
    return [grad for grad in differentiable_backward(back, create_graph=False) if grad is not None]


def differentiable_backward(back: BackwardCall, create_graph: bool) -> list[Tensor | None]:
    """The gradients, by autograd through the reference; with `create_graph` they can be differentiated again.

    Returns a list like `back.call.tensors`, None where `back.needs` is False. Does not use `back`'s output and reserve.
    """
    call, needs = back.call, back.needs
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
            for o, g in zip([*outputs, *finals], back.grads, strict=True)
            if g is not None and o.requires_grad
        ]
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        if not pairs or not wanted:
            return back.in_place_of(torch.zeros_like(t) for t in back.needed.values())
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return back.in_place_of(found)


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


def _backward_fake(back: BackwardCall) -> list[Tensor]:
    _check_devices(back.call, grads=back.grads, output=[back.output], reserve=[back.reserve])
    contiguous = torch.contiguous_format
    return [torch.empty_like(t, memory_format=contiguous) for t in back.needed.values()]


# packed: what `pack_weights` returned for these weights, or None. keep: see `call.Keep`.
# Returns the outputs, the final states and the reserve [D, rows, V, H].
_define(
    "layer_forward",
    "Tensor? packed, int keep",
    "(Tensor[], Tensor[], Tensor)",
    fake=of_call(_forward_fake),
    composite=of_call(forward_composite),
)
# See `BackwardCall`. Returns the gradients that are needed, in the order of `LayerCall.tensors`.
_define(
    "layer_backward",
    BACKWARD_ARGUMENTS,
    "Tensor[]",
    fake=of_backward(_backward_fake),
    composite=of_backward(backward_composite),
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


def layer_backward(back: BackwardCall) -> list[Tensor]:
    """Calls the op. Returns the gradients that are needed."""
    found: list[Tensor] = torch.ops.rnnkit.layer_backward(*back.arguments)
    return found
