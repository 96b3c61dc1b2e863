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
    call.check()
    reserve = call.results(keep)[2]
    outputs, finals = reference.run(call)
    return outputs, finals, reserve.zero_()


def backward_composite(back: BackwardCall) -> list[Tensor]:
    """`layer_backward` by the reference."""
    back.check()
    found, flow = differentiable_backward(back, create_graph=False)
    return [*(grad for grad in found if grad is not None), *flow]


def differentiable_backward(
    back: BackwardCall, create_graph: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The gradients, by autograd through the reference; with `create_graph` they can be differentiated again.

    Returns a list like `back.call.tensors`, None where `back.needs` is False, and the gradients that `back.flow` asks
    for. Does not use `back`'s output and reserve.
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
            if t.requires_grad or not (need or back.flow)
            else t.detach().requires_grad_()
            for t, need in zip(call.tensors, needs, strict=True)
        ]
        seen: list[list[list[Tensor]]] = []
        traced = call.with_tensors(tensors)
        outputs, finals = reference.run(traced, seen if back.flow else None)
        pairs = [
            (o, g)
            for o, g in zip([*outputs, *finals], back.grads, strict=True)
            if g is not None and o.requires_grad
        ]
        needed = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        wanted = [*needed, *(s for steps in seen for states in steps for s in states)]
        if pairs and wanted:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            found = tuple(torch.zeros_like(t) for t in wanted)
    return back.in_place_of(found[: len(needed)]), _flow(back, found[len(needed) :])


def _flow(back: BackwardCall, found: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of each direction's states after each time step, as `BackwardCall.new_flow` lays them out."""
    states, steps = back.call.spec.states, back.call.steps
    join = torch.stack if back.call.batch_sizes is None else torch.cat
    flow = []
    for k in range(states if back.flow else 0):
        of_state = found[k::states]
        directions = [
            join(of_state[d * steps : (d + 1) * steps]) for d in range(back.call.directions)
        ]
        flow.append(torch.cat(directions, -1).to(back.call.sum_dtype))
    return flow


def _check_devices(call: LayerCall, **others: Sequence[Tensor | None]) -> None:
    """Checks that all tensors are on the same device.

    The fake runs if any tensor is fake or on meta. Without the check, a call that mixes devices would return fakes.
    """
    others |= {"states": call.states, "weights": call.weights, "reset": [call.reset]}
    others |= {"operand_mask": [call.operand_mask], "kept": [call.kept]}
    for name, tensors in others.items():
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
    needed = [torch.empty_like(t, memory_format=contiguous) for t in back.needed.values()]
    return [*needed, *back.new_flow()]


# packed: what `pack_weights` returned for these weights, or None. keep: see `call.Keep`.
# Returns the outputs, the final states and the reserve [D, rows, V, H].
_define(
    "layer_forward",
    "Tensor? packed, int keep",
    "(Tensor[], Tensor[], Tensor)",
    fake=of_call(_forward_fake),
    composite=of_call(forward_composite),
)
# See `BackwardCall`. Returns the gradients that are needed, in the order of `LayerCall.tensors`; then, if `flow`, the
# gradient of each state after each step, shaped like the outputs.
_define(
    "layer_backward",
    BACKWARD_ARGUMENTS,
    "Tensor[]",
    fake=of_backward(_backward_fake),
    composite=of_backward(backward_composite),
)
# Packs a layer's weights for many calls of layer_forward without gradients. The result is stale once a weight changes.
library.define("pack_weights(str cell, Tensor?[] weights, int heads=1) -> Tensor")


@torch.library.impl(library, "pack_weights", "CompositeExplicitAutograd")
def _pack_composite(cell: str, weights: Sequence[Tensor | None], heads: int = 1) -> Tensor:
    input = torch.empty(1, 1, 0)
    w_ih = weights[0] if weights else None
    if weights and w_ih is None:
        raise RuntimeError("expected w_ih of direction 0 to be a tensor, got None")
    if w_ih is not None and w_ih.dim() == 2:  # any other w_ih is refused, whatever the input
        input = torch.empty(1, 1, w_ih.size(1), dtype=w_ih.dtype, device=w_ih.device)
    LayerCall(cell, input, [], weights, heads=heads).check()
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def layer_forward(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """Calls the op. Returns the outputs, the final states and the reserve."""
    found: Results = torch.ops.rnnkit.layer_forward(*call.arguments, packed, keep)
    return found


def layer_backward(back: BackwardCall) -> list[Tensor]:
    """Calls the op. Returns the gradients that are needed, and those that `flow` asks for."""
    found: list[Tensor] = torch.ops.rnnkit.layer_backward(*back.arguments)
    return found
