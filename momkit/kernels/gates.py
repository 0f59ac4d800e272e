"""Decays inside a chunk, exact for gates from 0 to minus infinity.

Gates are natural logarithms, fp32 or narrower; decays are powers of two of their cumulative sums. The sums are taken in
float64 and split in a high and a low float32 part: a difference of two sums then keeps full precision however far both
have run, without float64 work on pairs of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.kernels.launch import cdiv, launch
from momkit.kernels.layout import Pieces, piece_of

# finite, so that a gate of minus infinity may enter a difference, yet with a decay of zero
FORGET_ALL = tl.constexpr(-1e4)
# the same, where decays below the least float32 are zero
FORGET_ENOUGH = tl.constexpr(-140.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# programs that share the chunks of a piece, at most, and heads that one takes
MOST_STRIDES = 16
HEADS = tl.constexpr(16)


@triton.jit
def pair_decay(high, low, REVERSE: tl.constexpr, STRICT: tl.constexpr, LOW: tl.constexpr = True):
    """Decay between tokens `[C, C]`: row i reads what column j <= i wrote; reversed, column j >= i. Zero elsewhere.

    STRICT leaves out the diagonal.
    """
    C: tl.constexpr = high.shape[0]
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    span = high[:, None] - high[None, :]
    if LOW:
        span += low[:, None] - low[None, :]
    if REVERSE:
        span = -span
        seen = row < col if STRICT else row <= col
    else:
        seen = row > col if STRICT else row >= col
    return tl.exp2(tl.where(seen, span, float("-inf")))


@triton.jit
def pair_mask(C: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr):
    """`pair_decay` without gates: ones where a token is seen."""
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    if REVERSE:
        seen = row < col if STRICT else row <= col
    else:
        seen = row > col if STRICT else row >= col
    return tl.where(seen, 1.0, 0.0)


def gate_parts(dtype: torch.dtype) -> int:
    """Parts of a sum of gates: the second is what the first was rounded by, which results of 16 bits don't show."""
    return 2 if dtype == torch.float32 else 1


def gate_sums(
    g: Tensor, pieces: Pieces, length: int, num_tokens: int, num_heads: int, chunk_size: int, dtype: torch.dtype
) -> Tensor:
    """`[parts, H, T]` float32: the sum of gates from the start of a token's chunk up to it, to base 2.

    g: `[T, H]`, or `[H]` for every token. length: of pieces, at most. dtype: of the inputs. Tokens that no segment
    covers get 0.
    """
    parts = gate_parts(dtype)
    g = g.contiguous()
    sums = g.new_empty((parts, num_heads, num_tokens), dtype=torch.float32)
    strides = min(MOST_STRIDES, cdiv(length, chunk_size))
    launch(
        gate_sums_kernel, pieces.count * strides * cdiv(num_heads, HEADS.value),
        (g, sums, pieces.table), (pieces.count, pieces.segments, num_tokens, num_heads, strides),
        g.ndim == 1, parts == 2, chunk_size,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["count", "segments", "T", "H", "strides"])
def gate_sums_kernel(
    g, sums, table, count, segments, T, H, strides, CONSTANT: tl.constexpr, LOW: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    stride, place, first = pid % strides, pid // strides % count, pid // (strides * count) * HEADS
    segment, begin, end, _ = piece_of(table, count, place)
    if segment < 0:
        return
    rows, heads = tl.arange(0, C), first + tl.arange(0, HEADS)
    inside = (heads < H)[None, :]
    for i in range(tl.cdiv(tl.cdiv(end - begin, C) - stride, strides)):
        at = begin + (stride + i * strides) * C
        live = (rows < end - at)[:, None] & inside
        spot = 0 if CONSTANT else (at.to(tl.int64) + rows)[:, None] * H
        gates = tl.load(g + spot + heads[None, :], mask=live & (segment < segments), other=0.0).to(tl.float32)
        # the smaller the sums, the less rounding takes off them
        least: tl.constexpr = FORGET_ALL if LOW else FORGET_ENOUGH
        gates = tl.maximum(gates, least, propagate_nan=tl.PropagateNan.ALL)
        wide = tl.cumsum(gates.to(tl.float64) * LOG2_E, 0)
        high = wide.to(tl.float32)
        target = sums + heads.to(tl.int64)[None, :] * T + (at + rows)[:, None]
        tl.store(target, high, mask=live)
        if LOW:
            tl.store(target + tl.cast(H, tl.int64) * T, (wide - high.to(tl.float64)).to(tl.float32), mask=live)


@triton.jit
def load_decay(sums, plane, rows, live, last, LOW: tl.constexpr):
    """From the sums of a chunk of one head, `plane` apart: high, low `[C]`, the log2 decay from each token to the last
    one, and that of the whole chunk. Tokens past the last stand where it does."""
    last_high = tl.load(sums + last)
    high = tl.load(sums + rows, mask=live, other=last_high)
    low = tl.zeros_like(high)
    rest = last_high - high
    if LOW:
        last_low = tl.load(sums + plane + last)
        low = tl.load(sums + plane + rows, mask=live, other=last_low)
        rest += last_low - low
    return high, low, rest, last_high
