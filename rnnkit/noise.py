"""Recurrent dropout and zoneout: what a call of a layer draws. All of it comes from torch's generator of the device.

So the same seed gives the same masks on every backend, and checkpointing, which restores the generator, replays them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import dropout

from rnnkit.call import LayerCall


def drawn(
    call: LayerCall, recurrent_dropout: float, zoneout: Sequence[float], draws: bool
) -> LayerCall:
    """The call with masks for these probabilities: first the recurrent product's, then each state's for zoneout.

    Args:
        call: one layer's call.
        recurrent_dropout: probability of zeroing an element of h as the operand of the recurrent product, the same ones
            at all steps of a sequence; the others are divided by 1 - p.
        zoneout: see `LayerCall`.
        draws: whether zoneout draws which units keep their states, instead of taking the expectation.
    """
    mask = kept = None
    if recurrent_dropout > 0:
        ones = call.input.new_ones(call.directions, call.batch_of_graph, call.projected)
        mask = dropout(ones, recurrent_dropout, training=True)
    if draws and len(zoneout) > 0:
        some = [p for p in zoneout if p > 0]
        kept = _coins(some, (*call.input.shape[:-1], call.directions * call.hidden), call.input)
    return replace(call, operand_mask=mask, zoneout=zoneout, kept=kept)


def _coins(some: Sequence[float], shape: Sequence[int], like: Tensor) -> Tensor:
    """Bool [K, *shape] on the device of `like`, True with the K probabilities `some`."""
    if _under_vmap():  # which draws different numbers only out of place
        each = torch.tensor(some, device=like.device).view(-1, *[1] * len(shape))
        return torch.bernoulli(each.expand(-1, *shape)).bool()
    coins = torch.empty(len(some), *shape, dtype=torch.bool, device=like.device)
    for of_state, p in zip(coins, some, strict=True):
        of_state.bernoulli_(p)
    return coins


def _under_vmap() -> bool:
    """Whether `torch.func.vmap` is among the transforms of the call."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)
