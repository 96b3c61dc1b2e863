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
    """The two parts of the gradients of the states after a step: of what the step gave, and of the states before it.

    The second is None for a state without zoneout.
    """
    of_new = ()
    of_old = ()
    for k in tl.static_range(len(grads)):
        if kept[k] is not None:
            keeps = tl.load(kept[k] + base + place, mask=mask, other=0) != 0
            of_new += (tl.where(keeps, 0.0, grads[k]),)
            of_old += (tl.where(keeps, grads[k], 0.0),)
        elif ZONEOUT[k] > 0:
            of_new += (grads[k] * (1 - ZONEOUT[k]),)
            of_old += (grads[k] * ZONEOUT[k],)
        else:
            of_new += (grads[k],)
            of_old += (None,)
    return of_new, of_old


@triton.jit
def where_there(of_old, zoned, others):
    """Of each state the tile in `zoned` if it has zoneout, else that in `others`. `of_old`: see `parted`."""
    found = ()
    for k in tl.static_range(len(others)):
        found += (others[k] if of_old[k] is None else zoned[k],)
    return found


@triton.jit
def added(grads, of_old):
    """Gradients of the states before a step, with their part through zoneout, `of_old` of `parted`."""
    found = ()
    for k in tl.static_range(len(grads)):
        found += (grads[k] if of_old[k] is None else grads[k] + of_old[k],)
    return found
