"""Recurrent dropout and zoneout: what a call of a layer draws. All of it comes from torch's generator of the device.

So the same seed gives the same masks on every backend, and checkpointing, which restores the generator, replays them.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
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
        ones = call.input.new_ones(call.directions, _batch_of(call), call.projected)
        mask = dropout(ones, recurrent_dropout, training=True)
    if draws and len(zoneout) > 0:
        some = [p for p in zoneout if p > 0]
        shape = len(some), *call.input.shape[:-1], call.directions * call.hidden
        kept = torch.empty(shape, dtype=torch.bool, device=call.input.device)
        for of_state, p in zip(kept, some, strict=True):
            of_state.bernoulli_(p)
    return replace(call, operand_mask=mask, zoneout=zoneout, kept=kept)


def _batch_of(call: LayerCall) -> int:
    """N. `call.batch` would ask a graph for the rows of every step."""
    if call.states:
        return call.states[0].size(1)
    sizes = call.batch_sizes
    return call.input.size(1) if sizes is None else int(sizes[0].item())
