"""Where tokens go when packed segments are cut in chunks, and back.

Letters: B chunks times heads, C tokens of a chunk.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from momkit.mechanisms.base import Affine
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

    def pack(self, x: Affine, S0: Tensor, sizes: list[int]) -> list[Affine]:
        """Inputs by chunk and head, `[B, C, dim]`, `g` and `beta` `[B, C]`, absent tokens zero, in groups."""
        (T, H), C = x.v.shape[:2], self.tokens.shape[1]
        places = self.places(T, H)
        columns: dict[str, tuple[Tensor, ...]] = {}
        for name in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u"):
            tensor = getattr(x, name)
            if tensor is None:
                continue
            constant = tensor.ndim < (2 if name in ("g", "beta") else 3)
            tensor = (tensor.expand(T, *tensor.shape) if constant else tensor).to(S0.dtype)
            # head h reads key head h // (H / G)
            tensor = tensor if tensor.shape[1] == H else tensor.repeat_interleave(H // tensor.shape[1], dim=1)
            wide = places.move(tensor.reshape(T * H, prod(tensor.shape[2:]))).view(-1, C, *tensor.shape[2:])
            columns[name] = wide.split([n * H for n in sizes])
        return [Affine(**dict(zip(columns, part, strict=True))) for part in zip(*columns.values(), strict=True)]

    def unpack(self, chunks: list[Tensor], T: int, H: int) -> Tensor:
        """`[B, C, V]` -> `[T, H, V]`, uncovered rows zero."""
        flat = (chunks[0] if len(chunks) == 1 else torch.cat(chunks)).flatten(0, 1)
        return self.places(T, H).inverse.move(flat).view(T, H, flat.shape[1])

    def places(self, T: int, H: int) -> "Places":
        """Where row (token, head) of `[T * H]` goes in `[chunks * H * C]`, and back."""
        device = self.tokens.device
        head = torch.arange(H, device=device)
        tokens = self.tokens[:, None]
        there = (tokens * H + head[:, None]).where(tokens >= 0, -1).flatten()
        back = torch.full((T * H + 1,), -1, device=device)
        back[there] = torch.arange(len(there), device=device)  # absent places write the spare last row
        return Places(there, back[:-1], self.padded, len(self.covered) < T)


@dataclass(frozen=True)
class Places:
    """A partial permutation of rows: place i takes row `there[i]`, row j went to place `back[j]`; -1 is none.

    gaps, left_out: whether any place has no row, and any row no place.
    """

    there: Tensor
    back: Tensor
    gaps: bool
    left_out: bool

    @property
    def inverse(self) -> "Places":
        return Places(self.back, self.there, self.left_out, self.gaps)

    def move(self, x: Tensor) -> Tensor:
        """Rows in their places, zeros in the gaps; the gradient moves back the same way, without a scatter."""
        moved: Tensor = Move.apply(x, self)  # type: ignore[no-untyped-call]
        return moved


class Move(torch.autograd.Function):
    """See `Places.move`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        if not places.gaps:
            return x.index_select(0, places.there)
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, places.there % (len(x) + 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.places.inverse.move(grad), None
