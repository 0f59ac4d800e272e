"""Delta rules, the gradients that every chunk can find alone: of q, k, beta and the gates.

With the letters of `delta_forward` and `delta_backward`, S at the chunk's start and D at its end:

    dQ gets dO S^T,  dK gets -dW S^T and beta E D^T, each under its decay, and both what pairs of tokens give them:
    d(q_i . k_j) = decay beta_j (dO_i . E_j),      d(k_i . k_j) = -decay beta_j (dW_i . E_j),  i > j.

A gate's gradient is the sum of value times gradient over all that crosses it, from an earlier token or the chunk's
start to a later token or the chunk's end. Of what passes between tokens of the chunk, it is what tokens from the gate
on receive, less what they give.
"""

import triton
import triton.language as tl

from momkit.kernels.gates import load_decay, pair_decay, pair_mask
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import fetch_tile, load_tile, store_tile


@triton.jit
def load_values(errors, d_output, dv, token, seen, column, HEADS: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
                EXACT: tl.constexpr):  # fmt: skip
    """Columns of a chunk's errors, d_output and dv."""
    return (
        load_tile(errors, token, seen, column, HEADS * V, V, EXACT),
        load_tile(d_output, token, seen, column, H * V, V, EXACT),
        load_tile(dv, token, seen, column, H * V, V, EXACT),
    )


