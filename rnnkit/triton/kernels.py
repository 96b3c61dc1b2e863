"""The scan of one layer as two Triton kernels, forward and backward, for every cell.

A program owns a tile of ROWS rows of the batch and UNITS hidden units, of one direction, through the steps `first` to
`first + steps` of the scan, counted as they are processed. Where a tile has all units, a step needs nothing of other
programs, and one launch runs all steps. Otherwise one launch runs one step. The recurrent product reads what the steps
before wrote to memory, so that a program holds no more than its tile. carry.py tells what a row has before a step.

Shapes: D directions (each head of one is a direction), R rows of all steps, G gates, G_hh recurrent parts of gates, V
values in the reserve, W gradient columns of a unit, S states, U parameters of a unit. The number of steps and that of
rows are not constants of the compiler; offsets of rows have 64 bits.
"""

import triton
from triton import language as tl

from rnnkit.triton import carry, layer_norm, zoneout

#: Integer arguments that differ between calls of one model: another value must not cause a compilation.
SIZES = ["gate_stride", "batch", "total", "last", "heads", "first", "steps"]

#: Whether Triton's interpreter runs the kernels. It multiplies bfloat16 as if its bits were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def products(
    a, a_mask, b, b_size, b_place, b_mask, b_stride, K,
    COUNT: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    factor=None,
):  # fmt: skip
    """sum_k a[n, k] b[g, k, u], [ROWS, UNITS] for each g of COUNT.

    `a` [ROWS, 1] points to the rows' first values, `b + b_place` [1, UNITS] to the columns' first values. The columns'
    values are `b_stride` values apart, the COUNT matrices `b_size`. K is the number of products of each sum. `factor`
    points like `a` to values that multiply those of `a`; None for ones.
    """
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((a.shape[0], b_place.shape[1]), dtype=SUM),)
    k = tl.arange(0, DEPTH)
    b_places = k[:, None] * b_stride + b_place
    for at in range(0, K, DEPTH):
        inside = k < K - at
        left = tl.load(a + k[None, :], mask=a_mask & inside[None, :], other=0.0)
        if factor is not None:
            times = tl.load(factor + k[None, :], mask=a_mask & inside[None, :], other=0.0)
            left = (left.to(SUM) * times.to(SUM)).to(left.dtype)
            factor += DEPTH
        if INTERPRETED:
            left = left.to(SUM)
        added = ()
        for g in tl.static_range(COUNT):
            right = tl.load(b + g * b_size + b_places, mask=b_mask & inside[:, None], other=0.0)
            if INTERPRETED:
                right = right.to(SUM)
            added += (tl.dot(left, right, sums[g], input_precision=PRECISION, out_dtype=SUM),)
        sums = added
        a += DEPTH
        b += DEPTH * b_stride
    return sums


@triton.jit
def aligned(size, ALIGNED: tl.constexpr):
    """`size` in a form that tells the compiler that ALIGNED divides it."""
    return size // ALIGNED * ALIGNED


@triton.jit
def opaque(u, step):
    """`u`, indices, in a form that the compiler cannot fold: min(step, 0) is always 0.

    Without it the compiler moves every address out of the loop over steps, and there are more of them than registers.
    """
    return u + tl.multiple_of(tl.minimum(step, 0), 16)


