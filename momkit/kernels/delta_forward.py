"""Delta rules, the recurrence over the chunks of a piece: its outputs, or what the backward pass needs, or what it does
to any state that it starts from.

With S at the chunk's start, r the decay from there to a token, e from a token to the chunk's end, P as in
`delta_inverse` and Q the same for queries, diagonal included:

    W = V - r (K S),  E = (I + P diag(beta))^-1 W,  O = scale (r (Q S) + Q diag(beta) E),  S' = r_C S + K^T (e beta E).
"""

import triton
import triton.language as tl

from momkit.kernels.gates import load_decay, pair_decay, pair_mask
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["T", "N", "count", "first_head", "scale"])
def scan_pieces(
    q, k, v, beta, inverse, sums, initial_state, starts, moves, output, final_state, states, errors,
    cu_seqlens, table, chunk_first, T, N, count, first_head, scale,
    H: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr, READ: tl.constexpr,
    KEEP: tl.constexpr, LINK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BLOCK columns of its state. inverse: see `chunk_inverse`.

    A segment's first piece starts from initial_state `[N, H, K, V]`, without START from zeros; SPLIT: later ones from
    starts `[pieces, HEADS, K, V]`.
    READ: writes output `[T, H, V]` and final_state `[N, H, K, V]`.
    KEEP: writes states `[chunks, HEADS, K, V]`, those at each chunk's start, and errors `[T, HEADS, V]`.
    LINK: pieces but a segment's last, from zeros unless it is its first, write where they arrive to `starts`; more
    programs, for pieces neither first nor last, start from I and write nothing else: moves `[pieces, HEADS, K, K]`,
    where any state arrives, what is written in the piece aside.
    """
    TILES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    ALL: tl.constexpr = TILES + (K + BLOCK - 1) // BLOCK if LINK else TILES
    program = tl.program_id(0)
    place = program // (ALL * HEADS)
    head = program // ALL % HEADS
    tile = program % ALL
    segment, begin, end, index = piece_of(table, count, place)
    if segment < 0:
        return
    token = tl.arange(0, C)
    row = tl.arange(0, ROWS)
    column = tile % TILES * BLOCK + tl.arange(0, BLOCK)
    dtype = k.dtype.element_ty
    at = begin.to(tl.int64)
    full_head = first_head + head
    values = at * (H * V) + full_head * V
    if segment == N:
        if READ:
            output += values
            for first in range(0, end - begin, C):
                seen = token < end - begin - first
                store_tile(output, tl.zeros([C, BLOCK], tl.float32), token, seen, column, H * V, V, V % BLOCK == 0)
                output += C * H * V
        return

    state_inside = (row < K)[:, None] & (column < V)[None, :]
    state_tile = row[:, None] * V + column[None, :]
    whole_state = (segment.to(tl.int64) * H + full_head) * (K * V)
    piece_state = (place.to(tl.int64) * HEADS + head) * (K * V)
    segment_begin = tl.load(cu_seqlens + segment).to(tl.int32)
    last = end >= tl.load(cu_seqlens + segment + 1).to(tl.int32)
    S = tl.zeros([ROWS, BLOCK], tl.float32)
    if START:
        S += tl.load(initial_state + whole_state + state_tile, mask=state_inside & (index == 0), other=0.0)
    if SPLIT:
        S += tl.load(starts + piece_state + state_tile, mask=state_inside & (index > 0), other=0.0)
    if LINK:
        moving = tile >= TILES
        if last | (moving & (index == 0)):
            return
        moved = (tile - TILES) * BLOCK + tl.arange(0, BLOCK)
        S += tl.where(moving & (row[:, None] == moved[None, :]), 1.0, 0.0)

    keys = at * (G * K) + full_head // (H // G) * K
    k += keys
    v += values
    beta += full_head.to(tl.int64) * T + begin
    inverse += (at * H + full_head) * C
    if PARTS:
        sums += full_head.to(tl.int64) * T + begin
        plane = tl.cast(T, tl.int64) * H
    if READ:
        q += keys
        output += values
    if KEEP:
        chunk = tl.load(chunk_first + segment) + (begin - segment_begin) // C
        states += (chunk.to(tl.int64) * HEADS + head) * (K * V)
        errors += (at * HEADS + head) * V

    length = end - begin
    for first in range(0, length, C):
        seen = token < length - first
        xk = load_tile(k, token, seen, row, G * K, K, K == ROWS)
        xv = load_tile(v, token, seen, column, H * V, V, V % BLOCK == 0)
        solve = load_tile(inverse, token, seen, token, H * C, C, True)
        strength = tl.load(beta + token, mask=seen, other=0.0)
        if PARTS:
            final = tl.minimum(C, length - first) - 1
            high, low, to_end, whole = load_decay(sums, plane, token, seen, final, PARTS == 2)
            from_start, to_end, whole = tl.exp2(high), tl.exp2(to_end), tl.exp2(whole)
            sums += C
        if LINK:
            xv = tl.where(moving, 0.0, xv).to(dtype)
        narrow = S.to(dtype)
        if READ:
            xq = load_tile(q, token, seen, row, G * K, K, K == ROWS)
            pairs = tl.dot(xq, tl.trans(xk), input_precision=PRECISION)
            pairs *= pair_decay(high, low, False, False, PARTS == 2) if PARTS else pair_mask(C, False, False)
            pairs = pairs.to(dtype)
            o = tl.dot(xq, narrow, input_precision=PRECISION)
            if PARTS:
                o *= from_start[:, None]
        wanted = tl.dot(xk, narrow, input_precision=PRECISION)
        if PARTS:
            wanted *= from_start[:, None]
        right = xv - wanted
        coarse = right.to(dtype)
        wrong = tl.dot(solve, coarse, input_precision=PRECISION)
        if dtype != tl.float32:
            # what 16 bits leave out; where strengths reach 2, the system adds up as many roundings as there are tokens
            wrong += tl.dot(solve, (right - coarse).to(dtype), input_precision=PRECISION)
        written = wrong * strength[:, None]
        if KEEP:
            tl.store(states + state_tile, narrow, mask=state_inside)
            store_tile(errors, wrong, token, seen, column, HEADS * V, V, V % BLOCK == 0)
            states += HEADS * K * V
            errors += C * HEADS * V
        if READ:
            o = tl.dot(pairs, written.to(dtype), o, input_precision=PRECISION)
            store_tile(output, o * scale, token, seen, column, H * V, V, V % BLOCK == 0)
            q += C * G * K
            output += C * H * V
        if PARTS:
            written *= to_end[:, None]
            S *= whole
        S += tl.dot(tl.trans(xk), written.to(dtype), input_precision=PRECISION)
        k += C * G * K
        v += C * H * V
        beta += C
        inverse += C * H * C
    if LINK:
        if moving:
            target = moves + (place.to(tl.int64) * HEADS + head) * (K * K) + row[:, None] * K + moved[None, :]
            tl.store(target, S, mask=(row < K)[:, None] & (moved < K)[None, :])
        else:
            tl.store(starts + piece_state + state_tile, S, mask=state_inside)
    if READ and last:
        tl.store(final_state + whole_state + state_tile, S, mask=state_inside)
