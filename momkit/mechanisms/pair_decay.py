"""Decays inside a chunk: what is left of a write at token j when token i reads it.

Every exponent is a sum of gates taken directly, never a difference of two sums, so that gates from 0 to minus infinity
are exact: no exponential overflows, and a gate that forgets all is a reset.

Letters: B chunks times heads, C tokens of a chunk (a power of two), K key dim, V value dim.
"""

from functools import cache

import torch
from torch import Tensor

# e^-1e4 is zero in every dtype, and sums of such gates stay finite
FORGET_ALL = -1e4

# below this block size exact pair products are cheaper than matrix products
SMALL = 4


def clamped(gate: Tensor) -> Tensor:
    """A gate with minus infinity made finite, its exponential still zero."""
    return gate.clamp_min(FORGET_ALL)


@cache
def causal(C: int, exclusive: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask `[C, C]` of pairs j <= i, or j < i."""
    return torch.ones(C, C, dtype=dtype, device=device).tril(-1 if exclusive else 0)


@cache
def segment_sums(C: int, exclusive: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights `[C, C * C]` that sum gates s over j < s <= i (s < i if exclusive), and minus infinity where j > i."""
    s, i, j = torch.meshgrid(*[torch.arange(C, device=device)] * 3, indexing="ij")
    weights = ((s > j) & ((s < i) if exclusive else (s <= i))).to(dtype)
    allowed = causal(C, exclusive, dtype, device)
    return weights.reshape(C, C * C), torch.zeros_like(allowed).masked_fill(allowed == 0, -torch.inf).reshape(C * C)


def sums_to_end(gate: Tensor) -> Tensor:
    """Sums of the gates after each token to the end of the chunk, over axis 1."""
    after = torch.cat([gate[:, 1:], torch.zeros_like(gate[:, :1])], 1)
    return after.flip(1).cumsum(1).flip(1)


def sums_before(gate: Tensor) -> Tensor:
    """Sums of the gates before each token, over axis 1."""
    return torch.cat([torch.zeros_like(gate[:, :1]), gate[:, :-1]], 1).cumsum(1)


class NoDecay:
    """Nothing is forgotten."""

    def pairs(self, x: Tensor, y: Tensor, exclusive: bool = False) -> Tensor:
        """x_i . y_j where j <= i, or j < i: `[B, C, C]`."""
        return torch.bmm(x, y.mT).tril(-1 if exclusive else 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, exclusive: bool = False) -> Tensor:
        """What each token reads of the writes k v^T of its own chunk: `[B, C, V]`."""
        return torch.bmm(self.pairs(q, k, exclusive), v)

    def seen_from_start(self, q: Tensor, exclusive: bool = False) -> Tensor:
        """q decayed since the chunk began, to read the state it began with."""
        return q

    def kept_to_end(self, k: Tensor) -> Tensor:
        """k decayed until the chunk ends."""
        return k

    def whole(self) -> Tensor | None:
        """The factor `[B, K or 1, V or 1]` on the state over the whole chunk."""
        return None


class HeadDecay(NoDecay):
    """One gate `g` `[B, C]` a token and head."""

    def __init__(self, g: Tensor) -> None:
        self.g = clamped(g)
        self.known: dict[bool, Tensor] = {}

    def between(self, exclusive: bool) -> Tensor:
        """The decay `[B, C, C]` from each token to each later one, zero for an earlier one."""
        if exclusive not in self.known:
            B, C = self.g.shape
            weights, mask = segment_sums(C, exclusive, self.g.dtype, self.g.device)
            self.known[exclusive] = torch.addmm(mask, self.g, weights).exp().view(B, C, C)
        return self.known[exclusive]

    def pairs(self, x: Tensor, y: Tensor, exclusive: bool = False) -> Tensor:
        return torch.bmm(x, y.mT) * self.between(exclusive)

    def seen_from_start(self, q: Tensor, exclusive: bool = False) -> Tensor:
        sums = sums_before(self.g) if exclusive else self.g.cumsum(1)
        return q * sums.exp()[..., None]

    def kept_to_end(self, k: Tensor) -> Tensor:
        return k * sums_to_end(self.g).exp()[..., None]

    def whole(self) -> Tensor:
        return self.g.sum(1).exp()[:, None, None]