@triton.jit
def tile(batch, hidden, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The program's first row, the numbers of its rows from there on [ROWS, 1], its units [1, UNITS], and masks.

    The masks tell which rows and which units exist.
    """
    begin = tl.program_id(0) * ROWS
    i = tl.arange(0, ROWS)[:, None]
    u = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :]
    return begin, i, u, i < batch - begin, u < hidden


@triton.jit
def state_base(states, k, begin, batch, hidden):
    """Pointer to the program's first row of state k in `states` [S, D, N, H]."""
    d = tl.program_id(2).to(tl.int64)
    return states + ((k * tl.num_programs(2) + d) * batch + begin) * hidden


@triton.jit
def load_states(states, begin, i, u, mask, batch, hidden, STATES: tl.constexpr):
    """The program's tile of each state in `states` [S, D, N, H]."""
    found = ()
    for k in tl.static_range(STATES):
        base = state_base(states, k, begin, batch, hidden)
        found = found + (tl.load(base + (i * hidden + u), mask=mask, other=0.0),)
    return found


@triton.jit
def store_states(states, values, begin, i, u, mask, batch, hidden, STATES: tl.constexpr):
    """Writes the tile of each state to `states` [S, D, N, H]."""
    for k in tl.static_range(STATES):
        base = state_base(states, k, begin, batch, hidden)
        tl.store(base + (i * hidden + u), values[k], mask=mask)


@triton.jit
def load_saved(
    reserve, row, i, u, mask, hidden,
    VALUES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT of the V = VALUES values of the program's tile, from FIRST on; its first row in [rows, V, H] is `row`."""
    save = ()
    for k in tl.static_range(COUNT):
        base = reserve + (row * VALUES + FIRST + k) * hidden
        save += (tl.load(base + (i * (VALUES * hidden) + u), mask=mask, other=0.0),)
    return save


@triton.jit
def store_saved(
    reserve, values, row, i, u, mask, hidden, VALUES: tl.constexpr, FIRST: tl.constexpr
):
    """Writes values of the program's tile to `reserve`, as `load_saved` reads them."""
    for k in tl.static_range(len(values)):
        base = reserve + (row * VALUES + FIRST + k) * hidden
        tl.store(base + (i * (VALUES * hidden) + u), values[k], mask=mask)


@triton.jit
def store_grads(
    grad_gates, grads, row, i, u, mask, hidden, COLUMNS: tl.constexpr, FIRST: tl.constexpr
):
    """Writes gradients of the program's tile to their columns of `grad_gates` [R, D, COLUMNS, H], from FIRST on."""
    directions = tl.num_programs(2)
    d = tl.program_id(2).to(tl.int64)
    for k in tl.static_range(len(grads)):
        base = grad_gates + ((row * directions + d) * COLUMNS + FIRST + k) * hidden
        tl.store(
            base + (i * (directions * COLUMNS * hidden) + u),
            grads[k].to(grad_gates.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def bias(b, place, mask, UNITS: tl.constexpr, SUM: tl.constexpr):
    """The bias of the program's units [1, UNITS]; zeros if `b` is None."""
    if b is None:
        return tl.zeros((1, UNITS), dtype=SUM)
    else:
        return tl.load(b + place, mask=mask, other=0.0).to(SUM)


@triton.jit
def of_units(values, place, mask, COUNT: tl.constexpr, size, SUM: tl.constexpr):
    """COUNT parts [1, UNITS] of `values`, of the program's units: at `place`, and each `size` after the one before."""
    found = ()
    for k in tl.static_range(COUNT):
        found += (tl.load(values + k * size + place, mask=mask, other=0.0).to(SUM),)
    return found


@triton.jit
def last_argument(
    norm_c, norm_c_bias, unit, d, u, u_mask, hidden, PARAMETERS: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """In a tuple, the last argument of a cell's functions: what normalizes its state, or its parameters; or nothing."""
    found = ()
    if norm_c is not None:
        found = (layer_norm.of_state(norm_c, norm_c_bias, d * hidden, u, u_mask, hidden, SUM),)
    if unit is not None:
        place = d * PARAMETERS * hidden + u
        found = (of_units(unit, place, u_mask, PARAMETERS, hidden, SUM),)
    return found


@triton.jit(do_not_specialize=SIZES)
def forward(
    gates,  # the input's part of all gates, [R, D, G*H], its rows gate_stride values apart
    b_ih, b_hh,  # [D, G*H] and [D, G_hh*H], or None for zeros
    norm_hh,  # what the normalized product with h is multiplied with, [D, G*H], or None: it is not normalized
    norm_c, norm_c_bias,  # of the cell's state that is normalized, [D, H], or None
    unit,  # the parameters of units, [D, U, H], or None
    w_hh,  # [D, G_hh*H, P], or None: no gate has a recurrent part
    initial,  # h before the first step, [D, N, P], or None for zeros
    states,  # before the first step of this launch, [S, D, N, H]
    new_states,  # on return the states after the last step of this launch, [S, D, N, H]
    offsets,  # the row where each time step begins, [T + 1], or None: each has `batch` rows
    reset,  # [R], see `carry.is_reset`, or None
    reset_h,  # the h that rows are put back to, [D, N, P], or None for zeros
    reset_states,  # the states that they are put back to, [S, D, N, H], or None for zeros
    operand_mask,  # what h is multiplied with where the product reads it, [D, N, P], or None for ones
    kept,  # where units keep a state, S of [R, D*H], see zoneout.py; None instead of one or of all: no zoneout
    output,  # h after each step, [R, D*P]; read, and written through new_h where there is no projection
    new_h,  # on return h: `output`, or before a projection [D, N, H], or None where it is not wanted
    all_states,  # on return the states other than h after each step, S - 1 tensors [R, D*H]; or None
    # On return what the cell saves, or the states other than h before each step, then the h that the cell gave if it is
    # kept: [D, R, V, H]; or None. With layer normalization V is larger by 2*G: the products of all gates with x, which
    # are there before, and with h.
    reserve,
    gate_stride, batch, total, last, heads,  # batch N, total R, last T - 1
    first, steps,
    hidden, projected,  # H, P
    CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr, STATES: tl.constexpr, PARAMETERS: tl.constexpr,
    EVERYTHING: tl.constexpr, VALUES: tl.constexpr, KEEPS_GIVEN: tl.constexpr, ZONEOUT: tl.constexpr,
    PROJECTS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Runs the cell over the steps `first` to `first + steps`."""
    hidden, projected = aligned(hidden, ALIGNED), aligned(projected, ALIGNED)
    gate_stride = aligned(gate_stride, ALIGNED)
    d = tl.program_id(2).to(tl.int64)
    directions = tl.num_programs(2)
    begin, i, u, i_mask, u_mask = tile(batch, hidden, ROWS, UNITS)
    first_unit = tl.program_id(1) * UNITS
    if RECURRENT > 0:
        w = w_hh + (d * RECURRENT * hidden + first_unit) * projected
    state = load_states(states, begin, i, u, i_mask & u_mask, batch, hidden, STATES)
    for step in tl.range(first, first + steps, num_stages=1):
        u = opaque(u, step)
        row, active = carry.active_rows(step, begin, i, last, batch, offsets, heads)
        mask = active & u_mask
        loaded = ()
        for g in tl.static_range(GATES):
            gate = gates + row * gate_stride + (d * GATES + g) * hidden
            loaded += (tl.load(gate + (i * gate_stride + u), mask=mask, other=0.0),)
        if reset is not None:
            begins = carry.is_reset(step, begin, i, last, batch, offsets, heads, reset)
            state = carry.put_back(state, begins, reset_states, begin, i, u, u_mask, batch, hidden)
        recurrent = ()
        if RECURRENT > 0:
            operand, is_there = carry.operand(
                step, begin, i, last, batch, offsets, heads, initial, output, projected, reset, reset_h
            )  # fmt: skip
            factor = None
            if operand_mask is not None:
                factor = carry.of_batch(operand_mask, begin, opaque(i, step), batch, projected)
            recurrent = products(
                operand, is_there & active, w, hidden.to(tl.int64) * projected,
                (u - first_unit) * projected, u_mask, 1, projected, RECURRENT, DEPTH, PRECISION, SUM, factor,
            )  # fmt: skip
        if norm_hh is not None:
            if EVERYTHING:
                store_saved(
                    reserve, recurrent, d * total + row, i, u, mask, hidden, VALUES, VALUES - GATES
                )
            of = layer_norm.moments(recurrent, u_mask, GATES * hidden)
            factors = of_units(norm_hh, d * GATES * hidden + u, u_mask, GATES, hidden, SUM)
            normalized = ()
            for g in tl.static_range(GATES):
                normalized += (layer_norm.normalized(recurrent[g], of) * factors[g],)
            recurrent = normalized
        x = ()
        h = ()
        for g in tl.static_range(GATES):
            x += (loaded[g].to(SUM) + bias(b_ih, (d * GATES + g) * hidden + u, u_mask, UNITS, SUM),)
        for g in tl.static_range(RECURRENT):
            place = (d * RECURRENT + g) * hidden + u
            h += (recurrent[g] + bias(b_hh, place, u_mask, UNITS, SUM),)
        of_cell = last_argument(norm_c, norm_c_bias, unit, d, u, u_mask, hidden, PARAMETERS, SUM)
        new, save = CELL(x, h, state, *of_cell)
        given = new[0]
        base, place = (row * directions + d) * hidden, i * (directions * hidden) + u
        if kept is not None:
            new = zoneout.zoned(state, new, kept, base, place, mask, ZONEOUT)
        if new_h is not None:
            h_stride = hidden if PROJECTS else directions * hidden
            h_base = new_h + (d * batch + begin if PROJECTS else row * directions + d) * hidden
            tl.store(h_base + (i * h_stride + u), new[0].to(new_h.dtype.element_ty), mask=mask)
        if all_states is not None:
            for k in tl.static_range(len(all_states)):
                value = new[k + 1].to(all_states[k].dtype.element_ty)
                tl.store(all_states[k] + base + place, value, mask=mask)
        if reserve is not None:
            values = save if EVERYTHING else state[1:]
            if KEEPS_GIVEN:
                values = values + (given,)
            store_saved(reserve, values, d * total + row, i, u, mask, hidden, VALUES, 0)
        state = carry.carried(active, new, state)
        tl.debug_barrier()  # the next step reads what this one wrote
    store_states(new_states, state, begin, i, u, i_mask & u_mask, batch, hidden, STATES)


@triton.jit(do_not_specialize=SIZES)
def backward(
    weights,  # w_hh [D, G_hh*H, H], or None: no gate has a recurrent part; with a projection w_hr [D, P, H]
    norm_hh,  # what the normalized product with h is multiplied with, [D, G*H], or None: it is not normalized
    norm_c, norm_c_bias,  # of the cell's state that is normalized, [D, H], or None
    unit,  # the parameters of units, [D, U, H], or None
    initial,  # h before the first step, [D, N, P], or None for zeros
    grad_states,  # as the later steps left them, in the first launch of the final states, [S, D, N, H]
    new_grad_states,  # on return the gradients after the last step of this launch, [S, D, N, H]
    offsets,  # the row where each time step begins, [T + 1], or None: each has `batch` rows
    reset,  # [R], see `carry.is_reset`, or None
    reset_h,  # the h that rows are put back to, [D, N, P], or None for zeros
    grad_resets,  # added to: the gradients of the states that rows are put back to, [S, D, N, H]; None without `reset`
    operand_mask,  # what h is multiplied with where the product reads it, [D, N, P], or None; read without a projection
    kept,  # where units keep a state, S of [R, D*H], see zoneout.py; None instead of one or of all: no zoneout
    output,  # h after each step, [R, D*P]
    reserve,  # [D, R, V, H], see `forward`: SAVED values of the cell or the h that it gave, and products of all gates
    grad_output,  # [R, D*H], or None for zeros
    grad_all_states,  # of the states other than h after each step, S - 1 of [R, D*H] or None for zeros; or None
    grad_projected,  # the whole gradient of h after its projection, [D, R, P], or None without one
    # On return [R, D*W*H]: the gradients of the gates, then of the parameters. With layer normalization those of the
    # products with h stand before the gates', and those of a state's normalization after them.
    grad_gates,
    flow,  # on return the gradient of each state after each step, S of [R, D*H]; None instead of one or of all
    batch, total, last, heads,  # batch N, total R, last T - 1
    first, steps,
    hidden, projected,  # H, P
    CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr, STATES: tl.constexpr, PARAMETERS: tl.constexpr,
    SAVED: tl.constexpr, VALUES: tl.constexpr,
    GRAD_STATES: tl.constexpr, GRAD_COLUMNS: tl.constexpr, GRAD_CLIP: tl.constexpr, GRAD_CUT: tl.constexpr,
    KEEPS_GIVEN: tl.constexpr, ZONEOUT: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Runs the cell backward over the steps `first` to `first + steps`; step 0 is the last of the forward pass.

    A step begins with the product that gives the gradient of the later step's operand, h. Where there are initial
    states, a step T follows: no row has it, so only its product counts, which completes their gradients.
    With a projection, the product is that of grad_projected and w_hr instead, and `_grad_operand` of scan.py takes the
    place of step T. Without recurrent parts there is no product; h then passes its gradient through the cell alone.
    """
    hidden, projected = aligned(hidden, ALIGNED), aligned(projected, ALIGNED)
    d = tl.program_id(2).to(tl.int64)
    directions = tl.num_programs(2)
    begin, i, u, i_mask, u_mask = tile(batch, hidden, ROWS, UNITS)
    depth = RECURRENT * hidden if grad_projected is None else projected
    grad_state = load_states(grad_states, begin, i, u, i_mask & u_mask, batch, hidden, STATES)
    grad_reset = grad_state
    if reset is not None:
        grad_reset = load_states(grad_resets, begin, i, u, i_mask & u_mask, batch, hidden, STATES)
    for step in tl.range(first, first + steps, num_stages=1):
        u = opaque(u, step)
        forward_step = last - step
        row, active = carry.active_rows(forward_step, begin, i, last, batch, offsets, heads)
        mask = active & u_mask
        h_base = (row * directions + d) * hidden
        h_place = i * (directions * hidden) + u
        if grad_projected is None:
            later, sends = carry.active_rows(
                forward_step + 1, begin, i, last, batch, offsets, heads
            )
            grad_later = grad_gates + (later * directions + d) * (GRAD_COLUMNS * hidden)
            grad_later += i * (directions * GRAD_COLUMNS * hidden)
        else:
            grad_later = grad_projected + (d * total + row) * projected + i * projected
            sends = active
        of_operand = tl.zeros((ROWS, UNITS), dtype=SUM)
        if weights is not None:
            of_operand = products(
                grad_later, sends, weights + d * depth * hidden, 0, u,
                u_mask, hidden, depth, 1, DEPTH, PRECISION, SUM,
            )[0]  # fmt: skip
        if grad_projected is None:
            if operand_mask is not None:
                factor = carry.of_batch(operand_mask, begin, i, batch, hidden) + u
                of_operand *= tl.load(factor, mask=i_mask & u_mask, other=0.0).to(SUM)
            cut = carry.cuts(forward_step + 1, last, heads, GRAD_CUT)
            begins = None
            if reset is not None:
                begins = carry.is_reset(
                    forward_step + 1, begin, i, last, batch, offsets, heads, reset
                )
            grad_state, of_h = carry.grad_operand(
                grad_state, of_operand, sends, active, cut, GRAD_CLIP, GRAD_CUT,
                begins, grad_reset[0],
            )  # fmt: skip
            grad_reset = (of_h,) + grad_reset[1:]
        else:
            grad_state = (grad_state[0] + of_operand,) + grad_state[1:]
        save = load_saved(reserve, d * total + row, i, u, mask, hidden, VALUES, 0, SAVED)
        h = tl.zeros((ROWS, UNITS), dtype=SUM)
        previous_h = h
        if grad_projected is None:  # the compiler drops loads that the cell does not use
            h = tl.load(output + h_base + h_place, mask=mask, other=0.0).to(SUM)
            operand, is_there = carry.operand(
                forward_step,
                begin,
                i,
                last,
                batch,
                offsets,
                heads,
                initial,
                output,
                hidden,
                reset,
                reset_h,
            )
            previous_h = tl.load(operand + u, mask=is_there & mask, other=0.0).to(SUM)
        if KEEPS_GIVEN:
            h = load_saved(reserve, d * total + row, i, u, mask, hidden, VALUES, SAVED, 1)[0]
        grad_h = grad_state[0]
        if grad_output is not None:
            grad_h += tl.load(grad_output + h_base + h_place, mask=mask, other=0.0).to(SUM)
        grad_new = (grad_h,)
        for k in tl.static_range(1, STATES):
            grad = grad_state[k]
            if grad_all_states is not None and grad_all_states[k - 1] is not None:
                given = grad_all_states[k - 1] + h_base + h_place
                grad += tl.load(given, mask=mask, other=0.0).to(SUM)
            grad_new += (grad,)
        grad_given = grad_new
        of_old = grad_new
        if kept is not None:
            grad_given, of_old = zoneout.parted(grad_new, kept, h_base, h_place, mask, ZONEOUT)
        of_cell = last_argument(norm_c, norm_c_bias, unit, d, u, u_mask, hidden, PARAMETERS, SUM)
        if flow is not None:
            whole = grad_given
            if GRAD_STATES is not None:
                whole = GRAD_STATES(save, grad_given, *of_cell)
            if kept is not None:
                whole = zoneout.whole(grad_new, whole, kept, ZONEOUT)
            for k in tl.static_range(STATES):
                if flow[k] is not None:
                    tl.store(flow[k] + h_base + h_place, whole[k], mask=mask)
        grads_before, grads = CELL(save, h, previous_h, grad_given, *of_cell)
        if norm_hh is not None:
            store_grads(grad_gates, grads, row, i, u, mask, hidden, GRAD_COLUMNS, GATES)
            factors = of_units(norm_hh, d * GATES * hidden + u, u_mask, GATES, hidden, SUM)
            of_products = load_saved(
                reserve, d * total + row, i, u, mask, hidden, VALUES, VALUES - GATES, GATES
            )
            of = layer_norm.moments(of_products, u_mask, GATES * hidden)
            means = layer_norm.means_of_grads(
                grads, factors, of_products, of, u_mask, GATES * hidden
            )
            for g in tl.static_range(GATES):
                # Loaded again behind a store: all of them at once need too many registers.
                value = load_saved(
                    reserve, d * total + row, i, u, mask, hidden, VALUES, VALUES - GATES + g, 1
                )[0]
                grad = layer_norm.passed(grads[g], factors[g], value, of, means)
                store_grads(grad_gates, (grad,), row, i, u, mask, hidden, GRAD_COLUMNS, g)
        if kept is not None:
            grads_before = zoneout.added(grads_before, of_old)
        if (GRAD_CLIP is not None) | (GRAD_CUT > 0) | (reset is not None):
            _, continues = carry.active_rows(
                forward_step - 1, begin, i, last, batch, offsets, heads
            )
            cut = carry.cuts(forward_step, last, heads, GRAD_CUT)
            begins = None
            if reset is not None:
                begins = carry.is_reset(forward_step, begin, i, last, batch, offsets, heads, reset)
            passed = (grads_before[0],)  # that of h is not complete before the product
            sums = (grad_reset[0],)
            for k in tl.static_range(1, STATES):
                grad, sum = carry.passed_back(
                    grads_before[k], continues, cut, GRAD_CLIP, GRAD_CUT, begins, grad_reset[k]
                )
                passed += (grad,)
                sums += (sum,)
            grads_before = passed
            grad_reset = sums
        if norm_hh is None:
            store_grads(grad_gates, grads, row, i, u, mask, hidden, GRAD_COLUMNS, 0)
        grad_state = carry.carried(active, grads_before, grad_state)
        tl.debug_barrier()  # the next step reads what this one wrote
    store_states(new_grad_states, grad_state, begin, i, u, i_mask & u_mask, batch, hidden, STATES)
    if reset is not None:
        store_states(grad_resets, grad_reset, begin, i, u, i_mask & u_mask, batch, hidden, STATES)


@triton.jit(do_not_specialize=SIZES)
def unprojected(
    reserve,  # [D, R, V, H]
    norm_c, norm_c_bias,  # of the cell's state that is normalized, [D, H], or None
    unit,  # the parameters of units, [D, U, H], or None
    h,  # on return h before its projection, [D, R, H]
    total, hidden,  # R, H
    OUTPUT: tl.constexpr, SAVED: tl.constexpr, VALUES: tl.constexpr, PARAMETERS: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """h before its projection at all steps. A program has a tile of the rows of all steps."""
    hidden = aligned(hidden, ALIGNED)
    begin, i, u, i_mask, u_mask = tile(total, hidden, ROWS, UNITS)
    mask = i_mask & u_mask
    d = tl.program_id(2).to(tl.int64)
    row = d * total + begin
    save = load_saved(reserve, row, i, u, mask, hidden, VALUES, 0, SAVED)
    found = OUTPUT(
        save, *last_argument(norm_c, norm_c_bias, unit, d, u, u_mask, hidden, PARAMETERS, SUM)
    )
    tl.store(h + row * hidden + (i * hidden + u), found.to(h.dtype.element_ty), mask=mask)
