"""Delta rules, the recurrence of the backward pass: the gradient D of the state, from a piece's end to its start.

With the letters of `delta_forward` and D at the chunk's end, dO scaled:

    dE = beta ((Q^T dO) + e (K D)),   dV = dW = ((I + P diag(beta))^-1)^T dE,   D' = r_C D + Q^T (r dO) - K^T (r dW).
"""

import triton
import triton.language as tl

from momkit.kernels.gates import load_decay, pair_decay, pair_mask
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["T", "N", "count", "first_head", "scale"])
def scan_pieces_back(
    q, k, beta, inverse, sums, d_output, d_final, ends, dv, d_initial, d_states,
    cu_seqlens, table, chunk_first, T, N, count, first_head, scale,
    H: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FINAL: tl.constexpr, SPLIT: tl.constexpr, START: tl.constexpr,
    LINK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of one head, BLOCK columns of the gradient of its state. inverse: see `chunk_inverse`.

    A segment's last piece starts from d_final `[N, H, K, V]`, without FINAL from zeros; SPLIT: others from ends
    `[pieces, HEADS, K, V]`. Writes dv `[T, H, V]`, d_states `[chunks, HEADS, K, V]`, those at each chunk's end, and,
    START, d_initial `[N, H, K, V]`.
    LINK: pieces but a segment's first, from zeros where another follows, write where they arrive to `ends`, only that.
    """
    TILES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    place = program // (TILES * HEADS)
    head = program // TILES % HEADS
    segment, begin, end, index = piece_of(table, count, place)
    if segment < 0:
        return
    token = tl.arange(0, C)
    row = tl.arange(0, ROWS)
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    full_head = first_head + head
    length = end - begin
    chunks = (length + C - 1) // C
    # the last chunk comes first
    at = begin.to(tl.int64) + (chunks - 1) * C
    values = at * (H * V) + full_head * V
    if not LINK:
        dv += values
    if segment == N:
        if not LINK:
            for turn in range(0, chunks):
                seen = token < length - (chunks - 1 - turn) * C
                store_tile(dv, tl.zeros([C, BLOCK], tl.float32), token, seen, column, H * V, V, V % BLOCK == 0)
                dv -= C * H * V
        return
    if LINK:
        if index == 0:
            return

    state_inside = (row < K)[:, None] & (column < V)[None, :]
    state_tile = row[:, None] * V + column[None, :]
    whole_state = (segment.to(tl.int64) * H + full_head) * (K * V)
    piece_state = (place.to(tl.int64) * HEADS + head) * (K * V)
    segment_begin = tl.load(cu_seqlens + segment).to(tl.int32)
    follows = end < tl.load(cu_seqlens + segment + 1).to(tl.int32)
    D = tl.zeros([ROWS, BLOCK], tl.float32)
    if FINAL:
        D += tl.load(d_final + whole_state + state_tile, mask=state_inside & (follows == 0), other=0.0)
    if SPLIT:
        D += tl.load(ends + piece_state + state_tile, mask=state_inside & follows, other=0.0)

    keys = at * (G * K) + full_head // (H // G) * K
    q += keys
    k += keys
    d_output += values
    beta += full_head.to(tl.int64) * T + at
    inverse += (at * H + full_head) * C
    if PARTS:
        sums += full_head.to(tl.int64) * T + at
        plane = tl.cast(T, tl.int64) * H
    if not LINK:
        chunk = tl.load(chunk_first + segment) + (begin - segment_begin) // C + chunks - 1
        d_states += (chunk.to(tl.int64) * HEADS + head) * (K * V)

    for turn in range(0, chunks):
        live = tl.minimum(C, length - (chunks - 1 - turn) * C)
        seen = token < live
        xq = load_tile(q, token, seen, row, G * K, K, K == ROWS)
        xk = load_tile(k, token, seen, row, G * K, K, K == ROWS)
        do = load_tile(d_output, token, seen, column, H * V, V, V % BLOCK == 0)
        strength = tl.load(beta + token, mask=seen, other=0.0)
        if PARTS:
            high, low, to_end, whole = load_decay(sums, plane, token, seen, live - 1, PARTS == 2)
            from_start, to_end, whole = tl.exp2(high), tl.exp2(to_end), tl.exp2(whole)
            sums -= C
        # what needs q comes before the system is solved: fewer tiles are held at a time
        narrow = D.to(xk.dtype)
        if not LINK:
            tl.store(d_states + state_tile, narrow, mask=state_inside)
            d_states -= HEADS * K * V
        written = tl.dot(xk, narrow, input_precision=PRECISION)
        read = do.to(tl.float32) * scale
        if PARTS:
            written *= to_end[:, None]
            read *= from_start[:, None]
            D *= whole
        D += tl.dot(tl.trans(xq), read.to(do.dtype), input_precision=PRECISION)
        # rows j, columns i: what one transposes must not be a product itself
        pairs = tl.dot(xk, tl.trans(xq), input_precision=PRECISION)
        pairs *= pair_decay(high, low, True, False, PARTS == 2) if PARTS else pair_mask(C, True, False)
        written += tl.dot((pairs * scale).to(do.dtype), do, input_precision=PRECISION)
        solve = load_tile(inverse, token, seen, token, H * C, C, True)
        wrong = (written * strength[:, None]).to(do.dtype)
        wanted = tl.dot(tl.trans(solve), wrong, input_precision=PRECISION)
        if not LINK:
            store_tile(dv, wanted, token, seen, column, H * V, V, V % BLOCK == 0)
            dv -= C * H * V
        if PARTS:
            wanted *= from_start[:, None]
        D += tl.dot(tl.trans(xk), (-wanted).to(do.dtype), input_precision=PRECISION)
        q -= C * G * K
        k -= C * G * K
        d_output -= C * H * V
        beta -= C
        inverse -= C * H * C
    if LINK:
        tl.store(ends + piece_state + state_tile, D, mask=state_inside)
    elif START:
        if index == 0:
            tl.store(d_initial + whole_state + state_tile, D, mask=state_inside)
