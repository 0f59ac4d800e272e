"""Decays inside a chunk: what is left of the write of token j when token i reads it.

Every decay is the exponential of gates summed over just the tokens in between, or a product of such exponentials; never
a difference of two sums. So nothing overflows, gates from 0 to minus infinity are exact, and so are their gradients.

Letters: B chunks times heads, C tokens of a chunk (a power of two), K key dim, V value dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# finite, yet with an exponential of zero in every dtype
FORGET_ALL = -1e4


@dataclass(frozen=True)
class Row:
    """A reading side `x` `[B, C, K]`; token i reads what i itself has decayed, or, if `exclusive`, what i - 1 left."""

    x: Tensor
    exclusive: bool = False


@dataclass(frozen=True)
class Pairs:
    """Rows x against columns y, decayed.

    between: by row and column, `[B, C, C]`, x_i . (decay from j to i) y_j for j <= i (j < i if exclusive), else zero.
    seen: by row, `[B, C, K]`, x_i decayed since the chunk began. kept: by column, y_j decayed until the chunk ends.
    whole: `[B, K or 1, 1]`, the decay of the whole chunk.
    """

    between: list[list[Tensor]]
    seen: list[Tensor]
    kept: list[Tensor]
    whole: Tensor


def finite(gate: Tensor) -> Tensor:
    """A gate without minus infinity, so that it may be multiplied by zero."""
    return gate.clamp_min(FORGET_ALL)


def lower_mask(C: int, exclusive: bool, like: Tensor) -> Tensor:
    """Ones `[C, C]` where j <= i, or j < i."""
    return torch.ones(C, C, dtype=like.dtype, device=like.device).tril(-1 if exclusive else 0)


def undecayed_pairs(rows: Sequence[Row], cols: Sequence[Tensor]) -> Pairs:
    """Pairs when nothing is forgotten."""
    between = [[torch.bmm(row.x, y.mT).tril(-1 if row.exclusive else 0) for y in cols] for row in rows]
    whole = rows[0].x.new_ones(len(rows[0].x), 1, 1)
    return Pairs(between, [row.x for row in rows], list(cols), whole)


def head_pairs(g: Tensor, rows: Sequence[Row], cols: Sequence[Tensor]) -> Pairs:
    """Pairs under one gate `g` `[B, C]` a token and head."""
    g = finite(g)
    decays = {exclusive: segment_decay(g, exclusive) for exclusive in {row.exclusive for row in rows}}
    between = [[torch.bmm(row.x, y.mT) * decays[row.exclusive] for y in cols] for row in rows]
    since = {False: g.cumsum(1), True: pad(g[:, :-1], (1, 0)).cumsum(1)}
    until = pad(g[:, 1:], (0, 1)).flip(1).cumsum(1).flip(1).exp()[..., None]
    seen = [row.x * since[row.exclusive].exp()[..., None] for row in rows]
    return Pairs(between, seen, [y * until for y in cols], g.sum(1).exp()[:, None, None])


def segment_decay(g: Tensor, exclusive: bool) -> Tensor:
    """e to the sum of g over j < s <= i (s < i if exclusive) where token i may read token j, else zero: `[B, C, C]`."""
    B, C = g.shape
    later, upto = lower_mask(C, True, g), lower_mask(C, exclusive, g)
    weights = later[:, None, :] * upto.T[:, :, None]  # [s, i, j]
    mask = torch.zeros_like(later).masked_fill(upto == 0, -torch.inf)
    return torch.addmm(mask.flatten(), g, weights.reshape(C, C * C)).exp().view(B, C, C)


def key_pairs(gk: Tensor, rows: Sequence[Row], cols: Sequence[Tensor]) -> Pairs:
    """Pairs under one gate `gk` `[B, C, K]` a token and key channel.

    Blocks of b tokens are joined to blocks of 2b. Inside each block the rows are decayed since its first token and the
    columns until its last, so what the second block reads of the first is one matrix product.
    """
    B, C, K = gk.shape
    total = finite(gk).exp()  # over each block
    xs = [row.x if row.exclusive else row.x * total for row in rows]
    ys = list(cols)
    between = [[diagonal(row, y) for y in cols] for row in rows]
    b = 1
    while b < C:
        halves = (B, C // (2 * b), 2, b, K)
        first, second = total.view(B, C // (2 * b), 2, 1, K).unbind(2)
        x_halves = [x.view(halves).unbind(2) for x in xs]
        y_halves = [y.view(halves).unbind(2) for y in ys]
        between = [
            [join(blocks, products(x, y)) for blocks, (y, _) in zip(row, y_halves, strict=True)]
            for row, (_, x) in zip(between, x_halves, strict=True)
        ]
        xs = [torch.stack([x1, x2 * first], 2).view(B, C, K) for x1, x2 in x_halves]
        ys = [torch.stack([y1 * second, y2], 2).view(B, C, K) for y1, y2 in y_halves]
        total = first * second
        b *= 2
    return Pairs([[p.view(B, C, C) for p in row] for row in between], xs, ys, total.view(B, K, 1))


def diagonal(row: Row, y: Tensor) -> Tensor:
    """The pairs of each token with itself, as blocks of one token `[B, C, 1, 1]`."""
    products = torch.zeros_like(y[..., 0]) if row.exclusive else (row.x * y).sum(-1)
    return products[..., None, None]


def products(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_j, `[..., b, K]` twice -> `[..., b, b]`; matrix products of a row or two cost more than they save."""
    if x.shape[-2] <= 2:
        return (x[..., :, None, :] * y[..., None, :, :]).sum(-1)
    return torch.matmul(x, y.mT)


