"""Where tokens go when packed segments are cut in chunks, and back.

Letters: B chunks times heads, C tokens of a chunk.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from momkit.mechanisms.base import Affine, Inputs
from momkit.mechanisms.reference import Lanes


@dataclass(frozen=True)
class Layout:
    """Where each token goes when segments are cut in chunks of C tokens.

    Chunks are ordered by chunk time, then by lane, the segment with the most chunks first.
    tokens: `[chunks, C]`, the token in each place; where there is none, -1.
    counts: chunks at each chunk time. segments: `[N]`, the segment in each lane.
    covered: the range of tokens that segments cover.
    """

    tokens: Tensor
    counts: list[int]
    segments: Tensor
    covered: range
    padded: bool

    @property
    def alike(self) -> bool:
        """Whether segments are equally long, in whole chunks."""
        return not self.padded and self.counts[-1:] == [len(self.segments)]

    @staticmethod
    def of(cu_seqlens: Tensor, chunk_size: int) -> "Layout":
        cu = cu_seqlens.long()
        lengths = cu.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        C = min(chunk_size, 1 << max(0, longest - 1).bit_length())
        chunks = (lengths + C - 1) // C
        cu_chunks = pad(chunks.cumsum(0), (1, 0))
        lanes = Lanes.of(cu_chunks)
        segment = torch.repeat_interleave(chunks)[lanes.order]
        first = cu[segment] + (lanes.order - cu_chunks[segment]) * C
        tokens = first[:, None] + torch.arange(C, device=cu.device)
        there = tokens < cu[segment + 1][:, None]
        covered = range(int(cu[0]), int(cu[-1]))
        return Layout(tokens.where(there, -1), lanes.counts, lanes.segments, covered, tokens.numel() != len(covered))

    @property
    def in_order(self) -> bool:
        """Whether lanes are segments."""
        return len(self.segments) == 1

    def covered_only(self, x: Tensor) -> Tensor:
        """`x` `[T, ...]` with zeros, whatever was there, in rows that no segment covers."""
        start, stop = self.covered.start, self.covered.stop
        if stop - start == len(x):
            return x
        return pad(x[start:stop], [0, 0] * (x.ndim - 1) + [start, len(x) - stop])

    def groups(self, size: int) -> list[list[int]]:
        """Chunk times gathered in groups of at least `size` chunks."""
        groups: list[list[int]] = []
        for count in self.counts:
            if groups and sum(groups[-1]) < size:
                groups[-1].append(count)
            else:
                groups.append([count])
        return groups

    def pack(self, x: Inputs, sizes: list[int]) -> list[Affine]:
        """Inputs `[T, H, ...]` by chunk and head, `[B, C, ...]`, absent tokens zero, in groups."""
        T, H = x["v"].shape[:2]
        places = self.places(T, H)
        columns = [places.move(tensor.flatten(0, 1)).split([n * H for n in sizes]) for tensor in x.values()]
        return [Affine(**dict(zip(x, part, strict=True))) for part in zip(*columns, strict=True)]

    def unpack(self, chunks: list[Tensor], T: int, H: int) -> Tensor:
        """`[B, C, V]` -> `[T, H, V]`, uncovered rows zero."""
        flat = (chunks[0] if len(chunks) == 1 else torch.cat(chunks)).flatten(0, 1)
        return self.places(T, H).inverse.move(flat).view(T, H, flat.shape[1])

    def places(self, T: int, H: int) -> "Places":
        """Where row (token, head) of `[T * H]` goes in `[chunks * H, C]`, and back."""
        device = self.tokens.device
        head = torch.arange(H, device=device)
        tokens = self.tokens[:, None]
        there = (tokens * H + head[:, None]).where(tokens >= 0, -1).flatten(0, 1)
        back = torch.full((T * H + 1,), -1, device=device)
        back[there.flatten()] = torch.arange(there.numel(), device=device)  # absent places write the spare last row
        alike = (len(self.segments), self.tokens.shape[1], H) if self.alike and len(self.covered) == T else None
        return Places(there, back[:-1], self.padded, len(self.covered) < T, alike)


def spans(groups: list[list[int]]) -> list[tuple[slice, list[int]]]:
    """Each group of chunk times with the range of its rows."""
    ends = [0, *accumulate(map(sum, groups))]
    return [(slice(*span), counts) for span, counts in zip(pairwise(ends), groups, strict=True)]


def every_token(x: Affine, dtype: torch.dtype) -> Inputs:
    """The inputs there are as `[T, H, ...]`: constants expanded along time, key heads repeated."""
    T, H = x.v.shape[:2]
    wide: Inputs = {}
    for name in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u"):
        tensor = getattr(x, name)
        if tensor is None:
            continue
        constant = tensor.ndim < (2 if name in ("g", "beta") else 3)
        tensor = (tensor.expand(T, *tensor.shape) if constant else tensor).to(dtype)
        # head h reads key head h // (H / G)
        wide[name] = tensor if tensor.shape[1] == H else tensor.repeat_interleave(H // tensor.shape[1], dim=1)
    return wide


@dataclass(frozen=True)
class Places:
    """A partial permutation of rows: place i takes row `there[i]`, row j went to place `back[j]`; -1 is none.

    Places may be in a shape; they are numbered in order. gaps, left_out: whether any place has no row, and any row no
    place. alike: segments, C and heads, if all segments fill the same number of chunks.
    """

    there: Tensor
    back: Tensor
    gaps: bool
    left_out: bool
    alike: tuple[int, int, int] | None = None

    @property
    def inverse(self) -> "Places":
        return Places(self.back, self.there, self.left_out, self.gaps)

    def take(self, x: Tensor, some: slice = slice(None), room: Tensor | None = None) -> Tensor:
        """The rows of `x` `[rows, ...]` in some places, zeros in the gaps; into a room for them, if one is given."""
        there = self.there[some]
        if self.alike is not None:
            room = x.new_empty(*there.shape, *x.shape[1:]) if room is None else room
            source = self.by_time(x, some, self.alike)
            room.view(source.shape).copy_(source)
            return room
        taken = x.index_select(0, there.flatten().clamp_min(0) if self.gaps else there.flatten())
        # not even a view of the same shape: it would forbid callers to change an output in place
        taken = taken if there.ndim == 1 else taken.view(*there.shape, *x.shape[1:])
        taken = taken.masked_fill_((there < 0).view(*there.shape, *[1] * (x.ndim - 1)), 0) if self.gaps else taken
        return taken if room is None else room.copy_(taken)

    def by_time(self, x: Tensor, some: slice, alike: tuple[int, int, int]) -> Tensor:
        """The rows of some places as they lie, seen by chunk time, segment and head: `[times, N, H, C, ...]`."""
        N, C, H = alike
        start, stop, _ = some.indices(len(self.there))
        by_segment = x.view(N, -1, C, H, *x.shape[1:])[:, start // (N * H) : stop // (N * H)]
        return by_segment.transpose(0, 1).transpose(2, 3)

    def room(self, x: Tensor) -> Tensor:
        """Room for all rows of the shape of those of `x`: zeros where no place has one; with gaps, a spare row."""
        rows = (len(self.back) + self.gaps, *x.shape[1:])
        return x.new_zeros(rows) if self.left_out else x.new_empty(rows)

    def put(self, x: Tensor, some: slice, room: Tensor) -> None:
        """`take` undone: `x`, the rows of some places, into the room for all; what is in gaps goes to the spare row."""
        if self.alike is not None:
            # then it is a transposition, three times as fast as a scatter
            target = self.by_time(room, some, self.alike)
            target.copy_(x.view(target.shape))
            return
        there = self.there[some].flatten()
        room.index_copy_(0, there.where(there >= 0, len(room) - 1) if self.gaps else there, x.flatten(0, 1))

    def move(self, x: Tensor) -> Tensor:
        """`take` all; the gradient moves back the same way, without a scatter."""
        moved: Tensor = Move.apply(x, self)  # type: ignore[no-untyped-call]
        return moved


class Move(torch.autograd.Function):
    """See `Places.move`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        return places.take(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.flatten(0, ctx.places.there.ndim - 1)
        return ctx.places.inverse.move(rows).view(ctx.shape), None
