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
def of_state(factor, bias, base, u, mask, count, SUM: tl.constexpr):
    """The normalization of a state by `factor` and `bias` [D, H]. `base`: the direction's place."""
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
def moments(values, mask, count):
    """Of each row the mean and 1 / sqrt(variance + epsilon), [ROWS, 1]."""
    center = mean(values, mask, count)
    squares = ()
    for k in tl.static_range(len(values)):
        squares += ((values[k] - center) * (values[k] - center),)
    return center, 1 / tl.sqrt(mean(squares, mask, count) + EPSILON)


@triton.jit
def normalized(value, of):
    """n of a tile, from the row's moments."""
    return (value - of[0]) * of[1]


@triton.jit
def means_of_grads(grads, factors, values, of, mask, count):
    """What `passed` needs of a row: the means of the gradients of n and of their products with n, [ROWS, 1]."""
    of_n = ()
    products = ()
    for k in tl.static_range(len(values)):
        of_n += (grads[k] * factors[k],)
        products += (of_n[k] * normalized(values[k], of),)
    return mean(of_n, mask, count), mean(products, mask, count)


@triton.jit
def passed(grad, factor, value, of, means):
    """The gradient of a tile from that of n times the factor."""
    return of[1] * (grad * factor - means[0] - normalized(value, of) * means[1])
