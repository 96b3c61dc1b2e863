"""The cells' mathematics for Triton kernels: the place where a new cell is added.

All arguments and results are tiles [ROWS, UNITS] in the type of sums, or tuples of tiles.

- `forward(x, h, state)`: x and h are the input's and the recurrent part of each gate, state the states before the step.
  Returns the states after the step, and `save`, the values that `backward` needs beside h.
- `backward(save, h, previous_h, grad_state)`: h after and before the step, the gradients of the states after the step.
  Returns the gradients of the states before the step without the part through the recurrent weights, which the scan
  adds, and the gradient columns of the gates (`CellSpec.input_grads` tells their order).
- `output(save)`: h after the step, for a cell whose h may be projected.
- `grad_states(save, grad_state)`: the whole gradients of the states after the step: what `backward` gets, and what
  passes from one state of the step to another.

The LSTM's take a last argument `norm`, the normalization of c that h is made of, see layer_norm.py; None for none.
With it `backward` returns two columns more: the gradients of what is added to the normalized c, and of its factor.
"""

from typing import NamedTuple

import triton
from triton import JITFunction
from triton import language as tl

from rnnkit.triton import layer_norm


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): an exponential that overflows gives 0."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2|x|) + 1) with the sign of x; near 0, where that cancels, x - x * (a continued fraction of x^2)."""
    near = 0.5 if x.dtype == tl.float64 else 0.8
    size = tl.abs(x)
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    y = tl.minimum(x * x, 1)
    above = y * (45045 + y * (2772 + y * 27))
    below = 135135 + y * (62370 + y * (3150 + y * 28))
    return tl.where(size < near, x - x * above / below, tl.where(x < 0, -large, large))


@triton.jit
def rnn_tanh_forward(x, h, state):
    """h' = tanh(x + h)."""
    return (tanh(x[0] + h[0]),), ()


@triton.jit
def rnn_tanh_backward(save, h, previous_h, grad_state):
    """Nothing is saved: the derivative follows from h."""
    return (tl.zeros_like(h),), (grad_state[0] * (1 - h * h),)


@triton.jit
def rnn_relu_forward(x, h, state):
    """h' = max(x + h, 0); NaN stays NaN."""
    sum = x[0] + h[0]
    return (tl.where(sum <= 0, tl.zeros_like(sum), sum),), ()


@triton.jit
def rnn_relu_backward(save, h, previous_h, grad_state):
    """Nothing is saved: the derivative follows from h."""
    return (tl.zeros_like(h),), (tl.where(h <= 0, tl.zeros_like(h), grad_state[0]),)


@triton.jit
def lstm_forward(x, h, state, norm=None):
    """i, f, o = sigmoid(x + h); g = tanh(x + h); c' = f c + i g; h' = o tanh(c'); gate order i, f, g, o."""
    i = sigmoid(x[0] + h[0])
    f = sigmoid(x[1] + h[1])
    g = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    c = f * state[1] + i * g
    return (o * tanh(_read(c, norm)), c), (i, f, g, o, state[1])


@triton.jit
def _read(c, norm):
    """What h is made of: c, or c normalized, times the factor, plus the bias."""
    if norm is None:
        return c
    else:
        factor, bias, mask, count = norm
        return layer_norm.normalized(c, layer_norm.moments((c,), mask, count)) * factor + bias


@triton.jit
def _of_c(grad_read, c, norm):
    """The gradient of c from that of `_read`."""
    if norm is None:
        return grad_read
    else:
        factor, _, mask, count = norm
        of = layer_norm.moments((c,), mask, count)
        means = layer_norm.means_of_grads((grad_read,), (factor,), (c,), of, mask, count)
        return layer_norm.passed(grad_read, factor, c, of, means)


@triton.jit
def lstm_backward(save, h, previous_h, grad_state, norm=None):
    """Saved: the gates, and c before the step."""
    i, f, g, o, c = save
    new_c = f * c + i * g
    tanh_c = tanh(_read(new_c, norm))
    grad_read = grad_state[0] * o * (1 - tanh_c * tanh_c)
    grad_c = grad_state[1] + _of_c(grad_read, new_c, norm)
    grad_i = grad_c * g * i * (1 - i)
    grad_f = grad_c * c * f * (1 - f)
    grad_g = grad_c * i * (1 - g * g)
    grad_o = grad_state[0] * tanh_c * o * (1 - o)
    grads = (grad_i, grad_f, grad_g, grad_o)
    if norm is not None:
        n = layer_norm.normalized(new_c, layer_norm.moments((new_c,), norm[2], norm[3]))
        grads += (grad_read, grad_read * n)
    return (tl.zeros_like(h), grad_c * f), grads


@triton.jit
def lstm_grad_states(save, grad_state, norm=None):
    """The gradient of h, and of c what comes through h as well."""
    i, f, g, o, c = save
    new_c = f * c + i * g
    tanh_c = tanh(_read(new_c, norm))
    grad_read = grad_state[0] * o * (1 - tanh_c * tanh_c)
    return grad_state[0], grad_state[1] + _of_c(grad_read, new_c, norm)


@triton.jit
def lstm_output(save, norm=None):
    """h' = o tanh(f c + i g)."""
    i, f, g, o, c = save
    return o * tanh(_read(f * c + i * g, norm))


@triton.jit
def gru_forward(x, h, state):
    """r, z = sigmoid(x + h); n = tanh(x + r h); h' = n + z (h - n); gate order r, z, n."""
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return (n + z * (state[0] - n),), (r, z, n, h[2])


@triton.jit
def gru_backward(save, h, previous_h, grad_state):
    """Saved: r, z, n, and the recurrent part of n."""
    r, z, n, recurrent = save
    grad_n = grad_state[0] * (1 - z) * (1 - n * n)
    grad_r = grad_n * recurrent * r * (1 - r)
    grad_z = grad_state[0] * (previous_h - n) * z * (1 - z)
    return (grad_state[0] * z,), (grad_r, grad_z, grad_n * r, grad_n)


@triton.jit
def gru_writes_forward(x, h, state):
    """As `gru_forward`, but h' = h + z (n - h)."""
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return (state[0] + z * (n - state[0]),), (r, z, n, h[2])


@triton.jit
def gru_writes_backward(save, h, previous_h, grad_state):
    """Saved: r, z, n, and the recurrent part of n."""
    r, z, n, recurrent = save
    grad_n = grad_state[0] * z * (1 - n * n)
    grad_r = grad_n * recurrent * r * (1 - r)
    grad_z = grad_state[0] * (n - previous_h) * z * (1 - z)
    return (grad_state[0] * (1 - z),), (grad_r, grad_z, grad_n * r, grad_n)


class Cell(NamedTuple):
    """A cell's functions; one without `output` has no projection, one without `grad_states` a single state."""

    forward: JITFunction
    backward: JITFunction
    output: JITFunction | None = None
    grad_states: JITFunction | None = None


#: The cells by their names in `specs.CELLS`.
TRITON_CELLS = {
    "rnn_tanh": Cell(rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Cell(rnn_relu_forward, rnn_relu_backward),
    "lstm": Cell(lstm_forward, lstm_backward, lstm_output, lstm_grad_states),
    "gru": Cell(gru_forward, gru_backward),
    "gru_writes": Cell(gru_writes_forward, gru_writes_backward),
}
