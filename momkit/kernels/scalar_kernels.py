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

# tokens that the gradient of gates takes at once, a multiple of every window
TOKENS = tl.constexpr(1024)
# log2 of a decay below all rounding
NEXT_TO_NOTHING = tl.constexpr(-30.0)


@triton.jit(do_not_specialize=["count", "segments", "T", "scale"])
def scan_kernel(
    x, y, z, w, sums, start, starts, out, last, decays, terms, held, crossings, table, cu_seqlens,
    count, segments, T, scale,
    H: tl.constexpr, RX: tl.constexpr, RY: tl.constexpr, RZ: tl.constexpr, RW: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, LOW: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, ONLY_STATE: tl.constexpr,
    START: tl.constexpr, STORE_LAST: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, y `[T, H/RX, K]`, z, out `[T, H, V]`, one program a (piece, head, BV columns of the state).

    start: `[N, H, K, V]`, the state before a segment's first piece (reversed: after its last); without START, zeros.
    starts: the same for other pieces, by their place. last: `[N, H, K, V]`, where a segment's scan ends. ONLY_STATE: no
    output; from zeros, the state that each piece adds goes to `starts`, its decay to `decays` `[P, H]`.
    sums: with GATED, `[1 + LOW, H, T]`, see `gate_sums`.
    WINDOW, if not 0, for gradients of gates: terms `[V / BV, H, T]`, over this program's columns, w `[T, H/RW, V]`, of
    which out is the gradient, times out, but for what a token reads of itself. Every WINDOW chunks S goes to held
    `[slots, H, K, V]`, or reversed, <held, S> to crossings `[V / BV, slots, H]`, see `slot_of`.
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
    flat = ks[:, None] * V + cols[None, :]
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
        if WINDOW > 0 and not REVERSE:
            if step % WINDOW == 0:
                target = held + (slot_of(at, segment, WINDOW * C).to(tl.int64) * H + h) * (K * V) + flat
                tl.store(target, S.to(held.dtype.element_ty), mask=inside)
        # loads of the next chunk are issued when this one is done with
        ahead = tl.maximum(at - C, begin) if REVERSE else tl.minimum(at + C, end - 1)
        far, final_row = ahead.to(tl.int64), end - 1 - ahead
        fetch_tile(y + far * (H // RY * K) + h // RY * K, rows, final_row, 0, BK, H // RY * K, K)
        fetch_tile(z + far * (H // RZ * V) + h // RZ * V, rows, final_row, tile * BV, BV, H // RZ * V, V)
        if not ONLY_STATE:
            fetch_tile(x + far * (H // RX * K) + h // RX * K, rows, final_row, 0, BK, H // RX * K, K)
        if WINDOW > 0:
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
            between *= scale
            if WINDOW > 0:
                # what a token reads of itself passes no gate
                same = rows[:, None] == rows[None, :]
                of_itself = tl.sum(tl.where(same, between, 0.0), 1)
                between = tl.where(same, 0.0, between)
            between = between.to(b_z.dtype)
            b_out = tl.dot(b_x, S.to(b_x.dtype), input_precision=PRECISION)
            if not REVERSE:
                b_out *= scale
            if GATED:
                b_out *= tl.exp2(rest if REVERSE else high)[:, None]
            b_out = tl.dot(between, b_z, b_out, input_precision=PRECISION)
            if WINDOW > 0:
                b_w = load_tile(w + base * (H // RW * V) + h // RW * V, rows, live, cols, H // RW * V, V, V % BV == 0)
                term = tl.sum(b_out * b_w.to(tl.float32), 1)
                tl.store(terms + (tile.to(tl.int64) * H + h) * T + at + rows, term, mask=live)
                b_out += of_itself[:, None] * b_z.to(tl.float32)
            mask = live[:, None] if V % BV == 0 else live[:, None] & (cols < V)[None, :]
            spot_v = base * (H * V) + h * V + rows[:, None] * (H * V) + cols[None, :]
            tl.store(out + spot_v, b_out.to(out.dtype.element_ty), mask=mask)
        if REVERSE or GATED:
            wide = b_z.to(tl.float32)
            if REVERSE:
                wide *= scale
            if GATED:
                wide *= tl.exp2(high if REVERSE else rest)[:, None]
                S *= tl.exp2(total)
            b_z = wide.to(b_y.dtype)
        S = tl.dot(tl.trans(b_y), b_z, S, input_precision=PRECISION)
        if WINDOW > 0 and REVERSE:
            if step % WINDOW == 0:
                slot = slot_of(at, segment, WINDOW * C)
                other = tl.load(held + (slot.to(tl.int64) * H + h) * (K * V) + flat, mask=inside, other=0.0)
                slots = T // (WINDOW * C) + segments + 1
                target = crossings + (tile.to(tl.int64) * slots + slot) * H + h
                tl.store(target, tl.sum(tl.sum(S * other.to(tl.float32), 1), 0))
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
def slot_of(at, segment, LENGTH):
    """Where a window of LENGTH tokens that starts at token `at` keeps its state: windows of a segment start LENGTH
    apart, so that no two share a slot."""
    return at // LENGTH + segment


@triton.jit
def add_unless_cut(so_far, so_far_cut, now, now_cut):
    """Sums of what is not cut off from what came before it."""
    return tl.where(now_cut > 0, now, so_far + now), so_far_cut | now_cut


@triton.jit(do_not_specialize=["count", "segments", "T"])
def gate_gradient_kernel(
    reads, writes, crossings, sums, dg, table, cu_seqlens, count, segments, T,
    PARTS: tl.constexpr, H: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """dg_t = <what the gate of token t lets pass of S, dS> = dg_t+1 + q_t . dq_t - k_t . dk_t.

    reads, writes `[PARTS, H, T]`: q . dq and k . dk, in parts, but for what tokens read of themselves; both passes
    round pairs of tokens alike. crossings `[PARTS, slots, H]`: <S, dS> where windows of LENGTH tokens start, in parts;
    where a segment ends it is zero, or, FINAL, not known. The sums run from both ends of a window, and the nearer one
    counts for more: what 16 bits round off the states adds up over no more than a window. A gate that lets next to
    nothing pass has no gradient, and no rounding passes it.
    """
    pid = tl.program_id(0)
    h, place = pid % H, pid // H
    segment, begin, end, _ = piece_of(table, count, place)
    if segment < 0:
        return
    window = tl.arange(0, TOKENS // LENGTH)
    token = tl.arange(0, LENGTH)[None, :]
    spots = window[:, None] * LENGTH + token
    plane = tl.cast(T, tl.int64)
    slots = tl.cast(T // LENGTH + segments + 1, tl.int64)
    for i in range(tl.cdiv(end - begin, TOKENS)):
        at = begin + i * TOKENS
        live = spots < end - at
        target = dg + (at.to(tl.int64) + spots) * H + h
        if segment == segments:
            tl.store(target, 0.0, mask=live)
        else:
            gained = tl.zeros([TOKENS // LENGTH, LENGTH], tl.float32)
            first = at + window * LENGTH
            last = tl.load(cu_seqlens + segment + 1).to(tl.int32)
            entering = tl.zeros([TOKENS // LENGTH], tl.float32)
            leaving = tl.zeros([TOKENS // LENGTH], tl.float32)
            for n in tl.static_range(PARTS):
                gained += tl.load(reads + (n * H + h) * plane + at + spots, mask=live, other=0.0)
                gained -= tl.load(writes + (n * H + h) * plane + at + spots, mask=live, other=0.0)
                source = crossings + (n * slots + slot_of(first, segment, LENGTH)) * H + h
                entering += tl.load(source, mask=first < end, other=0.0)
                leaving += tl.load(source + H, mask=(first < end) & (first + LENGTH < last), other=0.0)
            gate = tl.load(sums + h * plane + at + spots, mask=live, other=0.0)
            gate -= tl.load(sums + h * plane + at + spots - 1, mask=live & (spots % C > 0), other=0.0)
            cut = (gate < NEXT_TO_NOTHING).to(tl.int32)
            after, cuts = tl.associative_scan((-gained, cut), 1, add_unless_cut)
            forward = after + gained + tl.where(cuts > 0, 0.0, entering[:, None])
            before, cuts = tl.associative_scan((tl.where(cut > 0, 0.0, gained), cut), 1, add_unless_cut, reverse=True)
            backward = before + tl.where(cuts > 0, 0.0, leaving[:, None])
            share = token / tl.minimum(LENGTH, tl.maximum(last - first, 1))[:, None]
            if FINAL:
                share = tl.where((first + LENGTH < last)[:, None], share, 0.0)
            tl.store(target, tl.where(cut > 0, 0.0, forward + share * (backward - forward)), mask=live)
