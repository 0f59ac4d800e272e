"""Kernels of the channel family: what chunks find alone, and the walk of states from chunk to chunk.

All that the family computes are derivatives of one form in four vectors a token, over tokens i that see j:

    scale sum_ij (p_i . r_j) sum_c x_ic y_jc (decay of channel c from j to i)

A decay by key channel has x = q, y = k, r = v, and its output is the derivative by p; a decay by value channel has
p = q, r = k, y = v, and its output is the derivative by x. States are `[K, V]` here, K the channels that decay, those
of x and y, V those of p and r; decays by value channel keep theirs transposed.
With S the state at the chunk's start, D its gradient at the chunk's end, X and Y the decayed x (since the start, with
the scale) and y (until the end), A the pairs of tokens, t the decay of the whole chunk:

    dP = A R + X S,  S' = t S + Y^T R,      dR = A^T P + Y D,  D' = t D + X^T P
"""

import triton
import triton.language as tl

from momkit.kernels.channel_gates import gate_tile, half_decay, half_pairs, halfway, in_second_half, is_mild, last_row
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import fetch_tile, load_tile, store_tile


@triton.jit(do_not_specialize=["N", "count", "first_head", "scale"])
def chunk_pairs(
    x, y, gates, u, x_decayed, y_decayed, pairs, decays, table, N, count, first_head, scale,
    HEADS: tl.constexpr, R: tl.constexpr, RX: tl.constexpr, HX: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, MILD: tl.constexpr, PAIRS: tl.constexpr, BONUS: tl.constexpr,
    BEFORE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of R heads, of HEADS from first_head on, that share x, y, gates `[T, HX, K]`, RX heads to each.

    MILD: writes y_decayed `[T, HEADS / R, K]`, decays `[chunks, HEADS / R, K]` of whole chunks and, PAIRS, x_decayed
    like y_decayed and pairs `[T, HEADS / R, C]`, a row for each token that reads. BEFORE: it does not read itself, or,
    BONUS, by u `[H, K]`. Pairs of chunks that forget too much are left to a second launch, without MILD.
    """
    SHARED: tl.constexpr = HEADS // R
    program = tl.program_id(0)
    place, shared = program // SHARED, program % SHARED
    segment, begin, end, _ = piece_of(table, count, place)
    if (segment < 0) | (segment == N) | (begin == end):
        return
    dtype = y.dtype.element_ty
    decays += (place.to(tl.int64) * SHARED + shared) * K
    if not MILD:
        every = tl.arange(0, ROWS)
        if is_mild(tl.load(decays + every, mask=every < K, other=1.0), dtype):
            return
    token = tl.arange(0, C)
    seen = token < end - begin
    at = begin.to(tl.int64)
    head = first_head + shared * R
    base = (at * HX + head // RX) * K
    target = (at * SHARED + shared) * K
    if MILD:
        fetch_tile(gates + base, token, end - begin - 1, 0, ROWS, HX * K, K)
        fetch_tile(y + base, token, end - begin - 1, 0, ROWS, HX * K, K)
        if PAIRS:
            fetch_tile(x + base, token, end - begin - 1, 0, ROWS, HX * K, K)
    between = tl.zeros([C, C], tl.float32)
    of_itself = tl.zeros([C], tl.float32)
    for first in range(0, K, BLOCK):
        row = first + tl.arange(0, BLOCK)
        sums, reached = gate_tile(gates + base, token, seen, row, HX * K, K, K % BLOCK == 0, BEFORE, WIDE)
        ys = load_tile(y + base, token, seen, row, HX * K, K, K % BLOCK == 0).to(tl.float32)
        if PAIRS:
            xs = load_tile(x + base, token, seen, row, HX * K, K, K % BLOCK == 0).to(tl.float32)
            if BONUS:
                bonus = tl.load(u + head * K + row, mask=row < K, other=0.0).to(tl.float32)
                of_itself += tl.sum(xs * ys * bonus[None, :], 1)
            elif not BEFORE:
                of_itself += tl.sum(xs * ys, 1)
        if MILD:
            total = last_row(sums)
            kept = ys * tl.exp2((total[None, :] - sums).to(tl.float32))
            store_tile(y_decayed + target, kept, token, seen, row, SHARED * K, K, K % BLOCK == 0)
            whole = tl.exp2(total.to(tl.float32))
            tl.store(decays + row, whole, mask=row < K)
            if PAIRS:
                left = xs * (tl.exp2(reached.to(tl.float32)) * scale)
                store_tile(x_decayed + target, left, token, seen, row, SHARED * K, K, K % BLOCK == 0)
                if is_mild(whole, dtype):
                    x_decay, y_decay = halfway(sums, reached, total)
                    xh, yh = (xs * x_decay).to(dtype), (ys * y_decay).to(dtype)
                    between = tl.dot(xh, tl.trans(yh), between, input_precision=PRECISION)
        else:
            half = 1
            while half < C:
                z = (tl.where(in_second_half(C, half), xs, ys) * half_decay(sums, reached, half)).to(dtype)
                product = tl.dot(z, tl.trans(z), input_precision=PRECISION)
                between += tl.where(half_pairs(C, half), product, 0.0)
                half *= 2
    if PAIRS:
        same = token[:, None] == token[None, :]
        between = tl.where(same, of_itself[:, None], tl.where(token[:, None] > token[None, :], between, 0.0))
        store_tile(pairs + (at * SHARED + shared) * C, between * scale, token, seen, token, SHARED * C, C, True)


@triton.jit(do_not_specialize=["N", "count", "first_head"])
def walk_pieces(
    reads, writes, pairs, decays, values, start, starts, moves, out, last, states,
    cu_seqlens, table, chunk_first, N, count, first_head,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, RV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr,
    LAST: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr, LINK: tl.constexpr, REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BLOCK columns of its state: out = pairs values + reads S, S = decays S + writes^T values.

    reads, writes, pairs, decays: see `chunk_pairs`, R heads to each; values `[T, H / RV, V]`. REVERSE: from the last
    chunk to the first, pairs transposed, S the gradient of the state at a chunk's end.
    A segment's first piece (REVERSE: last) starts from start `[N, H, K, V]`, TRANSPOSED `[N, H, V, K]`, without START
    from zeros; SPLIT: others from starts `[pieces, HEADS, K, V]`.
    OUT: writes out `[T, H, V]`. LAST: writes last, like start. KEEP: writes states `[chunks, HEADS, K, V]`, as each
    chunk finds them. LINK: from zeros, what each piece that another follows adds goes to starts, and its decay to moves
    `[pieces, HEADS / R, K]`, only that.
    """
    TILES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    SHARED: tl.constexpr = HEADS // R
    HV: tl.constexpr = H // RV
    program = tl.program_id(0)
    place = program // (TILES * HEADS)
    head = program // TILES % HEADS
    segment, begin, end, index = piece_of(table, count, place)
    if segment < 0:
        return
    token = tl.arange(0, C)
    row = tl.arange(0, ROWS)
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    length = end - begin
    chunks = (length + C - 1) // C
    full_head = first_head + head
    if segment == N:
        if OUT:
            for chunk in range(chunks):
                at = begin.to(tl.int64) + chunk * C
                nothing = tl.zeros([C, BLOCK], tl.float32)
                target = out + (at * H + full_head) * V
                store_tile(target, nothing, token, token < end - at, column, H * V, V, V % BLOCK == 0)
        return

    segment_begin = tl.load(cu_seqlens + segment).to(tl.int32)
    begins = index == 0
    ends = end >= tl.load(cu_seqlens + segment + 1).to(tl.int32)
    enters, leaves = (ends, begins) if REVERSE else (begins, ends)
    if LINK:
        if leaves:
            return
    inside = (row < K)[:, None] & (column < V)[None, :]
    tile = row[:, None] * V + column[None, :]
    given = column[None, :] * K + row[:, None] if TRANSPOSED else tile
    whole = (segment.to(tl.int64) * H + full_head) * (K * V)
    part = (place.to(tl.int64) * HEADS + head) * (K * V)
    S = tl.zeros([ROWS, BLOCK], tl.float32)
    if START:
        S += tl.load(start + whole + given, mask=inside & enters, other=0.0)
    if SPLIT:
        S += tl.load(starts + part + tile, mask=inside & (enters == 0), other=0.0)
    first_chunk = tl.load(chunk_first + segment) + (begin - segment_begin) // C
    moved = tl.full([ROWS], 1.0, tl.float32)
    if OUT:
        # held in registers from one chunk to the next: ahead of time, yet without a second place in shared memory
        at = begin.to(tl.int64) + (chunks - 1 if REVERSE else 0) * C
        there = (length > 0) & (token < end - at)
        a = load_tile(pairs + (at * SHARED + head // R) * C, token, there, token, SHARED * C, C, True)
    for turn in range(chunks):
        chunk = chunks - 1 - turn if REVERSE else turn
        at = begin.to(tl.int64) + chunk * C
        seen = token < length - chunk * C
        shared = at * SHARED + head // R
        place_of_chunk = (first_chunk + chunk).to(tl.int64)
        decay = tl.load(decays + (place_of_chunk * SHARED + head // R) * K + row, mask=row < K, other=0.0)
        w = load_tile(writes + shared * K, token, seen, row, SHARED * K, K, K == ROWS)
        z = load_tile(values + (at * HV + full_head // RV) * V, token, seen, column, HV * V, V, V % BLOCK == 0)
        if KEEP or OUT:
            narrow = S.to(w.dtype)
        if KEEP:
            tl.store(states + (place_of_chunk * HEADS + head) * (K * V) + tile, narrow, mask=inside)
        if OUT:
            x = load_tile(reads + shared * K, token, seen, row, SHARED * K, K, K == ROWS)
            o = tl.dot(x, narrow, input_precision=PRECISION)
            o = tl.dot(tl.trans(a) if REVERSE else a, z, o, input_precision=PRECISION)
            store_tile(out + (at * H + full_head) * V, o, token, seen, column, H * V, V, V % BLOCK == 0)
            ahead = at - C if REVERSE else at + C
            there = (ahead >= begin) & (token < end - ahead)
            a = load_tile(pairs + (ahead * SHARED + head // R) * C, token, there, token, SHARED * C, C, True)
        S = tl.dot(tl.trans(w), z, S * decay[:, None], input_precision=PRECISION)
        if LINK:
            moved *= decay
    if LINK:
        tl.store(starts + part + tile, S, mask=inside)
        if (program % TILES == 0) & (head % R == 0):
            tl.store(moves + (place.to(tl.int64) * SHARED + head // R) * K + row, moved, mask=row < K)
    if LAST and leaves:
        tl.store(last + whole + given, S, mask=inside)


@triton.jit(do_not_specialize=["N", "count", "first_head", "length"])
def chain_pieces(
    start, starts, moves, cu_seqlens, table, N, count, first_head, length,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    START: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """From what each piece of a segment adds to the state, in place, the state that each piece starts from."""
    TILES: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    SHARED: tl.constexpr = HEADS // R
    program = tl.program_id(0)
    place = program // (TILES * HEADS)
    head = program // TILES % HEADS
    segment, begin, _, index = piece_of(table, count, place)
    if (segment < 0) | (segment == N) | (index > 0):
        return
    pieces = tl.cdiv(tl.load(cu_seqlens + segment + 1).to(tl.int32) - begin, length)
    if pieces < 2:
        return
    spot = program % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = spot < K * V
    row = spot // V
    S = tl.zeros([BLOCK], tl.float32)
    if START:
        given = spot % V * K + row if TRANSPOSED else spot
        S += tl.load(start + (segment.to(tl.int64) * H + first_head + head) * (K * V) + given, mask=inside, other=0.0)
    at = place.to(tl.int64) + (pieces - 1 if REVERSE else 0)
    added = tl.load(starts + (at * HEADS + head) * (K * V) + spot, mask=inside, other=0.0)
    for _ in range(1, pieces):
        S = S * tl.load(moves + (at * SHARED + head // R) * K + row, mask=inside, other=0.0) + added
        at += -1 if REVERSE else 1
        target = starts + (at * HEADS + head) * (K * V) + spot
        # what was here has been used up after the next turn; the last piece's place was never written
        added = tl.load(target, mask=inside, other=0.0)
        tl.store(target, S, mask=inside)