@triton.jit
def load_states(base, row, column, K, V: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a chunk's state, of whose rows K are left. WHOLE: no tile reaches beyond, and masks cost registers."""
    tile = base + row[:, None] * V + column[None, :]
    if WHOLE:
        return tl.load(tile)
    else:
        return tl.load(tile, mask=(row < K)[:, None] & (column < V)[None, :], other=0.0)


@triton.jit
def fetch_states(states, d_states, row, left, V: tl.constexpr, BLOCK: tl.constexpr):
    """Have the L2 cache fetch rows of a chunk's states, of which `left` are left."""
    for start in tl.static_range(0, V, BLOCK):
        fetch_tile(states, row, left - 1, start, BLOCK, V, V)
        fetch_tile(d_states, row, left - 1, start, BLOCK, V, V)


@triton.jit(do_not_specialize=["T", "N", "count", "first_head", "scale"])
def chunk_gradients(
    q, k, beta, sums, states, d_states, d_output, dv, errors, dq, dk, dg, dbeta,
    table, T, N, count, first_head, scale,
    H: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FETCH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, tiles of ROWS x BLOCK of its states -> dq, dk `[T, H, K]`, dg, dbeta `[T, H]` float32.

    Values no wider than BLOCK are loaded once. FETCH: has the L2 cache fetch what comes next, where loads are not
    issued ahead.
    """
    HELD: tl.constexpr = V <= BLOCK
    WHOLE: tl.constexpr = K % ROWS == 0 and V % BLOCK == 0
    program = tl.program_id(0)
    place = program // HEADS
    head = program % HEADS
    segment, begin, end, _ = piece_of(table, count, place)
    if (segment < 0) | (begin == end):
        return
    token = tl.arange(0, C)
    seen = token < end - begin
    at = begin.to(tl.int64)
    full_head = first_head + head
    dq += (at * H + full_head) * K
    dk += (at * H + full_head) * K
    scalars = at * H + full_head + token * H
    if segment == N:
        nothing = tl.zeros([C, ROWS], tl.float32)
        for first in range(0, K, ROWS):
            row = first + tl.arange(0, ROWS)
            store_tile(dq, nothing, token, seen, row, H * K, K, K % ROWS == 0)
            store_tile(dk, nothing, token, seen, row, H * K, K, K % ROWS == 0)
        tl.store(dbeta + scalars, tl.zeros([C], tl.float32), mask=seen)
        if PARTS:
            tl.store(dg + scalars, tl.zeros([C], tl.float32), mask=seen)
        return

    q += (at * G + full_head // (H // G)) * K
    k += (at * G + full_head // (H // G)) * K
    d_output += (at * H + full_head) * V
    dv += (at * H + full_head) * V
    errors += (at * HEADS + head) * V
    states += (place.to(tl.int64) * HEADS + head) * (K * V)
    d_states += (place.to(tl.int64) * HEADS + head) * (K * V)
    dtype = k.dtype.element_ty
    strength = tl.load(beta + full_head.to(tl.int64) * T + begin + token, mask=seen, other=0.0)

    if FETCH:
        for ahead in tl.static_range(0, K, BLOCK):
            fetch_tile(k, token, end - begin - 1, ahead, BLOCK, G * K, K)
            fetch_tile(q, token, end - begin - 1, ahead, BLOCK, G * K, K)
    earlier = token[:, None] > token[None, :]
    if PARTS:
        sums += full_head.to(tl.int64) * T + begin
        plane = tl.cast(T, tl.int64) * H
        high, low, to_end, whole = load_decay(sums, plane, token, seen, end - begin - 1, PARTS == 2)
        from_start, to_end, whole = tl.exp2(high), tl.exp2(to_end), tl.exp2(whole)

    column = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    if HELD:
        e, do, dw = load_values(errors, d_output, dv, token, seen, column, HEADS, H, V, V == BLOCK)
    if FETCH:
        fetch_states(states, d_states, row, K, V, BLOCK)
    # rows i, columns j <= i; then, _t, rows j, columns i: what one transposes must not be a product itself
    by_read = tl.zeros([C, C], tl.float32)
    by_read_t = tl.zeros([C, C], tl.float32)
    by_key = tl.zeros([C, C], tl.float32)
    by_key_t = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BLOCK):
        if not HELD:
            e, do, dw = load_values(errors, d_output, dv, token, seen, start + column, HEADS, H, V, V % BLOCK == 0)
        by_read_t += tl.dot(e, tl.trans(do), input_precision=PRECISION)
        by_read += tl.dot(do, tl.trans(e), input_precision=PRECISION)
        by_key_t += tl.dot(e, tl.trans(dw), input_precision=PRECISION)
        by_key += tl.dot(dw, tl.trans(e), input_precision=PRECISION)
    decay = pair_decay(high, low, False, False, PARTS == 2) if PARTS else pair_mask(C, False, False)
    from_query = (by_read * (decay * (strength * scale)[None, :])).to(dtype)
    by_key *= tl.where(earlier, decay * -strength[None, :], 0.0)
    decay = pair_decay(high, low, True, False, PARTS == 2) if PARTS else pair_mask(C, True, False)
    by_read_t *= decay * scale
    to_query = (by_read_t * strength[:, None]).to(dtype)
    by_key_t *= tl.where(token[:, None] < token[None, :], decay, 0.0)
    to_key = (by_key - by_key_t * strength[:, None]).to(dtype)
    # what passes from token j to token i, but for the strength of j
    queries = tl.zeros([C, C], tl.float32)
    keys = tl.zeros([C, C], tl.float32)
    for first in range(0, K, BLOCK):
        xk = load_tile(k, token, seen, first + column, G * K, K, K % BLOCK == 0)
        keys += tl.dot(xk, tl.trans(xk), input_precision=PRECISION)
        xq = load_tile(q, token, seen, first + column, G * K, K, K % BLOCK == 0)
        queries += tl.dot(xk, tl.trans(xq), input_precision=PRECISION)
    passed = by_read_t * queries - by_key_t * keys
    d_strength = tl.sum(passed, 1)
    written = tl.zeros([C], tl.float32)
    if PARTS:
        # gate t: what tokens before it pass to it and to later ones
        later = token[:, None] < token[None, :]
        crossing = tl.cumsum(tl.where(later, passed * strength[:, None], 0.0), 1, reverse=True)
        d_gate = tl.sum(tl.where(later, crossing, 0.0), 0)
        read_off = tl.zeros([C], tl.float32)
        kept = tl.zeros([ROWS], tl.float32)
    for first in range(0, K, ROWS):
        xk = load_tile(k, token, seen, row, G * K, K - first, K % ROWS == 0)
        xq = load_tile(q, token, seen, row, G * K, K - first, K % ROWS == 0)
        if FETCH:
            fetch_states(states, d_states, row + ROWS, K - first, V, BLOCK)
        if HELD:
            S = load_states(states, row, column, K - first, V, WHOLE)
            D = load_states(d_states, row, column, K - first, V, WHOLE)
        gained = tl.zeros([C, ROWS], tl.float32)
        for start in range(0, V, BLOCK):
            if not HELD:
                S = load_states(states, row, start + column, K - first, V, WHOLE)
                do = load_tile(d_output, token, seen, start + column, H * V, V, V % BLOCK == 0)
            gained += tl.dot(do, tl.trans(S), input_precision=PRECISION)
        gained *= scale
        if PARTS:
            gained *= from_start[:, None]
            read_off += tl.sum(gained * xq.to(tl.float32), 1)
        gained += tl.dot(from_query, xk, input_precision=PRECISION)
        store_tile(dq, gained, token, seen, row, H * K, K - first, K % ROWS == 0)
        erased = tl.zeros([C, ROWS], tl.float32)
        stored = tl.zeros([C, ROWS], tl.float32)
        passing = tl.zeros([ROWS, ROWS], tl.float32)
        for start in range(0, V, BLOCK):
            if not HELD:
                S = load_states(states, row, start + column, K - first, V, WHOLE)
                D = load_states(d_states, row, start + column, K - first, V, WHOLE)
                dw = load_tile(dv, token, seen, start + column, H * V, V, V % BLOCK == 0)
                e = load_tile(errors, token, seen, start + column, HEADS * V, V, V % BLOCK == 0)
            erased += tl.dot(dw, tl.trans(S), input_precision=PRECISION)
            stored += tl.dot(e, tl.trans(D), input_precision=PRECISION)
            if PARTS:
                passing += tl.dot(S, tl.trans(D), input_precision=PRECISION)
        if PARTS:
            kept += tl.sum(tl.where(row[:, None] == row[None, :], passing, 0.0), 1)
            erased *= from_start[:, None]
            stored *= to_end[:, None]
            read_off -= tl.sum(erased * xk.to(tl.float32), 1)
        written += tl.sum(stored * xk.to(tl.float32), 1)
        stored = stored * strength[:, None] - erased
        stored += tl.dot(to_key, xk, input_precision=PRECISION)
        stored += tl.dot(to_query, xq, input_precision=PRECISION)
        store_tile(dk, stored, token, seen, row, H * K, K - first, K % ROWS == 0)
        q += ROWS
        k += ROWS
        dq += ROWS
        dk += ROWS
        states += ROWS * V
        d_states += ROWS * V
    tl.store(dbeta + scalars, d_strength + written, mask=seen)
    if PARTS:
        # tokens from t on read the state; what earlier ones wrote, and the state itself, reach the end
        reach = tl.where(earlier, (written * strength)[None, :], read_off[None, :])
        tl.store(dg + scalars, d_gate + tl.sum(reach, 1) + whole * tl.sum(kept, 0), mask=seen)