def join(blocks: Tensor, cross: Tensor) -> Tensor:
    """Diagonal blocks `[B, 2n, b, b]` and what lies below the first of every two `[B, n, b, b]` -> `[B, n, 2b, 2b]`."""
    b = cross.shape[-1]
    first, second = blocks.view(*cross.shape[:2], 2, b, b).unbind(2)
    return torch.cat([pad(first, (0, b)), torch.cat([cross, second], -1)], -2)


class ValueDecay:
    """The mirror image of `key_pairs`: one gate `gv` `[B, C, V]` a token and value channel.

    Such a decay is no matrix between tokens; it acts on the values written, and on what is read of them.
    """

    def __init__(self, gv: Tensor) -> None:
        self.gate = finite(gv).exp()
        self.totals = [self.gate]
        while (blocks := self.totals[-1]).shape[1] > 1:
            self.totals.append(blocks[:, ::2] * blocks[:, 1::2])
        self.whole = self.totals[-1]

    def kept(self, v: Tensor) -> list[Tensor]:
        """v decayed until the end of its block of 1, 2, 4, ... C tokens."""
        levels = [v]
        for total in self.totals[:-1]:
            second = total[:, 1::2, None, None]
            until = torch.cat([second, torch.ones_like(second)], 2)
            levels.append((levels[-1].view(len(v), -1, 2, v.shape[1] // total.shape[1], v.shape[2]) * until).view_as(v))
        return levels

    def read(self, pairs: Tensor, kept: list[Tensor], start: Tensor, exclusive: bool) -> Tensor:
        """sum_j pairs_ij (decay from j to i) v_j, and what is left at i of a read `start` `[B, C, V]` of the state that
        the chunk began with."""
        B, C, V = start.shape
        out = start
        for total, v in reversed(list(zip(self.totals[:-1], kept[:-1], strict=True))):
            n, b = total.shape[1] // 2, C // total.shape[1]
            first = total[:, ::2, None, None]
            since = torch.cat([torch.ones_like(first), first], 2)
            blocks = pairs.view(B, n, 2, b, n, 2, b)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)
            cross = torch.bmm(blocks.reshape(B * n, b, b), v.view(B, n, 2, b, V)[:, :, 0].flatten(0, 1))
            out = out.view(B, n, 2, b, V) * since + pad(cross.view(B, n, 1, b, V), (0, 0, 0, 0, 1, 0))
            out = out.view(B, C, V)
        if exclusive:
            return out
        return out * self.gate + pairs.diagonal(dim1=1, dim2=2)[..., None] * kept[0]
