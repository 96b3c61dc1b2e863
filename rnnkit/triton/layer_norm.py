"""Layer normalization in the scan: n = (value - mean) / sqrt(variance + epsilon) of a row's values, times a factor.

A row's values are a tuple of tiles [ROWS, UNITS], one for each gate, or one of a state; a program has all units of its
rows. `mask` [1, UNITS] tells which units exist, `count` how many values a row has. A normalization of a cell's state is
a tuple: its factor and bias [1, UNITS], `mask` and `count`.
"""

import triton
from triton import language as tl

from rnnkit.specs import NORM_EPSILON

EPSILON = tl.constexpr(NORM_EPSILON)


@triton.jit
def of_units(values, place, mask, GATES: tl.constexpr, size, SUM: tl.constexpr):
    """The program's part [1, UNITS] of `values`, at `place` and for each further gate `size` later."""
    found = ()
    for g in tl.static_range(GATES):
        found += (tl.load(values + g * size + place, mask=mask, other=0.0).to(SUM),)
    return found


@triton.jit
def of_state(factor, bias, base, u, mask, count, SUM: tl.constexpr):
    """The normalization of a state by `factor` and `bias` [D, H]; None if they are. `base`: the direction's place."""
    if factor is None:
        return None
    else:
        return (
            tl.load(factor + base + u, mask=mask, other=0.0).to(SUM),
            tl.load(bias + base + u, mask=mask, other=0.0).to(SUM),
            mask,
            count,
        )


@triton.jit
def mean(values, mask, count):
    """The mean of each row's values [ROWS, 1]."""
    sum = tl.zeros((values[0].shape[0], 1), dtype=values[0].dtype)
    for k in tl.static_range(len(values)):
        sum += tl.sum(tl.where(mask, values[k], 0.0), 1, keep_dims=True)
    return sum / count.to(values[0].dtype)


@triton.jit
def normalized(values, mask, count):
    """The tuple of n, and 1 / sqrt(variance + epsilon) of each row [ROWS, 1]."""
    center = mean(values, mask, count)
    squares = ()
    for k in tl.static_range(len(values)):
        squares += ((values[k] - center) * (values[k] - center),)
    rstd = 1 / tl.sqrt(mean(squares, mask, count) + EPSILON)
    found = ()
    for k in tl.static_range(len(values)):
        found += ((values[k] - center) * rstd,)
    return found, rstd


@triton.jit
def passed(grads, factors, values, mask, count):
    """The gradients of `values` from those of n times the factor."""
    n, rstd = normalized(values, mask, count)
    of_n = ()
    products = ()
    for k in tl.static_range(len(values)):
        of_n += (grads[k] * factors[k],)
        products += (of_n[k] * n[k],)
    offset = mean(of_n, mask, count)
    slope = mean(products, mask, count)
    found = ()
    for k in tl.static_range(len(values)):
        found += (rstd * (of_n[k] - offset - n[k] * slope),)
    return found
