"""Decays of channels inside a chunk, for gates from 0 to minus infinity, and what pairs of tokens need of them.

Where no channel forgets more than LEAST in a chunk, each token is decayed to halfway through the chunk, forward or
backward, and all pairs are one matrix product. Elsewhere that would overflow, and pairs are taken apart: two tokens
i > j differ in a highest bit b; in their block of 2b tokens, j lies in the first half and i in the second. The decay
between them is that from j to the end of the first half, times that from there to i. Both are at most 1 and belong to
one token, so for each b all pairs are one matrix product, of what a token is in its half: a reader in the second, a
writer in the first.
"""

import triton
import triton.language as tl

from momkit.kernels.gates import FORGET_ALL, FORGET_ENOUGH, LOG2_E
from momkit.kernels.tiles import load_tile

# decays of a channel over a chunk of which the root may multiply and divide numbers of 8 bits exponent, or of 5
LEAST, LEAST_16 = tl.constexpr(2.0**-100), tl.constexpr(2.0**-16)


@triton.jit
def is_mild(decays, dtype: tl.constexpr):
    """Whether no channel of a chunk, whose decays over all of it these are, forgets more than LEAST."""
    return tl.min(decays, 0) > (LEAST_16 if dtype == tl.float16 else LEAST)


@triton.jit
def halfway(sums, reached, total):
    """Decays `[C, cols]` float32 of what reads, and of what is written, to halfway through a mild chunk."""
    middle = total[None, :] * 0.5
    return tl.exp2((reached - middle).to(tl.float32)), tl.exp2((middle - sums).to(tl.float32))


@triton.jit
def gate_tile(
    gates, rows, live, cols, STRIDE: tl.constexpr, WIDTH, EXACT: tl.constexpr, BEFORE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Sums of gates `[C, cols]` to base 2 from the start of a chunk up to what a token writes, and up to what it reads,
    with BEFORE less its own gate. WIDE: in float64, so that a difference of two sums is exact however far both ran."""
    # the smaller the sums, the less rounding takes off them
    least: tl.constexpr = FORGET_ALL if WIDE else FORGET_ENOUGH
    gate = load_tile(gates, rows, live, cols, STRIDE, WIDTH, EXACT).to(tl.float32)
    gate = tl.maximum(gate, least, propagate_nan=tl.PropagateNan.ALL)
    gate = gate.to(tl.float64 if WIDE else tl.float32) * LOG2_E
    sums = tl.cumsum(gate, 0)
    return sums, sums - gate if BEFORE else sums


@triton.jit
def last_row(tile):
    """The last row of a tile."""
    C: tl.constexpr = tile.shape[0]
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == C - 1, tile, 0.0), 0)


@triton.jit
def half_decay(sums, reached, half):
    """Decay `[C, cols]` float32 between each token and the end of the first half of its block of 2 half tokens."""
    C: tl.constexpr = sums.shape[0]
    COLS: tl.constexpr = sums.shape[1]
    token = tl.arange(0, C)[:, None]
    middle = tl.gather(sums, tl.broadcast_to(token // (2 * half) * (2 * half) + half - 1, C, COLS), 0)
    second = in_second_half(C, half)
    # less than nothing, whatever rounding makes of it
    return tl.exp2((tl.where(second, reached, sums) - middle).to(tl.float32) * tl.where(second, 1.0, -1.0))


@triton.jit
def in_second_half(C: tl.constexpr, half):
    """`[C, 1]`: tokens in the second half of their block of 2 half."""
    return (tl.arange(0, C) // half % 2 == 1)[:, None]


@triton.jit
def half_pairs(C: tl.constexpr, half):
    """`[C, C]`: pairs of tokens in different halves of one block of 2 half."""
    token = tl.arange(0, C)
    return (token[:, None] ^ token[None, :]) // half == 1


@triton.jit
def half_crossings(C: tl.constexpr, half, BEFORE: tl.constexpr):
    """`[C, C]`, ones where between token j and the middle of its block of 2 half lies gate i."""
    gate = tl.arange(0, C)[:, None]
    token = tl.arange(0, C)[None, :]
    crossed = tl.where(gate // half % 2 == 1, token >= gate + BEFORE, token < gate)
    return tl.where((gate // half == token // half) & crossed, 1.0, 0.0)
