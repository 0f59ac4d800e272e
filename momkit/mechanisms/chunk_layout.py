"""Where tokens go when packed segments are cut in chunks, and back.

Letters: B chunks times heads, C tokens of a chunk.
"""

from dataclasses import dataclass

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
        T, H = x.v.shape[:2]
        columns: dict[str, tuple[Tensor, ...]] = {}
        for name in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u"):
            tensor = getattr(x, name)
            if tensor is None:
                continue
            scalar, constant = name in ("g", "beta"), tensor.ndim == 1 or (name == "u" and tensor.ndim == 2)
            tensor = (tensor.expand(T, *tensor.shape) if constant else tensor).to(S0.dtype)
            wide = self.gather(tensor[..., None] if scalar else tensor, H)
            columns[name] = (wide.squeeze(-1) if scalar else wide).split([n * H for n in sizes])
        return [Affine(**dict(zip(columns, part, strict=True))) for part in zip(*columns.values(), strict=True)]

    def gather(self, x: Tensor, H: int) -> Tensor:
        """`[T, G, dim]` -> `[chunks * H, C, dim]`, head h from key head h // (H / G)."""
        T, G, dim = x.shape
        head = torch.arange(H, device=x.device) // (H // G)
        rows = self.tokens[:, None] * G + head[:, None]
        flat = x.reshape(T * G, dim)
        if self.padded:
            flat = torch.cat([flat, flat.new_zeros(1, dim)])
            rows = rows.where(self.tokens[:, None] >= 0, T * G)
        return flat.index_select(0, rows.flatten()).view(-1, self.tokens.shape[1], dim)

    def unpack(self, chunks: list[Tensor], T: int, H: int) -> Tensor:
        """`[B, C, V]` -> `[T, H, V]`, uncovered rows zero."""
        C = self.tokens.shape[1]
        tokens = self.tokens.flatten()
        place = torch.arange(len(tokens), device=tokens.device)[tokens >= 0]
        back = torch.empty_like(place)
        back[tokens[tokens >= 0] - self.covered.start] = place
        rows = (back // C * H * C + back % C)[:, None] + torch.arange(H, device=back.device) * C
        flat = (chunks[0] if len(chunks) == 1 else torch.cat(chunks)).flatten(0, 1)
        packed = flat.index_select(0, rows.flatten()).view(-1, H, flat.shape[1])
        return pad(packed, (0, 0, 0, 0, self.covered.start, T - self.covered.stop))
