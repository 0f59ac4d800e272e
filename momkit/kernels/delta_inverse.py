"""Delta rules, what every chunk can do alone at first: the inverse of its triangular system.

Inside a chunk, what tokens write depends on what earlier tokens wrote. With P_ij = (k_i . k_j) decayed from j to i for
j < i, and W_i = v_i - what k_i reads from the state at the chunk's start, the errors E_i = v_i - what k_i reads solve

    (I + P diag(beta)) E = W,    and token i writes beta_i k_i E_i^T.

The decay stays inside the matrix: entries are smaller than without it, and none overflows that the rule itself keeps.
"""

import triton
import triton.language as tl

from momkit.kernels.gates import load_decay, pair_decay, pair_mask
from momkit.kernels.layout import piece_of
from momkit.kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["T", "N", "count"])
def chunk_inverse(
    k, beta, sums, inverse, table, T, N, count,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """k `[T, G, K]`, beta `[H, T]` float32 -> inverse `[T, H, C]`, a token's row of (I + P diag(beta))^-1.

    sums `[PARTS, H, T]` of gates; PARTS = 0: no gates.
    """
    program = tl.program_id(0)
    head = program % H
    segment, begin, end, _ = piece_of(table, count, program // H)
    if (segment < 0) | (begin == end):
        return
    token = tl.arange(0, C)
    column = tl.arange(0, BLOCK)
    seen = token < end - begin
    row = begin.to(tl.int64)
    inverse += (row * H + head) * C
    if segment == N:
        store_tile(inverse, tl.zeros([C, C], tl.float32), token, seen, token, H * C, C, True)
        return
    k += row * (G * K) + head // (H // G) * K

    strength = tl.load(beta + head.to(tl.int64) * T + begin + token, mask=seen, other=0.0)
    if PARTS:
        sums += head.to(tl.int64) * T + begin
        plane = tl.cast(T, tl.int64) * H
        high, low, _, _ = load_decay(sums, plane, token, seen, end - begin - 1, PARTS == 2)
    pairs = tl.zeros([C, C], tl.float32)
    for first in range(0, K, BLOCK):
        xk = load_tile(k, token, seen, first + column, G * K, K, K % BLOCK == 0)
        pairs += tl.dot(xk, tl.trans(xk), input_precision=PRECISION)
    pairs *= pair_decay(high, low, False, True, PARTS == 2) if PARTS else pair_mask(C, False, True)
    solved = unit_lower_inverse(pairs * strength[None, :], PRECISION)
    store_tile(inverse, solved, token, seen, token, H * C, C, True)


@triton.jit
def unit_lower_inverse(lower, PRECISION: tl.constexpr):
    """(I + lower)^-1 for a strictly lower `[C, C]`: inverses of diagonal blocks, merged pair by pair.

    With blocks A, B inverted and D below their diagonal, the pair's inverse is [[A, 0], [-B D A, B]]. Up to 16 x 16,
    only the blocks on the diagonal are held.
    """
    C: tl.constexpr = lower.shape[0]
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    blocks = tl.sum(tl.where(diagonal, lower.reshape(BLOCKS, 16, BLOCKS, 16), 0.0), 2)
    inner = tl.arange(0, 16)
    row, col = inner[None, :, None], inner[None, None, :]
    small = tl.where(row == col, 1.0, 0.0) - tl.where((row // 2 == col // 2) & (row > col), blocks, 0.0)
    for level in tl.static_range(1, 4):
        small = merge_pairs(small, blocks, row, col, 1 << level, PRECISION)
    solved = tl.where(diagonal, small[:, :, None, :], 0.0).reshape(C, C)
    token = tl.arange(0, C)
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            solved = merge_pairs(solved, lower, token[:, None], token[None, :], 1 << level, PRECISION)
    return solved


@triton.jit
def merge_pairs(solved, lower, row, col, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """One more doubling of the diagonal blocks, from those of SIZE."""
    between = (row // (2 * SIZE) == col // (2 * SIZE)) & (row // SIZE > col // SIZE)
    link = tl.dot(solved, tl.where(between, lower, 0.0), input_precision=PRECISION)
    return tl.dot(-link, solved, solved, input_precision=PRECISION)
