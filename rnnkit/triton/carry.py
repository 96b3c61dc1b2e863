"""What a row of the batch has before a step: what the step before left, or its initial values where it begins.

A row of a packed sequence is active at some steps only: it ends early or, in the reverse direction, begins late. While
it is not active it keeps its states, and backward their gradients. The scans ask here at two places: where the operand
of a step's recurrent product is read (`operand`), and where that operand's gradient is taken (`grad_operand`).

Two more cases belong here. A row that is put back to its initial values before a step does not continue from the step
before: `operand` selects its initial h, the scan its other initial states, and `grad_operand` lets no gradient pass.
A factor of the operand goes with the pointers that `operand` returns, and multiplies `grad_recurrent`.

In all functions a program has ROWS rows of the batch, from `begin` on, which i [ROWS, 1] counts. Steps are counted as
they are processed, up to `last`. `offsets` [T + 1] are the rows where time steps begin, None where each has `batch`.
"""

import triton
from triton import language as tl


@triton.jit
def rows_of(step, last, batch, offsets):
    """A step's first row among the rows of all steps, and its number of rows: 0 for a step that does not exist."""
    reverse = tl.program_id(2) == 1
    t = tl.where(reverse, last - step, step)
    exists = (step >= 0) & (step <= last)
    if offsets is None:
        start = t.to(tl.int64) * batch
        count = tl.where(exists, batch, 0)
    else:
        start = tl.load(offsets + t, mask=exists, other=0)
        count = (tl.load(offsets + t + 1, mask=exists, other=0) - start).to(tl.int32)
    return start, count


@triton.jit
def active_rows(step, begin, i, last, batch, offsets):
    """The program's first row of a step among the rows of all steps, and which of its rows are active [ROWS, 1]."""
    start, count = rows_of(step, last, batch, offsets)
    active = i < count - begin
    return start + begin, active


@triton.jit
def operand(step, begin, i, last, batch, offsets, initial, output, width):
    """h before a step: pointers to the beginnings of its rows [ROWS, 1], and which are there; the others are zeros.

    A row that was active at the step before continues with the output [R, D*P] of that step, another one begins with
    `initial` [D, N, P], None for zeros. `width` is P.
    """
    row, continues = active_rows(step - 1, begin, i, last, batch, offsets)
    d = tl.program_id(2).to(tl.int64)
    directions = tl.num_programs(2)
    h = output + (row * directions + d) * width + i * (directions * width)
    is_there = continues
    if initial is not None:
        h = tl.where(continues, h, initial + (d * batch + begin) * width + i * width)
        is_there = i < batch - begin
    return h, is_there


@triton.jit
def grad_operand(grad_state, grad_recurrent):
    """Gradients of the states after a step: `grad_state`, those that the later steps left, with that of the operand.

    `grad_recurrent` is the gradient of the later step's operand, h. Of a row that begins at the later step it is the
    gradient of the initial h, which a row that is not active keeps.
    """
    return (grad_state[0] + grad_recurrent,) + grad_state[1:]


@triton.jit
def carried(active, new, old):
    """The states after a step, or the gradients of the states before it: the new ones of active rows, else the old."""
    states = ()
    for k in tl.static_range(len(old)):
        states += (tl.where(active, new[k], old[k]),)
    return states
