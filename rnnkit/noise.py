"""Recurrent dropout and zoneout: what a call of a layer draws. All of it comes from torch's generator of the device.

So the same seed gives the same masks on every backend, and checkpointing, which restores the generator, replays them.
"""

import math
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
        kept = _kept(some, (*call.input.shape[:-1], call.directions * call.hidden), call.input)
    return replace(call, operand_mask=mask, zoneout=zoneout, kept=kept)


def _kept(some: Sequence[float], shape: Sequence[int], like: Tensor) -> Tensor:
    """Bool [K, *shape] on the device of `like`, True with the K probabilities `some`."""
    *leading, width = shape
    found = [coins(p, math.prod(leading), width, like.device) for p in some]
    return torch.stack(found).view(len(some), *shape)


def coins(p: float, rows: int, width: int, device: torch.device) -> Tensor:
    """Bool [rows, width], True with probability p.

    An element is True if a random byte is below the limit 256 p. So eight elements share a random word of 64 bits,
    where `bernoulli_` takes one for each. Since 256 p need not be whole, limits are rounded up or down at random, each
    limit for 32 elements of a column. With the two draws the probability of an element is p to 2^-32. The 32 elements
    are correlated through their limit, by 2^-18 / (p (1 - p)) at most, 4e-5 for p = 0.1, and always by less than
    1/256; all others are independent.
    """
    # Limits from 0 to 128 fit into a byte. Above 1/2, an element is False with the rest of the probability.
    below, rare = (torch.lt, p) if p <= 0.5 else (torch.ge, 1 - p)
    whole = int(rare * 256)
    apart = -(-rows // 32)  # rows from one element to the next one of the same limit
    rounded_up = torch.rand(apart, width, dtype=torch.float32, device=device) < rare * 256 - whole
    limits = rounded_up.to(torch.uint8).add_(whole)
    # All 64 bits. Compilers and vmap know `randint`, but not `random_`.
    words = torch.randint(-(2**63), 2**63 - 1, (32, apart, -(-width // 8)), device=device)
    values = words.view(torch.uint8)[..., :width]
    return below(values, limits).flatten(0, 1)[:rows]
