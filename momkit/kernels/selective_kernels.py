"""Kernels of Mamba's selective scan: a state `[channels, N]` in registers, and its tokens one after another.

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T      o_t = h_t C_t + D x_t

All of it is elementwise but for the sums over states and, in gradients of B and C, over channels: nothing for tensor
cores, and the exponentials are what takes the time. Blocks of TOKENS are unrolled, so that loads overlap.
"""

import triton
import triton.language as tl

from momkit.kernels.gates import LOG2_E
from momkit.kernels.layout import piece_of
from momkit.kernels.scalar_kernels import slot_of
from momkit.kernels.tiles import fetch_tile

# tokens of a block; the backward pass holds that many states, and starts from those that the forward pass kept
TOKENS = tl.constexpr(8)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_row(base, row: tl.constexpr, live, cols, WIDTH: tl.constexpr):
    """A row of `[T, WIDTH]`, float32, zeros where no token or no column is."""
    return tl.load(base + row * WIDTH + cols, mask=(row < live) & (cols < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def load_block(base, live, cols, WIDTH: tl.constexpr):
    """TOKENS rows of `[T, WIDTH]`, as a tuple of rows, float32, zeros where no token or no column is."""
    tl.static_assert(TOKENS == 8)
    rows = tl.arange(0, TOKENS)
    mask = (rows < live)[None, :] & (cols < WIDTH)[:, None]
    tile = tl.load(base + rows[None, :] * WIDTH + cols[:, None], mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(tile, [cols.shape[0], 2, 2, 2]))
    t04, t26 = tl.split(even)
    t15, t37 = tl.split(odd)
    t0, t4 = tl.split(t04)
    t1, t5 = tl.split(t15)
    t2, t6 = tl.split(t26)
    t3, t7 = tl.split(t37)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def store_block(base, values, live, cols, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Write a tuple of TOKENS rows of `[T, WIDTH]`, in its dtype; REVERSE: the last one comes first."""
    AT: tl.constexpr = TOKENS - 1 if REVERSE else 0
    STEP: tl.constexpr = -1 if REVERSE else 1
    v04, v26 = tl.join(values[AT], values[AT + 4 * STEP]), tl.join(values[AT + 2 * STEP], values[AT + 6 * STEP])
    v15, v37 = tl.join(values[AT + STEP], values[AT + 5 * STEP]), tl.join(values[AT + 3 * STEP], values[AT + 7 * STEP])
    tile = tl.reshape(tl.join(tl.join(v04, v26), tl.join(v15, v37)), [cols.shape[0], TOKENS])
    rows = tl.arange(0, TOKENS)
    mask = (rows < live)[None, :] & (cols < WIDTH)[:, None]
    tl.store(base + rows[None, :] * WIDTH + cols[:, None], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rate(A, spot, inside):
    """Log2 decay of a step of one, at places `spot` of `[channels, N]`."""
    return tl.load(A + spot, mask=inside, other=0.0) * LOG2_E


@triton.jit
def store_zeros(base, begin, end, cols, WIDTH: tl.constexpr):
    """Zeros in rows begin to end of `[T, WIDTH]`."""
    rows = tl.arange(0, TOKENS)
    for i in range(tl.cdiv(end - begin, TOKENS)):
        at = begin + i * TOKENS
        mask = (rows < end - at)[None, :] & (cols < WIDTH)[:, None]
        tl.store(base + at.to(tl.int64) * WIDTH + rows[None, :] * WIDTH + cols[:, None], 0.0, mask=mask)


@triton.jit(do_not_specialize=["count", "segments"])
def scan_kernel(
    x, dt, A, B, C, D, starts, out, last, kept, spans, table, cu_seqlens, count, segments,
    CHANNELS: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    REVERSE: tl.constexpr, ONLY_STATE: tl.constexpr, KEEP: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    """One program a (piece, BC channels). x, dt, out `[T, channels]`, A `[channels, N]`, B, C `[T, N]`, D `[channels]`.

    starts: `[P, channels, N]`, the state that each piece starts from; last: `[S, channels, N]`, where a segment ends.
    KEEP: the state before each block goes to kept `[slots, channels, N]`, see `slot_of`.
    ONLY_STATE: no output; from zeros, the state that each piece adds goes to `starts`, its sum of dt to spans
    `[P, channels]`. REVERSE, for states only: the gradient of the state before a token, from that after it; x is the
    gradient of the output, and B is C. TIMED, for segments of one piece: A `[T, channels, N]`, D `[T, channels]`.
    """
    NC: tl.constexpr = (CHANNELS + BC - 1) // BC
    FIRST: tl.constexpr = TOKENS - 1 if REVERSE else 0
    STEP: tl.constexpr = -1 if REVERSE else 1
    pid = tl.program_id(0)
    tile, place = pid % NC, pid // NC
    segment, begin, end, index = piece_of(table, count, place)
    cols, states = tile * BC + tl.arange(0, BC), tl.arange(0, BN)
    if segment < 0:
        return
    if segment == segments:
        if not ONLY_STATE:
            store_zeros(out, begin, end, cols, CHANNELS)
        return
    leaves = index == 0 if REVERSE else end == tl.load(cu_seqlens + segment + 1).to(tl.int32)
    if ONLY_STATE:
        if leaves:
            return
    spot = cols[:, None] * N + states[None, :]
    inside = (cols < CHANNELS)[:, None] & (states < N)[None, :]
    if not TIMED:
        rate = load_rate(A, spot, inside)
    own = starts + place.to(tl.int64) * (CHANNELS * N) + spot
    h = tl.zeros([BC, BN], tl.float32) if ONLY_STATE else tl.load(own, mask=inside, other=0.0)
    span = tl.zeros([BC], tl.float32)
    if not (ONLY_STATE or TIMED):
        skip = tl.load(D + cols, mask=cols < CHANNELS, other=0.0).to(tl.float32)
    blocks = tl.cdiv(end - begin, TOKENS)
    for i in range(blocks):
        at = begin + (blocks - 1 - i if REVERSE else i) * TOKENS
        live, base = end - at, at.to(tl.int64)
        if KEEP:
            target = kept + slot_of(at, segment, TOKENS).to(tl.int64) * (CHANNELS * N) + spot
            tl.store(target, h.to(kept.dtype.element_ty), mask=inside)
        xs = load_block(x + base * CHANNELS, live, cols, CHANNELS)
        dts = load_block(dt + base * CHANNELS, live, cols, CHANNELS)
        if TIMED:
            skips = load_block(D + base * CHANNELS, live, cols, CHANNELS)
        outs = ()
        for t in tl.static_range(FIRST, FIRST + STEP * TOKENS, STEP):
            B_t = load_row(B + base * N, t, live, states, N)
            if TIMED:
                rate, skip = load_rate(A + (base + t) * (CHANNELS * N), spot, inside & (t < live)), skips[t]
            decay = tl.exp2(dts[t][:, None] * rate)
            if REVERSE:
                h = decay * (h + xs[t][:, None] * B_t[None, :])
            else:
                h = decay * h + (dts[t] * xs[t])[:, None] * B_t[None, :]
            if ONLY_STATE:
                span += dts[t]
            else:
                C_t = load_row(C + base * N, t, live, states, N)
                outs += (tl.sum(h * C_t[None, :], 1) + skip * xs[t],)
        if not ONLY_STATE:
            store_block(out + base * CHANNELS, outs, live, cols, CHANNELS, False)
    if ONLY_STATE:
        tl.store(own, h, mask=inside)
        tl.store(spans + place.to(tl.int64) * CHANNELS + cols, span, mask=cols < CHANNELS)
    elif leaves:
        tl.store(last + segment.to(tl.int64) * (CHANNELS * N) + spot, h, mask=inside)


@triton.jit(do_not_specialize=["count", "segments", "length"])
def chain_kernel(
    start, A, starts, spans, table, cu_seqlens, count, segments, length,
    CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From what each piece of a segment adds to the state, in place, the state that each piece starts from.

    start: `[S, channels, N]`, or None for zeros, where the first piece of a segment starts (reversed: the last).
    """
    NC: tl.constexpr = (CHANNELS * N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile, place = pid % NC, pid // NC
    segment, begin, _, index = piece_of(table, count, place)
    if (segment < 0) | (segment == segments) | (index > 0):
        return
    spot = tile * BLOCK + tl.arange(0, BLOCK)
    inside = spot < CHANNELS * N
    pieces = tl.maximum(tl.cdiv(tl.load(cu_seqlens + segment + 1).to(tl.int32) - begin, length), 1)
    rate = load_rate(A, spot, inside & (pieces > 1))
    h = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        h = tl.load(start + segment.to(tl.int64) * (CHANNELS * N) + spot, mask=inside, other=0.0)
    at = place + (pieces - 1 if REVERSE else 0)
    for i in range(pieces):
        target = starts + at.to(tl.int64) * (CHANNELS * N) + spot
        # the last one adds to no other
        more = i < pieces - 1
        added = tl.load(target, mask=inside & more, other=0.0)
        span = tl.load(spans + at.to(tl.int64) * CHANNELS + spot // N, mask=inside & more, other=0.0)
        tl.store(target, h, mask=inside)
        h = h * tl.exp2(span * rate) + added
        at += -1 if REVERSE else 1


@triton.jit(do_not_specialize=["count", "segments", "T"])
def gradient_kernel(
    x, dt, A, B, C, D, d_out, kept, ends, dx, d_dt, dA, dB, dC, dD, table, count, segments, T,
    CHANNELS: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    TIMED: tl.constexpr,
):  # fmt: skip
    """All gradients, one program a (piece, TILES tiles of BC channels), from the last block of tokens to the first.

    kept: states before blocks, see `scan_kernel`; those inside a block are found again from it.
    ends: `[P, channels, N]`, the gradient of the state after a piece; it becomes, block by block, that of the state
    before it. dA `[P, channels, N]`, dD `[P, channels]`: in parts, zeros so far; TIMED: as A and D are, with T for P.
    dB, dC `[groups, T, N]`: in parts.
    Sums over channels wait until all tiles have added their elements: they cross threads once a block.
    """
    LAST: tl.constexpr = TOKENS - 1
    GROUPS: tl.constexpr = (CHANNELS + BC * TILES - 1) // (BC * TILES)
    pid = tl.program_id(0)
    group, place = pid % GROUPS, pid // GROUPS
    segment, begin, end, _ = piece_of(table, count, place)
    rows, states = tl.arange(0, TOKENS), tl.arange(0, BN)
    part = group.to(tl.int64) * T * N
    if segment < 0:
        return
    if segment == segments:
        store_zeros(dB + part, begin, end, states, N)
        store_zeros(dC + part, begin, end, states, N)
        for tile in range(TILES):
            cols = (group * TILES + tile) * BC + tl.arange(0, BC)
            store_zeros(dx, begin, end, cols, CHANNELS)
            store_zeros(d_dt, begin, end, cols, CHANNELS)
        return
    blocks = tl.cdiv(end - begin, TOKENS)
    for i in range(blocks):
        at = begin + (blocks - 1 - i) * TOKENS
        live, base = end - at, at.to(tl.int64)
        # loads of the block before are issued when this one is done with
        ahead = tl.maximum(at - TOKENS, begin)
        far, final_row = ahead.to(tl.int64) * CHANNELS, end - 1 - ahead
        fetch_tile(x + far, rows, final_row, group * (BC * TILES), BC * TILES, CHANNELS, CHANNELS)
        fetch_tile(dt + far, rows, final_row, group * (BC * TILES), BC * TILES, CHANNELS, CHANNELS)
        fetch_tile(d_out + far, rows, final_row, group * (BC * TILES), BC * TILES, CHANNELS, CHANNELS)
        far_kept = kept + slot_of(ahead, segment, TOKENS).to(tl.int64) * (CHANNELS * N)
        # by token, the last one first
        wrote, reads = (), ()
        for _n in tl.static_range(TOKENS):
            wrote += (tl.zeros([BC, BN], tl.float32),)
            reads += (tl.zeros([BC, BN], tl.float32),)
        for tile in range(TILES):
            cols = (group * TILES + tile) * BC + tl.arange(0, BC)
            spot = cols[:, None] * N + states[None, :]
            inside = (cols < CHANNELS)[:, None] & (states < N)[None, :]
            if TIMED:
                skips = load_block(D + base * CHANNELS, live, cols, CHANNELS)
            else:
                rate = load_rate(A, spot, inside)
                skip = tl.load(D + cols, mask=cols < CHANNELS, other=0.0).to(tl.float32)
            source = kept + slot_of(at, segment, TOKENS).to(tl.int64) * (CHANNELS * N) + spot
            h = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            fetch_tile(far_kept, cols, CHANNELS - 1, 0, BN, N, N)
            own = place.to(tl.int64) * (CHANNELS * N) + spot
            dh = tl.load(ends + own, mask=inside, other=0.0)
            xs = load_block(x + base * CHANNELS, live, cols, CHANNELS)
            dts = load_block(dt + base * CHANNELS, live, cols, CHANNELS)
            before = ()
            for t in tl.static_range(TOKENS):
                B_t = load_row(B + base * N, t, live, states, N)
                if TIMED:
                    rate = load_rate(A + (base + t) * (CHANNELS * N), spot, inside & (t < live))
                decay = tl.exp2(dts[t][:, None] * rate)
                before += (h,)
                h = decay * h + (dts[t] * xs[t])[:, None] * B_t[None, :]
            d_rate, d_skip = tl.zeros([BC, BN], tl.float32), tl.zeros([BC], tl.float32)
            d_outs = load_block(d_out + base * CHANNELS, live, cols, CHANNELS)
            more_wrote, more_reads, dxs, d_dts, d_skips = (), (), (), (), ()
            for n in tl.static_range(TOKENS):
                x_t, dt_t, d_t = xs[LAST - n], dts[LAST - n], d_outs[LAST - n]
                B_t = load_row(B + base * N, LAST - n, live, states, N)
                C_t = load_row(C + base * N, LAST - n, live, states, N)
                if TIMED:
                    own_rate, timed_inside = (base + LAST - n) * (CHANNELS * N), inside & (LAST - n < live)
                    rate, skip = load_rate(A + own_rate, spot, timed_inside), skips[LAST - n]
                more_reads += (reads[n] + d_t[:, None] * h,)
                dh += d_t[:, None] * C_t[None, :]
                more_wrote += (wrote[n] + (dt_t * x_t)[:, None] * dh,)
                of_write = tl.sum(dh * B_t[None, :], 1)
                h = before[LAST - n]
                dh = tl.exp2(dt_t[:, None] * rate) * dh
                of_decay = h * dh
                if TIMED:
                    tl.store(dA + own_rate + spot, dt_t[:, None] * of_decay, mask=timed_inside)
                    d_skips += (d_t * x_t,)
                else:
                    d_rate += dt_t[:, None] * of_decay
                    d_skip += d_t * x_t
                dxs += (dt_t * of_write + skip * d_t,)
                d_dts += (x_t * of_write + tl.sum(of_decay * rate, 1) * LN_2,)
            wrote, reads = more_wrote, more_reads
            store_block(dx + base * CHANNELS, dxs, live, cols, CHANNELS, True)
            store_block(d_dt + base * CHANNELS, d_dts, live, cols, CHANNELS, True)
            tl.store(ends + own, dh, mask=inside)
            if TIMED:
                store_block(dD + base * CHANNELS, d_skips, live, cols, CHANNELS, True)
            else:
                tl.store(dA + own, tl.load(dA + own, mask=inside, other=0.0) + d_rate, mask=inside)
                sums = dD + place.to(tl.int64) * CHANNELS + cols
                tl.store(sums, tl.load(sums, mask=cols < CHANNELS, other=0.0) + d_skip, mask=cols < CHANNELS)
        # what threads wrote for the next block, others may read
        tl.debug_barrier()
        d_Bs, d_Cs = (), ()
        for n in tl.static_range(TOKENS):
            d_Bs += (tl.sum(wrote[n], 0),)
            d_Cs += (tl.sum(reads[n], 0),)
        store_block(dB + part + base * N, d_Bs, live, states, N, True)
        store_block(dC + part + base * N, d_Cs, live, states, N, True)
