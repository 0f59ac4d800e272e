"""Kernels of the short convolution: a program walks along strips of rows, with the inputs that a row sees in registers.

Vectors are `[STRIPS, LANES]`: rows of several strips where columns are few, else one row. `at` counts rows of a strip,
`first` is the row of its place 0. Rows are loaded AHEAD at a time, before those in hand are worked on; what is special
near the edges of segments and strips is done only where a group of AHEAD rows is near one.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def columns(block, WIDTH: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr):
    """The column of each lane `[LANES]` of a block, and which lanes have one: a head's fill the first SIZE of GROUP."""
    lane = tl.arange(0, LANES)
    if SIZE == GROUP:
        cols = block * LANES + lane
        inside = tl.full([LANES], True, tl.int1) if WIDTH % LANES == 0 else cols < WIDTH
    else:
        cols = (block * (LANES // GROUP) + lane // GROUP) * SIZE + lane % GROUP
        inside = (lane % GROUP < SIZE) & (cols < WIDTH)
    return cols, inside


@triton.jit
def load_rows(base, row, live, cols, inside, STRIDE: tl.constexpr):
    """Rows `[STRIPS, LANES]` as they are; zeros where no row or no column is."""
    spot = base + (row.to(tl.int64) * STRIDE)[:, None] + cols[None, :]
    return tl.load(spot, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, row, live, cols, inside, STRIDE: tl.constexpr):
    """Write rows `[STRIPS, LANES]` in the dtype of what they go to."""
    spot = base + (row.to(tl.int64) * STRIDE)[:, None] + cols[None, :]
    tl.store(spot, rows.to(base.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def load_tokens(source, first, at, low, high, STEP: tl.constexpr, COUNT: tl.constexpr):
    """What COUNT rows from `at` on read of x, `[STRIPS]` each; None if that is themselves."""
    tokens = None
    if source is not None:
        tokens = ()
        for j in tl.static_range(COUNT):
            place = at + j * STEP
            tokens += (tl.load(source + first + place, mask=(place >= low) & (place < high), other=0),)
    return tokens


@triton.jit
def load_group(
    base, tokens, first, at, low, high, cols, inside, STRIDE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """COUNT rows from `at` on as they are, or those of their tokens; zeros outside of places [low, high)."""
    group = ()
    spot = base + ((first.to(tl.int64) + at) * STRIDE)[:, None] + cols[None, :]
    for j in tl.static_range(COUNT):
        place = at + j * STEP
        live = (place >= low) & (place < high)
        if tokens is None:
            # neighbours are a constant apart
            group += (tl.load(spot + j * STEP * STRIDE, mask=live[:, None] & inside[None, :], other=0.0),)
        else:
            group += (load_rows(base, tokens[j], live, cols, inside, STRIDE),)
    return group


@triton.jit
def biased(loaded, bias, segment, row, live, N, share, cols, inside, WIDTH: tl.constexpr):
    """Inputs of rows, float32: with their memory's bias, rounded as a history keeps them. share: segments a memory."""
    u = loaded.to(tl.float32)
    if bias is not None:
        n = tl.load(segment + row, mask=live, other=N).to(tl.int32)
        u += load_rows(bias, n // share, live & (n < N), cols, inside, WIDTH).to(tl.float32)
        u = u.to(loaded.dtype).to(tl.float32)
    return u


@triton.jit
def load_window(
    x, source, bias, segment, first, at, low, high, N, share, cols, inside,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT inputs from place `at` on, float32, with their bias."""
    window = ()
    tokens = load_tokens(source, first, at, low, high, 1, COUNT)
    loaded = load_group(x, tokens, first, at, low, high, cols, inside, STRIDE, 1, COUNT)
    for j in tl.static_range(COUNT):
        live = (at + j >= low) & (at + j < high)
        window += (biased(loaded[j], bias, segment, first + (at + j), live, N, share, cols, inside, WIDTH),)
    return window


@triton.jit
def near_edge(since, until, first, at, low, high, BEFORE, AFTER):
    """Whether a row is nearer than BEFORE to its segment's begin, nearer than AFTER to its end, or has no segment."""
    there = (at >= low) & (at < high)
    begin = tl.load(since + first + at, mask=there, other=-1)
    end = tl.load(until + first + at, mask=there, other=0)
    return tl.max(((begin < BEFORE) | (end < AFTER)).to(tl.int32)) > 0


@triton.jit
def own_inputs(raw, history, segment, row, since, cols, inside, WIDTH: tl.constexpr, W: tl.constexpr):
    """The W inputs that rows see, oldest first: raw ones of their segment, the history's before its begin.

    Zeros at rows of no segment.
    """
    u = ()
    for w in tl.static_range(W):
        own = since >= W - 1 - w
        past = 0.0
        if (history is not None) & (w < W - 1):
            early = (since >= 0) & (own == 0)
            n = tl.load(segment + row, mask=early, other=0)
            past = load_rows(history, n * (W - 1) + since + w, early, cols, inside, WIDTH).to(tl.float32)
        u += (tl.where(own[:, None], raw[w], past),)
    return u


@triton.jit
def load_vector(base, cols, inside):
    """`[1, LANES]` float32 of a row; None if there is none."""
    vector = None
    if base is not None:
        vector = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return vector


@triton.jit
def load_weights(weight, cols, inside, W: tl.constexpr, PADDED: tl.constexpr):
    """A tuple of W vectors `[1, LANES]` float32; None without a convolution."""
    weights = None
    if weight is not None:
        tap = tl.arange(0, PADDED)
        there = inside[:, None] & (tap < W)[None, :]
        # all taps of a column lie together
        taps = tl.load(weight + cols[:, None] * W + tap[None, :], mask=there, other=0.0).to(tl.float32)
        weights = ()
        for w in tl.static_range(W):
            weights += (tl.sum(tl.where(tap[None, :] == w, taps, 0.0), 1)[None, :],)
    return weights


@triton.jit
def convolve(u, weights, conv_bias, W: tl.constexpr):
    """z of inputs u, oldest first."""
    z = u[0] if weights is None else u[0] * weights[0]
    for w in tl.static_range(1, W):
        z += u[w] * weights[w]
    if conv_bias is not None:
        z += conv_bias
    return z


@triton.jit
def sigmoid(z):
    """Its exponential does not overflow; a square root is one instruction, a quotient eight."""
    root = tl.rsqrt(1 + tl.exp2(tl.minimum(z * -LOG2_E, 126.0)))
    return root * root


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation, and its derivative by z."""
    if ACTIVATION == "silu":
        gate = sigmoid(z)
        a = z * gate
        slope = gate * (1 + z * (1 - gate))
    elif ACTIVATION == "sigmoid":
        a = sigmoid(z)
        slope = a * (1 - a)
    elif ACTIVATION == "tanh":
        square = z * z
        # near zero the difference would cancel
        near = z * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        a = tl.where(square < 0.06, near, 2 * sigmoid(2 * z) - 1)
        slope = 1 - a * a
    else:
        a = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return a, slope


@triton.jit
def sum_heads(rows, GROUP: tl.constexpr):
    """At each lane the sum over its group of lanes."""
    STRIPS: tl.constexpr = rows.shape[0]
    HEADS: tl.constexpr = rows.shape[1] // GROUP
    total = tl.sum(rows.reshape(STRIPS, HEADS, GROUP), 2)
    return tl.broadcast_to(total[:, :, None], [STRIPS, HEADS, GROUP]).reshape(STRIPS, HEADS * GROUP)


@triton.jit
def inverse_norm(a, inside, GROUP: tl.constexpr, ACTIVATION: tl.constexpr):
    """1 / l2 norm of each lane's head; lanes without a column don't count."""
    square = a * a
    # others leave zeros where there are none
    if ACTIVATION == "sigmoid":
        square = tl.where(inside[None, :], square, 0.0)
    return tl.rsqrt(sum_heads(square, GROUP) + 1e-6)


@triton.jit(do_not_specialize=["R", "N", "rows", "share"])
def forward_kernel(
    x, source, bias, weight, conv_bias, history, segment, since, until, y, R, N, rows, share,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    STRIPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y `[R, WIDTH]` of columns OFFSET, ... of x; a program takes STRIPS strips of `rows` rows."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, SIZE, GROUP, LANES)
    start = tl.program_id(0) // BLOCKS * (STRIPS * rows)
    first = start + tl.arange(0, STRIPS) * rows
    stop = tl.minimum(rows, R - first)
    weights = load_weights(weight, cols, inside, W, PADDED)
    shift = load_vector(conv_bias, cols, inside)
    x += OFFSET
    window = load_window(
        x, source, bias, segment, first, 1 - W, -first, R - first, N, share, cols, inside, WIDTH, STRIDE, W - 1
    )
    tokens = load_tokens(source, first, 0, 0, stop, 1, AHEAD)
    ahead = load_group(x, tokens, first, 0, 0, stop, cols, inside, STRIDE, 1, AHEAD)
    near = near_edge(since, until, first, 0, 0, stop, W - 1, AHEAD - 1)
    if source is not None:
        tokens = load_tokens(source, first, AHEAD, 0, stop, 1, AHEAD)
    for i in range(0, tl.minimum(rows, R - start), AHEAD):
        held, edge = ahead, near
        ahead = load_group(x, tokens, first, i + AHEAD, 0, stop, cols, inside, STRIDE, 1, AHEAD)
        near = near_edge(since, until, first, i + AHEAD, 0, stop, W - 1, AHEAD - 1)
        if source is not None:
            tokens = load_tokens(source, first, i + 2 * AHEAD, 0, stop, 1, AHEAD)
        for j in tl.static_range(AHEAD):
            at = i + j
            row = first + at
            raw = window
            raw += (biased(held[j], bias, segment, row, at < stop, N, share, cols, inside, WIDTH),)
            window = raw[1:]
            u = raw
            if edge:
                begin = tl.load(since + row, mask=at < stop, other=-1)
                u = own_inputs(raw, history, segment, row, begin, cols, inside, WIDTH, W)
            out, _ = activate(convolve(u, weights, shift, W), ACTIVATION)
            if SIZE:
                out *= inverse_norm(out, inside, GROUP, ACTIVATION)
            if edge:
                begin = tl.load(since + row, mask=at < stop, other=-1)
                out = tl.where((begin >= 0)[:, None], out, 0.0)
            store_rows(y, out, row, at < stop, cols, inside, WIDTH)


@triton.jit(do_not_specialize=["N", "share"])
def history_kernel(
    x, source, bias, history, cu_seqlens, segment, new_history, N, share,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of each segment, its history before them; a program takes ROWS rows of the result."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, 0, 0, LANES)
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    n, live = row // (W - 1), row < N * (W - 1)
    begin = tl.load(cu_seqlens + n, mask=live, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=live, other=0).to(tl.int32)
    at = end - (W - 1) + row % (W - 1)
    own = live & (at >= begin)
    token = at
    if source is not None:
        token = tl.load(source + at, mask=own, other=0)
    loaded = load_rows(x + OFFSET, token, own, cols, inside, STRIDE)
    u = biased(loaded, bias, segment, at, own, N, share, cols, inside, WIDTH)
    if history is not None:
        past = load_rows(history, n * (W - 1) + (at - begin + W - 1), live & (own == 0), cols, inside, WIDTH)
        u = tl.where(own[:, None], u, past.to(tl.float32))
    store_rows(new_history, u, row, live, cols, inside, WIDTH)


@triton.jit
def newer_gradient(
    d_new, segment, until, row, place, live, cols, inside, WIDTH: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Row `place`, less the rows until a segment's end, of the gradient of its new history; zeros if negative."""
    kept = place - tl.load(until + row, mask=live, other=W)
    live = live & (kept >= 0)
    n = tl.load(segment + row, mask=live, other=0)
    return load_rows(d_new, n * (W - 1) + kept, live, cols, inside, WIDTH).to(tl.float32)


@triton.jit(do_not_specialize=["R", "N", "rows", "share"])
def backward_kernel(
    x, source, bias, weight, conv_bias, history, segment, since, until, dy, d_new, dx, d_history, sums,
    R, N, rows, share,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, STRIDE: tl.constexpr, TOTAL: tl.constexpr, W: tl.constexpr,
    PADDED: tl.constexpr, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, STRIPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Columns OFFSET, ... of dx `[R, TOTAL]` by slot, d_history of segments with rows, and what a program adds to the
    gradients of weight and conv_bias: sums `[programs, W + 1, WIDTH]`, without the rows of what is None.

    Strips are walked upwards, from the W-1 rows behind them on; z and what follows are found again.
    """
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, SIZE, GROUP, LANES)
    program = tl.program_id(0) // BLOCKS
    first = (program * STRIPS + tl.arange(0, STRIPS)) * rows
    low, high = -first, R - first
    weights = load_weights(weight, cols, inside, W, PADDED)
    shift = load_vector(conv_bias, cols, inside)
    x += OFFSET
    # gradients of the W-1 rows behind a strip reach into it
    last = rows + W - 2
    window = load_window(x, source, bias, segment, first, rows, low, high, N, share, cols, inside, WIDTH, STRIDE, W - 1)
    nothing = tl.zeros([STRIPS, LANES], tl.float32)
    later = (nothing,) * (W - 1)
    d_weights, d_shift = (nothing,) * W, nothing
    tokens = load_tokens(source, first, last - W + 1, low, high, -1, AHEAD)
    x_ahead = load_group(x, tokens, first, last - W + 1, low, high, cols, inside, STRIDE, -1, AHEAD)
    dy_ahead = load_group(dy, None, first, last, 0, high, cols, inside, WIDTH, -1, AHEAD)
    near = near_edge(since, until, first, last - AHEAD + 1, low, high, W - 1, AHEAD + W - 2)
    if source is not None:
        tokens = load_tokens(source, first, last - AHEAD - W + 1, low, high, -1, AHEAD)
    for i in range(0, last + 1, AHEAD):
        x_held, dy_held, at = x_ahead, dy_ahead, last - i
        # rows behind a strip add nothing to gradients of parameters; those before it have no dy here
        edge = near | (at >= rows)
        x_ahead = load_group(x, tokens, first, at - AHEAD - W + 1, low, high, cols, inside, STRIDE, -1, AHEAD)
        dy_ahead = load_group(dy, None, first, at - AHEAD, 0, high, cols, inside, WIDTH, -1, AHEAD)
        near = near_edge(since, until, first, at - 2 * AHEAD + 1, low, high, W - 1, AHEAD + W - 2)
        if source is not None:
            tokens = load_tokens(source, first, at - 2 * AHEAD - W + 1, low, high, -1, AHEAD)
        for j in tl.static_range(AHEAD):
            at = last - i - j
            row = first + at
            there, mine = (at >= low) & (at < high), (at >= 0) & (at < rows) & (at < high)
            live = (at - W + 1 >= low) & (at - W + 1 < high)
            raw = (biased(x_held[j], bias, segment, row - (W - 1), live, N, share, cols, inside, WIDTH),)
            raw += window
            window = raw[: W - 1]
            u, gradient = raw, dy_held[j].to(tl.float32)
            if edge:
                begin = tl.load(since + row, mask=there, other=-1)
                end = tl.load(until + row, mask=there, other=R)
                u = own_inputs(raw, history, segment, row, begin, cols, inside, WIDTH, W)
                gradient = tl.where((begin >= 0)[:, None], gradient, 0.0)
                kept = ()
                for w in tl.static_range(W - 1):
                    kept += (tl.where((end == 0)[:, None], 0.0, later[w]),)
                later = kept
            a, slope = activate(convolve(u, weights, shift, W), ACTIVATION)
            if SIZE:
                inverse = inverse_norm(a, inside, GROUP, ACTIVATION)
                # of a and dy, not of a / norm, so that the two sums need not wait for each other
                along = sum_heads(gradient * a, GROUP) * inverse * inverse * inverse
                gradient = gradient * inverse - a * along
            dz = gradient * slope
            dzs = (dz,)
            dzs += later
            later = dzs[: W - 1]
            du = dz if weights is None else dz * weights[W - 1]
            for w in tl.static_range(1, W):
                du += dzs[w] * weights[W - 1 - w]
            if edge:
                if d_new is not None:
                    du += newer_gradient(d_new, segment, until, row, W - 2, mine, cols, inside, WIDTH, W)
                if d_history is not None:
                    begins = mine & (tl.load(since + row, mask=mine, other=-1) == 0)
                    if tl.max(begins.to(tl.int32)) > 0:
                        n = tl.load(segment + row, mask=begins, other=0)
                        for p in tl.static_range(W - 1):
                            d_past = dz * weights[p]
                            for w in tl.static_range(1, p + 1):
                                d_past += dzs[w] * weights[p - w]
                            if d_new is not None:
                                # a short segment leaves some of its history in the new one
                                d_past += newer_gradient(
                                    d_new, segment, until, row, p - 1, begins, cols, inside, WIDTH, W
                                )
                            store_rows(d_history, d_past, n * (W - 1) + p, begins, cols, inside, WIDTH)
                dz = tl.where(mine[:, None], dz, 0.0)
            store_rows(dx + OFFSET, du, row, mine, cols, inside, TOTAL)
            d_shift += dz
            longer = ()
            for w in tl.static_range(W):
                longer += (d_weights[w] + u[w] * dz,)
            d_weights = longer
    TAKEN: tl.constexpr = 0 if weight is None else W
    to = sums + program.to(tl.int64) * ((TAKEN + (conv_bias is not None)) * WIDTH) + cols
    for w in tl.static_range(TAKEN):
        tl.store(to + w * WIDTH, tl.sum(d_weights[w], 0), mask=inside)
    if conv_bias is not None:
        tl.store(to + TAKEN * WIDTH, tl.sum(d_shift, 0), mask=inside)
