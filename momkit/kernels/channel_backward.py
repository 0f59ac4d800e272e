"""Channel decays, the derivatives by the vectors and gates that decay; every chunk finds its own.

With the letters of `channel_kernels`: dX = P S^T and dY = R D^T, each under its decay, and from pairs of tokens, in
blocks of 2b as `channel_gates` joins them, b = 1, 2, 4, ...: the derivative by what a token is in its half, a reader in
the second, a writer in the first.
A gate's gradient is the sum of value times gradient over all that crosses it: never a difference, so a gate that lets
nothing pass gets nothing.
"""

import triton
import triton.language as tl

from momkit.kernels.channel_gates import (
    gate_tile,
    half_crossings,
    half_decay,
    half_pairs,
    halfway,
    in_second_half,
    is_mild,
    last_row,
)
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import fetch_tile, load_tile, store_tile


@triton.jit(do_not_specialize=["N", "count", "first_head", "scale"])
def chunk_gradients(
    x, y, gates, u, p, r, decays, states, d_states, dx, dy, d_gates, du, table, N, count, first_head, scale,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, RX: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MILD: tl.constexpr,
    BY_X: tl.constexpr, BY_Y: tl.constexpr, BONUS: tl.constexpr, BEFORE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, tiles of ROWS x BLOCK of its states. Chunks that forget too much for MILD are left to a
    second launch, without it; decays: see `chunk_pairs`, R heads to each.

    x, y, gates `[T, H / RX, K]`, p, r `[T, H / RP, V]`, states, d_states `[chunks, HEADS, K, V]` at each chunk's start
    and end. BY_X: writes dx `[T, H, K]`. BY_Y: writes dy and d_gates, like it, and, BONUS, du `[chunks, H, K]` float32.
    """
    HX: tl.constexpr = H // RX
    HP: tl.constexpr = H // RP
    program = tl.program_id(0)
    place, head = program // HEADS, program % HEADS
    segment, begin, end, _ = piece_of(table, count, place)
    at = begin.to(tl.int64)
    full_head = first_head + head
    token = tl.arange(0, C)
    seen = token < end - begin
    target = (at * H + full_head) * K
    if BONUS and BY_Y:
        du += (place.to(tl.int64) * H + full_head) * K
    if (segment < 0) | (segment == N) | (begin == end):
        if not MILD:
            return
        nothing = tl.zeros([C, ROWS], tl.float32)
        seen = seen & (segment == N)
        for first in range(0, K, ROWS):
            row = first + tl.arange(0, ROWS)
            if BY_X:
                store_tile(dx + target, nothing, token, seen, row, H * K, K, K % ROWS == 0)
            if BY_Y:
                store_tile(dy + target, nothing, token, seen, row, H * K, K, K % ROWS == 0)
                store_tile(d_gates + target, nothing, token, seen, row, H * K, K, K % ROWS == 0)
            if BONUS and BY_Y:
                tl.store(du + row, tl.zeros([ROWS], tl.float32), mask=row < K)
        return

    dtype = y.dtype.element_ty
    every = tl.arange(0, ALL)
    decays += (place.to(tl.int64) * (HEADS // R) + head // R) * K
    if is_mild(tl.load(decays + every, mask=every < K, other=1.0), dtype) != MILD:
        return
    source = (at * HX + full_head // RX) * K
    p += (at * HP + full_head // RP) * V
    r += (at * HP + full_head // RP) * V
    states += (place.to(tl.int64) * HEADS + head) * (K * V)
    if BY_Y:
        d_states += (place.to(tl.int64) * HEADS + head) * (K * V)
    if MILD:
        # what is loaded tile by tile
        fetch_tile(gates + source, token, end - begin - 1, 0, ALL, HX * K, K)
        fetch_tile(y + source, token, end - begin - 1, 0, ALL, HX * K, K)
        if BY_Y:
            fetch_tile(x + source, token, end - begin - 1, 0, ALL, HX * K, K)
        for start in tl.static_range(0, V, BLOCK):
            fetch_tile(states, every, K - 1, start, BLOCK, V, V)
            if BY_Y:
                fetch_tile(d_states, every, K - 1, start, BLOCK, V, V)
    # rows i, columns j: derivatives by pairs, above the diagonal those of pair j, i, by a product of their own
    lower = tl.zeros([C, C], tl.float32)
    upper = tl.zeros([C, C], tl.float32)
    of_itself = tl.zeros([C], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        ps = load_tile(p, token, seen, column, HP * V, V, V % BLOCK == 0)
        rs = load_tile(r, token, seen, column, HP * V, V, V % BLOCK == 0)
        lower += tl.dot(ps, tl.trans(rs), input_precision=PRECISION)
        if BY_Y:
            upper += tl.dot(rs, tl.trans(ps), input_precision=PRECISION)
        of_itself += tl.sum(ps.to(tl.float32) * rs.to(tl.float32), 1)
    above = token[:, None] < token[None, :]
    below = token[:, None] > token[None, :]
    between = (tl.where(above, upper, tl.where(below, lower, 0.0)) * scale).to(dtype)
    of_itself *= scale

    # where little is left of registers, masks are made anew for each tile
    for first in tl.range(0, K, ROWS, disable_licm=not MILD):
        row = first + tl.arange(0, ROWS)
        sums, reached = gate_tile(gates + source, token, seen, row, HX * K, K, K % ROWS == 0, BEFORE, WIDE)
        total = last_row(sums)
        gained = tl.zeros([C, ROWS], tl.float32)
        stored = tl.zeros([C, ROWS], tl.float32)
        kept = tl.zeros([ROWS], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = (row < K)[:, None] & (column < V)[None, :]
            ps = load_tile(p, token, seen, column, HP * V, V, V % BLOCK == 0)
            S = tl.load(states + row[:, None] * V + column[None, :], mask=inside, other=0.0)
            gained += tl.dot(ps, tl.trans(S), input_precision=PRECISION)
            if BY_Y:
                rs = load_tile(r, token, seen, column, HP * V, V, V % BLOCK == 0)
                D = tl.load(d_states + row[:, None] * V + column[None, :], mask=inside, other=0.0)
                stored += tl.dot(rs, tl.trans(D), input_precision=PRECISION)
                kept += tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)
        ys = load_tile(y + source, token, seen, row, HX * K, K, K % ROWS == 0).to(tl.float32)
        xs = tl.zeros_like(ys)
        if BY_Y:
            xs = load_tile(x + source, token, seen, row, HX * K, K, K % ROWS == 0).to(tl.float32)
            # what crosses all gates of the chunk, then what crosses each
            crossed = tl.zeros([C, ROWS], tl.float32) + (tl.exp2(total.to(tl.float32)) * kept)[None, :]
        if MILD:
            x_decay, y_decay = halfway(sums, reached, total)
            xh, yh = (xs * x_decay).to(dtype), (ys * y_decay).to(dtype)
            half_total = tl.exp2(total.to(tl.float32) * 0.5)[None, :]
            gained *= half_total * scale
            gained += tl.dot(tl.where(below, between, 0.0).to(dtype), yh, input_precision=PRECISION)
            if BY_Y:
                stored *= half_total
                crossed += tl.sum(stored * yh.to(tl.float32), 0)[None, :]
                stored += tl.dot(tl.where(above, between, 0.0).to(dtype), xh, input_precision=PRECISION)
                # pairs are rounded alike on both sides: what starts and ends on one side of a gate cancels
                arriving = gained * xh.to(tl.float32)
                crossed += tl.cumsum(arriving - stored * yh.to(tl.float32), 0, reverse=True)
                if BEFORE:
                    crossed -= arriving
                stored *= y_decay
            gained *= x_decay
        else:
            gained *= tl.exp2(reached.to(tl.float32)) * scale
            if BY_Y:
                stored *= tl.exp2((total[None, :] - sums).to(tl.float32))
                # what is read passes the gates up to its token, what is written those after it
                until = tl.where(token[:, None] + BEFORE <= token[None, :], 1.0, 0.0)
                crossed = tl.dot(until, gained * xs, crossed, input_precision=PRECISION)
                crossed = tl.dot(tl.where(below, 1.0, 0.0), stored * ys, crossed, input_precision=PRECISION)
            half = 1
            while half < C:
                second = in_second_half(C, half)
                decay = half_decay(sums, reached, half)
                z = tl.where(second, xs, ys)
                weights = tl.where(half_pairs(C, half), between, 0.0).to(dtype)
                dz = tl.dot(weights, (z * decay).to(dtype), input_precision=PRECISION) * decay
                gained += tl.where(second, dz, 0.0)
                if BY_Y:
                    stored += tl.where(second, 0.0, dz)
                    crossed = tl.dot(half_crossings(C, half, BEFORE), z * dz, crossed, input_precision=PRECISION)
                half *= 2
        if BONUS:
            bonus = tl.load(u + full_head * K + row, mask=row < K, other=0.0).to(tl.float32)
            own = of_itself[:, None] * bonus[None, :]
            if BY_Y:
                tl.store(du + row, tl.sum(of_itself[:, None] * xs * ys, 0), mask=row < K)
        else:
            own = tl.zeros([C, ROWS], tl.float32)
            if not BEFORE:
                own += of_itself[:, None]
        if BY_X:
            store_tile(dx + target, gained + own * ys, token, seen, row, H * K, K, K % ROWS == 0)
        if BY_Y:
            store_tile(dy + target, stored + own * xs, token, seen, row, H * K, K, K % ROWS == 0)
            store_tile(d_gates + target, crossed, token, seen, row, H * K, K, K % ROWS == 0)
