"""Which program works on which piece of which segment, decided on the device.

Segments are cut in pieces of `length` tokens, counted from each segment's start; where other segments lie makes no
difference. A grid has room for the most pieces that T tokens in N segments can give; spare programs leave at once.
Tokens that no segment covers form a last segment of their own, N, whose rows kernels fill with zeros.
Pieces of long segments come first: what takes longest should start first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, launch

# segments or places that a program takes at once: it compares each segment with each
BLOCK = tl.constexpr(64)


@dataclass(frozen=True)
class Pieces:
    """table: `[4, P]` int32: segment (N: uncovered tokens, -1: spare), begin and end token, index in the segment.

    Every segment has one piece at least. segments: N. first: `[N + 1]` int32, the place of each segment's first piece;
    its others follow.
    """

    table: Tensor
    segments: int
    first: Tensor | None = None

    @property
    def count(self) -> int:
        return self.table.shape[1]

    def most_split(self, num_tokens: int, length: int) -> int:
        """The most places that pieces of split segments can take; the longest come first, so they are the first."""
        return min(self.count, 2 * (num_tokens // length)) if length < num_tokens else 0

    @staticmethod
    def of(cu_seqlens: Tensor, num_tokens: int, length: int) -> "Pieces":
        """Pieces of at most `length` tokens; one small launch or two, no synchronisation. InputError for 2^31
        tokens or more."""
        if num_tokens >= 2**31:
            raise InputError(f"T = {num_tokens} packed tokens; allowed: less than 2^31")
        segments = len(cu_seqlens)  # with the uncovered one
        table = cu_seqlens.new_empty((4, segments + num_tokens // length), dtype=torch.int32)
        first = cu_seqlens.new_empty(segments, dtype=torch.int32)
        scalars, places = (num_tokens, segments, length), table.shape[1]
        few = segments <= BLOCK.value
        if not few:
            launch(order_segments, cdiv(segments, BLOCK.value), (cu_seqlens, first), scalars)
        launch(fill_table, cdiv(places, BLOCK.value), (cu_seqlens, first, table), (*scalars, places), few)
        return Pieces(table, segments - 1, first)


def piece_tokens(tokens: int, programs: int, shortest: int) -> int:
    """Tokens a piece, a power of two: `tokens`, in pieces of one program each, are `programs` programs or fewer."""
    return max(shortest, 1 << max(0, tokens // programs - 1).bit_length())


@triton.jit
def segment_bounds(cu_seqlens, n, T, segments):
    """First token and end of segments n; those out of range are empty, the last one ends at T."""
    begin = tl.load(cu_seqlens + n, mask=n < segments, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=n < segments - 1, other=0).to(tl.int32)
    return begin, tl.where(n == segments - 1, T, tl.maximum(end, begin))


@triton.jit
def places_before(cu_seqlens, n, T, segments, length):
    """Pieces of all segments that come before segments n: the longer ones, and of equal ones the earlier."""
    begin, end = segment_bounds(cu_seqlens, n, T, segments)
    mine = end - begin
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, segments, BLOCK):
        m = start + tl.arange(0, BLOCK)
        begin, end = segment_bounds(cu_seqlens, m, T, segments)
        other = end - begin
        pieces = tl.where(m < segments, tl.maximum((other + length - 1) // length, 1), 0)
        precedes = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (m[None, :] < n[:, None]))
        before += tl.sum(tl.where(precedes, pieces[None, :], 0), 1)
    return before


@triton.jit(do_not_specialize=["T", "segments", "length"])
def order_segments(cu_seqlens, first, T, segments, length):
    """first[n]: the place of each segment's first piece."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(first + n, places_before(cu_seqlens, n, T, segments, length), mask=n < segments)


@triton.jit(do_not_specialize=["T", "segments", "length", "count"])
def fill_table(cu_seqlens, first, table, T, segments, length, count, FEW: tl.constexpr):
    """The row of each piece: find the segment whose places hold it. FEW: one block of segments, ordered here."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.full([BLOCK], -1, tl.int32)
    index = tl.zeros([BLOCK], tl.int32)
    for start in range(0, segments, BLOCK):
        n = start + tl.arange(0, BLOCK)
        begin, end = segment_bounds(cu_seqlens, n, T, segments)
        pieces = tl.where(n < segments, tl.maximum((end - begin + length - 1) // length, 1), 0)
        if FEW:
            at = places_before(cu_seqlens, n, T, segments, length)
            tl.store(first + n, at, mask=(n < segments) & (tl.program_id(0) == 0))
        else:
            at = tl.load(first + n, mask=n < segments, other=0)
        inside = (place[:, None] >= at[None, :]) & (place[:, None] < (at + pieces)[None, :])
        segment = tl.maximum(segment, tl.max(tl.where(inside, n[None, :], -1), 1))
        index += tl.sum(tl.where(inside, place[:, None] - at[None, :], 0), 1)
    there = segment >= 0
    begin, end = segment_bounds(cu_seqlens, tl.maximum(segment, 0), T, segments)
    start_token = begin + index * length
    tl.store(table + place, segment, mask=place < count)
    inside = place < count
    tl.store(table + count + place, tl.where(there, start_token, 0), mask=inside)
    tl.store(table + 2 * count + place, tl.where(there, tl.minimum(start_token + length, end), 0), mask=inside)
    tl.store(table + 3 * count + place, index, mask=inside)


@triton.jit
def piece_of(table, count, place):
    """segment, begin, end, index of the piece at a place of the table."""
    row = table + place
    return tl.load(row), tl.load(row + count), tl.load(row + 2 * count), tl.load(row + 3 * count)
