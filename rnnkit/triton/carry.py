"""What a row of the batch has before a step: what the step before left, or its initial values where it begins.

A row of a packed sequence is active at some steps only: it ends early or, in the reverse direction, begins late. While
it is not active it keeps its states, and backward their gradients. The kernels ask here where they read the operand of
a step's recurrent product (`operand`, also for the previous h of a cell's backward), and where they take that
operand's gradient (`grad_operand`). With a projection, `_grad_operand` of scan.py takes it.

A row that a reset puts back before a step (`is_reset`) has other states than the step before left: `operand` selects
its h, `put_back` its other states. What the step passes back
goes to the gradients of these states.

`LayerCall.operand_mask` changes no state. `products` of kernels.py multiplies h by it where it reads the recurrent
operand, and the kernel of the backward pass multiplies the operand's gradient by it, which then is a gradient of h. The
previous h of a cell's backward is not masked.

In all functions a program has ROWS rows of the batch, from `begin` on, which i [ROWS, 1] counts. Steps are numbered 0
to `last` in the order of the direction's forward scan, in both passes. `offsets` [T + 1] are the rows where time steps
begin, None where each has `batch`. Of the D directions, the first `heads` go forward.
"""

import triton
from triton import language as tl


@triton.jit
def reverses(heads):
    """Whether the program's direction begins at the last time."""
    return tl.program_id(2) >= heads


@triton.jit
def rows_of(step, last, batch, offsets, heads):
    """A step's first row among the rows of all steps, and its number of rows: 0 for a step that does not exist."""
    t = tl.where(reverses(heads), last - step, step)
    exists = (step >= 0) & (step <= last)
    if offsets is None:
        start = t.to(tl.int64) * batch
        count = tl.where(exists, batch, 0)
    else:
        start = tl.load(offsets + t, mask=exists, other=0)
        count = (tl.load(offsets + t + 1, mask=exists, other=0) - start).to(tl.int32)
    return start, count


@triton.jit
def active_rows(step, begin, i, last, batch, offsets, heads):
    """The program's first row of a step among the rows of all steps, and which of its rows are active [ROWS, 1]."""
    start, count = rows_of(step, last, batch, offsets, heads)
    active = i < count - begin
    return start + begin, active


@triton.jit
def is_reset(step, begin, i, last, batch, offsets, heads, reset):
    """Which rows [ROWS, 1] are put back between the step before and this one, see `LayerCall.reset`: `reset` [R]."""
    row, active = active_rows(step, begin, i, last, batch, offsets, heads)
    row_before, continues = active_rows(step - 1, begin, i, last, batch, offsets, heads)
    later = tl.where(reverses(heads), row_before, row)  # in time
    return tl.load(reset + later + i, mask=active & continues, other=0) != 0


@triton.jit
def put_back(states, begins, reset_states, begin, i, u, u_mask, batch, hidden):
    """The states before a step: those of `reset_states` [S, D, N, H], None for zeros, in the rows that `is_reset`."""
    d = tl.program_id(2).to(tl.int64)
    found = ()
    for k in tl.static_range(len(states)):
        new = tl.zeros_like(states[k])
        if reset_states is not None:
            base = reset_states + ((k * tl.num_programs(2) + d) * batch + begin) * hidden
            new = tl.load(base + (i * hidden + u), mask=begins & u_mask, other=0.0)
        found += (tl.where(begins, new, states[k]),)
    return found


@triton.jit
def of_batch(values, begin, i, batch, width):
    """Pointers to the beginnings of the program's rows [ROWS, 1] in `values` [D, N, width]."""
    d = tl.program_id(2).to(tl.int64)
    return values + (d * batch + begin) * width + i * width


@triton.jit
def operand(
    step, begin, i, last, batch, offsets, heads, initial, output, width, reset=None, reset_h=None
):  # fmt: skip
    """h before a step: pointers to the beginnings of its rows [ROWS, 1], and which are there; the others are zeros.

    A row that was active at the step before continues with the output [R, D*P] of that step, another one begins with
    `initial` [D, N, P], None for zeros. One that `is_reset` has `reset_h`, alike. `width` is P.
    """
    row, continues = active_rows(step - 1, begin, i, last, batch, offsets, heads)
    d = tl.program_id(2).to(tl.int64)
    directions = tl.num_programs(2)
    h = output + (row * directions + d) * width + i * (directions * width)
    is_there = continues
    if initial is not None:
        h = tl.where(continues, h, of_batch(initial, begin, i, batch, width))
        is_there = i < batch - begin
    if reset is not None:
        begins = is_reset(step, begin, i, last, batch, offsets, heads, reset)
        if reset_h is None:
            is_there = is_there & (begins == 0)
        else:
            h = tl.where(begins, of_batch(reset_h, begin, i, batch, width), h)
            is_there = is_there | begins
    return h, is_there


@triton.jit
def cuts(step, last, heads, GRAD_CUT: tl.constexpr):
    """Whether no gradient passes back from a step to the step before, see `LayerCall.grad_cut`."""
    if GRAD_CUT == 0:
        return False
    else:
        boundary = tl.where(reverses(heads), last - step + 1, step)
        return boundary % GRAD_CUT == 0


@triton.jit
def passed_back(
    grad, continues, cut, GRAD_CLIP: tl.constexpr, GRAD_CUT: tl.constexpr, begins=None, sum=None
):
    """The gradient that a step passes back, clipped; zero in rows that continue from the step before if that is cut.

    Of rows that are put back before the step, `begins` (None: no rows are), it is added to `sum` instead. Returns the
    gradient and the sum. `GRAD_CLIP` is None for no limit.
    """
    if GRAD_CLIP is not None:
        grad = tl.where(grad > GRAD_CLIP, GRAD_CLIP, tl.where(grad < -GRAD_CLIP, -GRAD_CLIP, grad))
    if begins is not None:
        sum += tl.where(begins, grad, 0.0)
        grad = tl.where(begins, 0.0, grad)
    if GRAD_CUT > 0:
        grad = tl.where(continues & cut, 0.0, grad)
    return grad, sum


@triton.jit
def grad_operand(
    grad_state, grad_recurrent, sends, active, cut, GRAD_CLIP: tl.constexpr, GRAD_CUT: tl.constexpr,
    begins, grad_reset,
):  # fmt: skip
    """Gradients of the states after a step: `grad_state`, to whose h the gradient through the later product is added.

    `grad_state` is what the later steps left. `grad_recurrent` is the gradient of h through the later product. Where a
    row begins at the later step, that is its initial h: the row is not active now and keeps the sum. `sends`: which
    rows have the later step, and so are passed a gradient back; `cut`: whether that step `cuts`; `begins`: which rows
    are put back before it, whose gradients are added to `grad_reset`; None: no rows are. Returns that, too.
    """
    h = grad_state[0] + grad_recurrent
    if (GRAD_CLIP is not None) | (GRAD_CUT > 0) | (begins is not None):
        passed, grad_reset = passed_back(h, active, cut, GRAD_CLIP, GRAD_CUT, begins, grad_reset)
        h = tl.where(sends, passed, h)
    return (h,) + grad_state[1:], grad_reset


@triton.jit
def carried(active, new, old):
    """The states after a step, or the gradients of the states before it: the new ones of active rows, else the old."""
    states = ()
    for k in tl.static_range(len(old)):
        states += (tl.where(active, new[k], old[k]),)
    return states
