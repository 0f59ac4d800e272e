"""Kernels of the scalar family: one decayed scan that serves the output and, with its roles exchanged, every gradient.

    out_i = scale (sum over j seen by i of (decay from j to i) (x_i . y_j) z_j + (decay since the start) x_i^T S)

Forward, i sees j <= i and S is the state before the first token. The gradients are the same sum:
    o  from (q, k, v);    dq from (do, v, k), S transposed;
reversed, i sees j >= i, S is the gradient of the state after the last token, and scale is on z alone:
    dv from (k, q, do);   dk from (v, do, q), S transposed.
A state `[K, V]` lives in registers, a tile of its columns in each program; its tokens come by in chunks of C.
"""

import triton
import triton.language as tl

from momkit.kernels.gates import load_decay, pair_decay, pair_mask
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import fetch_tile, load_tile

# chunks that the gradient of gates takes at once
CHUNKS = tl.constexpr(16)
# log2 of a decay below all rounding
NEXT_TO_NOTHING = tl.constexpr(-30.0)


@triton.jit(do_not_specialize=["count", "segments", "T", "scale"])
def scan_kernel(
    x, y, z, w, sums, start, starts, out, last, decays, terms, crossings, after, final, table, cu_seqlens,
    count, segments, T, scale,
    H: tl.constexpr, RX: tl.constexpr, RY: tl.constexpr, RZ: tl.constexpr, RW: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, LOW: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, ONLY_STATE: tl.constexpr,
    START: tl.constexpr, STORE_LAST: tl.constexpr, FINAL: tl.constexpr, TERMS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, y `[T, H/RX, K]`, z, out `[T, H, V]`, one program a (piece, head, BV columns of the state).

    start: `[N, H, K, V]`, the state before a segment's first piece (reversed: after its last); without START, zeros.
    starts: the same for other pieces, by their place. last: `[N, H, K, V]`, where a segment's scan ends. ONLY_STATE: no
    output; from zeros, the state that each piece adds goes to `starts`, its decay to `decays` `[P, H]`.
    sums: with GATED, `[1 + LOW, H, T]`, see `gate_sums`.
    TERMS, for gradients of gates: w `[T, H/RW, V]` is what out is the gradient of; terms `[V / BV, H, T]`, over this
    program's columns: w . (what out has from S), and forward, for pairs of tokens inside the chunk, what i reads of j
    times its gradient, added to i and taken from j. Forward also crossings `[V / BV, P, H]`: <S, dS> where pieces end,
    dS from final `[N, H, K, V]` (FINAL, else zeros) where the segment ends, else from after, by the piece's place.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    tile, h, place = pid % NV, pid // NV % H, pid // (NV * H)
    segment, begin, end, index = piece_of(table, count, place)
    if segment < 0:
        return
    rows, ks, cols = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    if segment == segments:
        if not ONLY_STATE:
            for i in range(tl.cdiv(end - begin, C)):
                at = begin + i * C
                live = rows < end - at
                base = at.to(tl.int64) * (H * V) + h * V
                mask = live[:, None] & (cols < V)[None, :]
                tl.store(out + base + rows[:, None] * (H * V) + cols[None, :], 0.0, mask=mask)
        return
    begins = index == 0
    ends = end == tl.load(cu_seqlens + segment + 1).to(tl.int32)
    enters, leaves = (ends, begins) if REVERSE else (begins, ends)
    if ONLY_STATE:
        if leaves:
            return
    SK: tl.constexpr = 1 if TRANSPOSED else V
    SV: tl.constexpr = K if TRANSPOSED else 1
    spot = ks[:, None] * SK + cols[None, :] * SV
    inside = (ks < K)[:, None] & (cols < V)[None, :]
    if ONLY_STATE:
        S = tl.zeros([BK, BV], tl.float32)
    elif START:
        source = start + (segment.to(tl.int64) * H + h) * (K * V)
        if not enters:
            source = starts + (place.to(tl.int64) * H + h) * (K * V)
        S = tl.load(source + spot, mask=inside, other=0.0)
    else:
        source = starts + (place.to(tl.int64) * H + h) * (K * V)
        S = tl.load(source + spot, mask=inside & (enters == 0), other=0.0)
    whole = 0.0
    steps = tl.cdiv(end - begin, C)
    for i in tl.range(steps, num_stages=STAGES):
        step = steps - 1 - i if REVERSE else i
        at = begin + step * C
        live = rows < end - at
        base = at.to(tl.int64)
        # loads of the next chunk are issued when this one is done with
        ahead = tl.maximum(at - C, begin) if REVERSE else tl.minimum(at + C, end - 1)
        far, final_row = ahead.to(tl.int64), end - 1 - ahead
        fetch_tile(y + far * (H // RY * K) + h // RY * K, rows, final_row, 0, BK, H // RY * K, K)
        fetch_tile(z + far * (H // RZ * V) + h // RZ * V, rows, final_row, tile * BV, BV, H // RZ * V, V)
        if not ONLY_STATE:
            fetch_tile(x + far * (H // RX * K) + h // RX * K, rows, final_row, 0, BK, H // RX * K, K)
        if TERMS:
            fetch_tile(w + far * (H // RW * V) + h // RW * V, rows, final_row, tile * BV, BV, H // RW * V, V)
        b_y = load_tile(y + base * (H // RY * K) + h // RY * K, rows, live, ks, H // RY * K, K, K == BK)
        b_z = load_tile(z + base * (H // RZ * V) + h // RZ * V, rows, live, cols, H // RZ * V, V, V % BV == 0)
        if GATED:
            plane = tl.cast(T, tl.int64) * H
            newest = tl.minimum(C, end - at) - 1
            high, low, rest, total = load_decay(sums + tl.cast(h, tl.int64) * T + at, plane, rows, live, newest, LOW)
            whole += total
        if not ONLY_STATE:
            b_x = load_tile(x + base * (H // RX * K) + h // RX * K, rows, live, ks, H // RX * K, K, K == BK)
            between = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
            if GATED:
                between *= pair_decay(high, low, REVERSE, False, LOW)
            else:
                between *= pair_mask(C, REVERSE, False)
            narrow = S.to(b_x.dtype)
            b_out = tl.dot(b_x, narrow, input_precision=PRECISION)
            if TERMS and not LOW:
                # sums of terms over many tokens would show what 16 bits round off the state
                b_out = tl.dot(b_x, (S - narrow.to(tl.float32)).to(b_x.dtype), b_out, input_precision=PRECISION)
            if GATED:
                b_out *= tl.exp2(rest if REVERSE else high)[:, None]
            if TERMS:
                b_w = load_tile(w + base * (H // RW * V) + h // RW * V, rows, live, cols, H // RW * V, V, V % BV == 0)
                crossing = tl.sum(b_out * b_w.to(tl.float32), 1)
                if not REVERSE:
                    pairs = between * tl.dot(b_w, tl.trans(b_z), input_precision=PRECISION)
                    crossing = (crossing + tl.sum(pairs, 1) - tl.sum(pairs, 0)) * scale
                tl.store(terms + (tile.to(tl.int64) * H + h) * T + at + rows, crossing, mask=live)
            if REVERSE:
                between *= scale
            b_out = tl.dot(between.to(b_z.dtype), b_z, b_out, input_precision=PRECISION)
            if not REVERSE:
                b_out *= scale
            mask = live[:, None] if V % BV == 0 else live[:, None] & (cols < V)[None, :]
            spot_v = base * (H * V) + h * V + rows[:, None] * (H * V) + cols[None, :]
            tl.store(out + spot_v, b_out.to(out.dtype.element_ty), mask=mask)
        wide = b_z.to(tl.float32)
        if REVERSE:
            wide *= scale
        if GATED:
            wide *= tl.exp2(high if REVERSE else rest)[:, None]
            S *= tl.exp2(total)
        b_z = wide.to(b_y.dtype)
        S = tl.dot(tl.trans(b_y), b_z, S, input_precision=PRECISION)
        if TERMS and not LOW:
            S = tl.dot(tl.trans(b_y), (wide - b_z.to(tl.float32)).to(b_y.dtype), S, input_precision=PRECISION)
    if TERMS and not REVERSE:
        crossing = 0.0
        if not leaves:
            other = tl.load(after + (place.to(tl.int64) * H + h) * (K * V) + spot, mask=inside, other=0.0)
            crossing = tl.sum(tl.sum(S * other, 1), 0)
        elif FINAL:
            other = tl.load(final + (segment.to(tl.int64) * H + h) * (K * V) + spot, mask=inside, other=0.0)
            crossing = tl.sum(tl.sum(S * other, 1), 0)
        tl.store(crossings + (tile.to(tl.int64) * count + place) * H + h, crossing)
    if ONLY_STATE:
        tl.store(starts + (place.to(tl.int64) * H + h) * (K * V) + spot, S, mask=inside)
        if tile == 0:
            tl.store(decays + place.to(tl.int64) * H + h, tl.exp2(whole))
    elif STORE_LAST:
        if leaves:
            tl.store(last + (segment.to(tl.int64) * H + h) * (K * V) + spot, S, mask=inside)


@triton.jit(do_not_specialize=["count", "segments", "length"])
def chain_kernel(
    start, starts, decays, table, cu_seqlens, count, segments, length,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """From what each piece of a segment adds to the state, in place, the state that each piece starts from."""
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile, h, place = pid % TILES, pid // TILES % H, pid // (TILES * H)
    segment, begin, _, index = piece_of(table, count, place)
    if (segment < 0) | (segment == segments) | (index > 0):
        return
    pieces = tl.cdiv(tl.load(cu_seqlens + segment + 1).to(tl.int32) - begin, length)
    if pieces < 2:
        return
    spot = tile * BLOCK + tl.arange(0, BLOCK)
    inside = spot < SIZE
    S = tl.zeros([BLOCK], tl.float32)
    if START:
        S = tl.load(start + (segment.to(tl.int64) * H + h) * SIZE + spot, mask=inside, other=0.0)
    at = place + (pieces - 1 if REVERSE else 0)
    added = tl.load(starts + (at.to(tl.int64) * H + h) * SIZE + spot, mask=inside, other=0.0)
    for _ in range(1, pieces):
        S = S * tl.load(decays + at.to(tl.int64) * H + h) + added
        at += -1 if REVERSE else 1
        target = starts + (at.to(tl.int64) * H + h) * SIZE + spot
        # what was here has been used up after the next turn; the last piece's place was never written
        added = tl.load(target, mask=inside, other=0.0)
        tl.store(target, S, mask=inside)


@triton.jit
def add_unless_cut(later, later_cuts, sooner, sooner_cuts):
    """Sums over what is not cut off from what comes later."""
    return tl.where(sooner_cuts > 0, sooner, later + sooner), later_cuts | sooner_cuts


@triton.jit(do_not_specialize=["count", "segments", "T"])
def gate_gradient_kernel(
    reads, writes, crossings, sums, dg, table, count, segments, T,
    READS: tl.constexpr, WRITES: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dg_t = what passes token t: from an earlier token or the segment's start to a later token or the segment's end.

    reads `[READS, H, T]` and writes `[WRITES, H, T]`: the terms of dq and dv, in parts. crossings `[READS, P, H]`:
    <S, dS> where pieces end, in parts. Inside a chunk, reads from t on and writes before t pass t. Across a chunk
    passes <S, dS> at its end less what the chunk wrote itself; where the chunk's decay is below 2^CUT that is next to
    nothing, and what the difference was rounded by is not carried on.
    """
    pid = tl.program_id(0)
    h, place = pid % H, pid // H
    segment, begin, end, _ = piece_of(table, count, place)
    if segment < 0:
        return
    chunk = tl.arange(0, CHUNKS)
    places = chunk[:, None] * C + tl.arange(0, C)[None, :]
    plane = tl.cast(T, tl.int64)
    passed = 0.0
    if segment < segments:
        for n in tl.static_range(READS):
            passed += tl.load(crossings + (place.to(tl.int64) + n * count) * H + h)
    steps = tl.cdiv(end - begin, CHUNKS * C)
    for i in range(steps):
        at = begin + (steps - 1 - i) * (CHUNKS * C)
        live = places < end - at
        target = dg + (at.to(tl.int64) + places) * H + h
        if segment == segments:
            tl.store(target, 0.0, mask=live)
        else:
            read = tl.zeros([CHUNKS, C], tl.float32)
            for n in tl.static_range(READS):
                read += tl.load(reads + (n * H + h) * plane + at + places, mask=live, other=0.0)
            written = tl.zeros([CHUNKS, C], tl.float32)
            for n in tl.static_range(WRITES):
                written += tl.load(writes + (n * H + h) * plane + at + places, mask=live, other=0.0)
            ends = tl.minimum((chunk + 1) * C, end - at) - 1
            whole = tl.load(sums + h * plane + at + ends, mask=chunk * C < end - at, other=0.0)
            cut = (whole < NEXT_TO_NOTHING).to(tl.int32)
            total = tl.sum(written, 1)
            gained = tl.sum(read, 1) - tl.where(cut > 0, 0.0, total)
            later, cuts = tl.associative_scan((gained, cut), 0, add_unless_cut, reverse=True)
            later += tl.where(cuts > 0, 0.0, passed)
            # <S, dS> at a chunk's end is that at the next one's start
            across = tl.where(cut > 0, 0.0, later - tl.sum(read, 1))
            inside = tl.cumsum(read, 1, reverse=True) + tl.cumsum(written, 1) - written
            tl.store(target, inside + across[:, None], mask=live)
            passed = tl.sum(tl.where(chunk == 0, later, 0.0), 0)
