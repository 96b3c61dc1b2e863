"""Zoneout in the scan: what a step leaves of the states before it, and how a gradient is parted between old and new.

Values are tuples with a tile [ROWS, UNITS] for each state. `kept` holds for each state where units keep it, bool
[R, D*H], or None; the tile is at `base + place` there. `ZONEOUT` holds for each state the probability of which the
expectation is taken; 0 where a mask tells, or where the state has no zoneout.
"""

import triton
from triton import language as tl


@triton.jit
def zoned(old, new, kept, base, place, mask, ZONEOUT: tl.constexpr):
    """The states after a step that found the states `old` and gave `new`."""
    found = ()
    for k in tl.static_range(len(new)):
        state = new[k]
        if kept[k] is not None:
            keeps = tl.load(kept[k] + base + place, mask=mask, other=0) != 0
            state = tl.where(keeps, old[k], new[k])
        elif ZONEOUT[k] > 0:
            state = old[k] * ZONEOUT[k] + new[k] * (1 - ZONEOUT[k])
        found += (state,)
    return found


@triton.jit
def parted(grads, kept, base, place, mask, ZONEOUT: tl.constexpr):
    """The two parts of the gradients of the states after a step: of what the step gave, and of the states before it."""
    of_new = ()
    of_old = ()
    for k in tl.static_range(len(grads)):
        new = grads[k]
        old = tl.zeros_like(grads[k])
        if kept[k] is not None:
            keeps = tl.load(kept[k] + base + place, mask=mask, other=0) != 0
            new = tl.where(keeps, 0.0, grads[k])
            old = tl.where(keeps, grads[k], 0.0)
        elif ZONEOUT[k] > 0:
            new = grads[k] * (1 - ZONEOUT[k])
            old = grads[k] * ZONEOUT[k]
        of_new += (new,)
        of_old += (old,)
    return of_new, of_old


@triton.jit
def whole(grads, through_cell, kept, ZONEOUT: tl.constexpr):
    """The whole gradients of the states after a step: `grads` of a state with zoneout, else `through_cell`.

    `through_cell` has also what passes from one state of the step to another. That passes to what the cell gave, which
    with zoneout is not the state after the step.
    """
    found = ()
    for k in tl.static_range(len(grads)):
        grad = through_cell[k]
        if (kept[k] is not None) or (ZONEOUT[k] > 0):
            grad = grads[k]
        found += (grad,)
    return found


@triton.jit
def added(grads, others):
    """The sums of two gradients of each state."""
    sums = ()
    for k in tl.static_range(len(grads)):
        sums += (grads[k] + others[k],)
    return sums
