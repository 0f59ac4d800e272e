"""Delta rules, long segments: from what each piece does to a state, the state that each piece starts from.

Piece p takes S to M_p S + A_p, M_p being moves `[K, K]` and A_p where it arrives from zeros. In the backward pass its
transpose takes the gradient at a piece's end to that at its start.
"""

import triton
import triton.language as tl

from momkit.kernels.layout import piece_of


@triton.jit(do_not_specialize=["N", "count", "length"])
def chain_pieces(
    moves, starts, cu_seqlens, table, N, count, length,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All pieces of one segment and head in turn, BLOCK columns of the state: starts `[pieces, HEADS, K, V]`, in place,
    from where each piece arrives to where it starts. The first one (REVERSE: the last) arrives where it truly does."""
    TILES: tl.constexpr = (V + BLOCK - 1) // BLOCK
    INNER: tl.constexpr = 16
    program = tl.program_id(0)
    place = program // (TILES * HEADS)
    head = program // TILES % HEADS
    segment, begin, _, index = piece_of(table, count, place)
    if (segment < 0) | (segment == N) | (index > 0):
        return
    pieces = tl.cdiv(tl.load(cu_seqlens + segment + 1).to(tl.int32) - begin, length)
    if pieces < 2:
        return
    row = tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    tile = row[:, None] * V + column[None, :]
    inside = (row < K)[:, None] & (column < V)[None, :]
    at = place.to(tl.int64) + (pieces - 1 if REVERSE else 0)
    S = tl.load(starts + (at * HEADS + head) * (K * V) + tile, mask=inside, other=0.0)
    for turn in range(1, pieces):
        at += -1 if REVERSE else 1
        target = starts + (at * HEADS + head) * (K * V)
        # nothing was written for the last piece, nor is anything read past it
        more = turn < pieces - 1
        arrived = tl.load(target + tile, mask=inside & more, other=0.0)
        tl.debug_barrier()
        tl.store(target + tile, S, mask=inside)
        # the product below reads back rows that other threads have stored
        tl.debug_barrier()
        if more:
            move = moves + (at * HEADS + head) * (K * K)
            for first in range(0, K, INNER):
                middle = first + inner
                spot = middle[None, :] * K + row[:, None] if REVERSE else row[:, None] * K + middle[None, :]
                m = tl.load(move + spot, mask=(row < K)[:, None] & (middle < K)[None, :], other=0.0)
                rows = middle[:, None] * V + column[None, :]
                part = tl.load(target + rows, mask=(middle < K)[:, None] & (column < V)[None, :], other=0.0)
                arrived += tl.dot(m, part, input_precision=PRECISION)
            S = arrived
