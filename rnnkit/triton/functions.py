"""Functions of a tile that Triton's language has not, for cells that are printed from their graph."""

import triton
from triton import language as tl


@triton.jit
def log1p(x):
    """log(1 + x). Below 1, where 1 + x loses x's last bits, log(u) is scaled by x / (u - 1), with u = 1 + x."""
    u = 1 + x
    below = tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))
    return tl.where(x < 1, below, tl.log(u))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); above 20 it is x, as in torch."""
    return tl.where(x > 20, x, log1p(tl.exp(x)))


@triton.jit
def logsigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|))."""
    return tl.where(x > 0, tl.zeros_like(x), x) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x <= 0, tl.zeros_like(x), x)


@triton.jit
def maximum(a, b):
    """The larger; NaN where one is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def minimum(a, b):
    """The smaller; NaN where one is NaN."""
    return tl.where((a < b) | (a != a), a, b)
