"""The ops in `torch.ops.rnnkit`: schemas, fakes, composite reference.

`layer_forward` and `layer_backward` serve every cell, direction, layout and device; `autograd.run` gives
them gradients. `pack_weights` packs weights ahead, for many calls of `layer_forward`.
Extensions add kernels under their dispatch key (csrc/cpu/register.cpp, gpu.py); where there is none, the
composite below runs.
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
    """An op's implementation, of its flat arguments, from a function of a `LayerCall` and the other arguments."""

    def flat(*arguments: Any) -> Any:
        call, others = from_arguments(arguments)
        return function(call, *others)

    return flat


def _define(
    name: str, others: str, results: str, *, fake: Callable[..., Any], composite: Callable[..., Any]
) -> None:
    """An op of a layer's call and other arguments."""
    library.define(f"{name}({ARGUMENTS}, {others}) -> {results}")
    torch.library.register_fake(f"rnnkit::{name}", of_call(fake), lib=library)
    library.impl(name, of_call(composite), "CompositeExplicitAutograd")


def forward_composite(call: LayerCall, packed: Tensor | None, keep: int) -> Results:
    """`layer_forward` by the reference."""
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
    """The gradients by autograd through the reference; with `create_graph` they can be differentiated again.

    Returns a list like `call.tensors`, None where `needs` is False.
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
    """A fake serves any call that has one tensor without memory: the results of others must not be without, too."""
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


# packed: of these weights by `pack_weights`, or None. keep: see `call.Keep`. Returns the outputs, the final states and
# the reserve: [D, rows, values kept of each hidden unit, H].
_define(
    "layer_forward",
    "Tensor? packed, int keep",
    "(Tensor[], Tensor[], Tensor)",
    fake=_forward_fake,
    composite=forward_composite,
)
# grads: of each output, then of each final state; None for zeros. output (that is h), reserve and keep: of the forward
# pass. needs: for the input, each of `states`, each of `weights`. Returns the gradients that are needed, in that order.
_define(
    "layer_backward",
    "Tensor?[] grads, Tensor output, Tensor reserve, int keep, bool[] needs",
    "Tensor[]",
    fake=_backward_fake,
    composite=backward_composite,
)
# Weights packed ahead for many calls without gradients; what is returned belongs to just these weights.
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
    """The op: outputs, final states, reserve."""
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
    """The op: the gradients that are needed."""
    found: list[Tensor] = torch.ops.rnnkit.layer_backward(
        *call.arguments, grads, output, reserve, keep, needs
    )
    return found
