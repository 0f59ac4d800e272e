"""The chunked scan of the delta rules that decay by head, as one function with a gradient of its own.

Token j writes y_j = beta_j k_j times f_j = v_j - (what k_j reads), so that inside a chunk

    (I + P_k) F = V - K' S        O = scale (P_q F + Q' S)        next S = whole S + Y'^T F

where P_x,ij = (decay from j to i) x_i . y_j, K' and Q' are decayed since the chunk began, Y' until it ends. What the
state holds is taken off V before the system, ill-conditioned when keys are alike, is solved. Groups of chunks are small
enough to stay in cache. The gradient keeps what is costly, and computes again what is cheap.

Letters: B chunks times heads, C tokens of a chunk, K key dim, V value dim.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from momkit.mechanisms.base import Inputs
from momkit.mechanisms.carry import differentiable_once, invert
from momkit.mechanisms.chunk_layout import Places


class Decay:
    """Decays under one gate `g` `[B, C]` a token, as products of gates, exact from one to zero.

    between: `[B, C, C]`, from token j to token i, zero for j > i. since, until: `[B, C, 1]`, since the chunk began and
    until it ends. whole: `[B, 1, 1]`, of the whole chunk.
    """

    def __init__(self, between: Tensor, since: Tensor) -> None:
        self.between, self.since = between, since
        self.until = between[:, -1, :, None]
        self.whole = since[:, -1:]

    @staticmethod
    def of(g: Tensor) -> "Decay":
        gate = g.exp()[..., None]
        later = torch.ones(g.shape[1], g.shape[1], dtype=g.dtype, device=g.device).tril(-1)
        between = torch.addcmul(1 - later, gate, later).cumprod(1).tril_()
        return Decay(between, between[:, :, :1] * gate[:, :1])


def gradient_of_gates(between: Tensor, since: Tensor, until: Tensor, whole: Tensor) -> Tensor:
    """The gradient of g `[B, C]` from those of the logarithms of its decays, `[B, C, C]`, `[B, C]`, `[B, C]`, `[B]`."""
    B, C = since.shape
    since[:, -1] += whole
    # since is the first gate and the first column of between, until the last row
    between[:, :, 0] += since
    between[:, -1] += until
    ones = torch.ones(C, C, dtype=since.dtype, device=since.device)
    passed = ones.tril()[:, None] * ones.triu(1)  # j < s <= i, by [i, j, s]
    d_g = torch.mm(between.view(B, C * C), passed.view(C * C, C))
    d_g[:, 0] += since.sum(1)
    return d_g


class DeltaScan(torch.autograd.Function):
    """See `delta_scan`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        S: Tensor,
        places: Places,
        groups: list[list[int]],
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.places, ctx.groups, ctx.scale = places, groups, scale
        S, output = S.clone(), places.room(v)
        kept: list[Tensor] = []
        for rows, counts in spans(groups):
            q_, k_, v_, g_, beta_ = (places.take(x, rows) for x in (q, k, v, g, beta))
            decay, y = Decay.of(g_), k_ * beta_[..., None]
            pairs_q = torch.bmm(q_, y.mT).mul_(decay.between)
            pairs_k = torch.bmm(k_, y.mT).mul_(decay.between)
            inverse = invert(pairs_k)

            starts, F = S.new_empty(len(y), *S.shape[1:]), torch.empty_like(v_)
            columns = starts, F, decay.whole, k_ * decay.since, v_, inverse, (y * decay.until).mT
            for start, f, whole, k_t, v_t, inverse_t, y_t in steps(columns, counts):
                alive = S[: len(f)]
                start.copy_(alive)
                torch.bmm(inverse_t, torch.baddbmm(v_t, k_t, start, alpha=-1), out=f)
                alive.mul_(whole).baddbmm_(y_t, f)

            inside = torch.bmm(pairs_q, F)
            places.put(inside.baddbmm_(q_ * decay.since, starts, beta=scale, alpha=scale), rows, output)
            if keep:
                kept += [decay.between, decay.since, pairs_q, pairs_k, inverse, starts, F]
        ctx.save_for_backward(q, k, g, beta, *kept)
        # a view would forbid callers to change the output in place
        return output[: len(v)].clone() if places.gaps else output, S

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        places, groups = ctx.places, ctx.groups
        q, k, g, beta, *kept = ctx.saved_tensors
        d_S = d_final.clone()
        grads = [places.room(x) for x in (q, k, d_output, g, beta)]
        for n, (rows, counts) in reversed(list(enumerate(spans(groups)))):
            between, since, pairs_q, pairs_k, inverse, starts, F = kept[7 * n : 7 * n + 7]
            q_, k_, beta_, d_o = (places.take(x, rows) for x in (q, k, beta, d_output))
            decay, y = Decay(between, since), k_ * beta_[..., None]
            d_o.mul_(ctx.scale)

            # what a state is read for in its own chunk, then what comes back to it from the next
            d_F, d_read = torch.bmm(pairs_q.mT, d_o), d_o * since
            d_starts = torch.bmm(q_.mT, d_read)
            d_ends, d_v = torch.empty_like(starts), torch.empty_like(F)
            columns = d_starts, d_ends, d_F, d_v, decay.whole, (k_ * since).mT, inverse.mT, y * decay.until
            for d_start, d_end, d_f, d_z, whole, k_t, inverse_t, y_t in reversed(list(steps(columns, counts))):
                alive = d_S[: len(d_f)]
                d_end.copy_(alive)
                torch.bmm(inverse_t, d_f.baddbmm_(y_t, d_end), out=d_z)
                torch.addcmul(d_start, whole, d_end, out=alive).baddbmm_(k_t, d_z, alpha=-1)

            d_q = torch.bmm(d_read, starts.mT)
            d_k = torch.bmm(d_v, starts.mT).mul_(-since)
            d_y = torch.bmm(F, d_ends.mT).mul_(decay.until)
            d_pairs_q = torch.bmm(d_o, F.mT)
            d_pairs_k = torch.bmm(d_v, F.mT).tril_(-1)
            d_g = torch.zeros_like(beta_)  # unless it is asked for
            if ctx.needs_input_grad[3]:
                d_between = (d_pairs_q * pairs_q).addcmul_(d_pairs_k, pairs_k, value=-1)
                d_since = (q_ * d_q).addcmul_(k_, d_k).sum(-1)
                d_whole = vecdot(starts.flatten(1), d_ends.flatten(1)) * decay.whole.flatten()
                d_g = gradient_of_gates(d_between, d_since, vecdot(y, d_y), d_whole)
            d_pairs_q.mul_(between)
            d_pairs_k.mul_(between)
            d_q.baddbmm_(d_pairs_q, y)
            d_y.baddbmm_(d_pairs_q.mT, q_).baddbmm_(d_pairs_k.mT, k_, alpha=-1)
            d_k.baddbmm_(d_pairs_k, y, alpha=-1).addcmul_(d_y, beta_[..., None])
            for x, room in zip((d_q, d_k, d_v, d_g, vecdot(k_, d_y)), grads, strict=True):
                places.put(x, rows, room)
        return *(room[: len(q)] for room in grads), d_S, None, None, None, None


def steps(columns: tuple[Tensor, ...], counts: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each chunk time."""
    return zip(*(x.split(counts) for x in columns), strict=True)


def spans(groups: list[list[int]]) -> list[tuple[slice, list[int]]]:
    """Each group with the range of its rows."""
    ends = [0, *accumulate(map(sum, groups))]
    return [(slice(*span), counts) for span, counts in zip(pairwise(ends), groups, strict=True)]


def delta_scan(x: Inputs, S: Tensor, places: Places, groups: list[list[int]], scale: float) -> tuple[Tensor, Tensor]:
    """S_t = e^g S, then S += beta k (v - S^T k)^T, o = scale q^T S, for rows (token, head) that go to `places`.

    x: q, k `[T, H, K]`, v `[T, H, V]`, beta and, unless nothing decays, g `[T, H]`. S `[lanes, K, V]`. places.there
    `[B, C]`. groups: the lanes alive at each chunk time. Returns the output `[T, H, V]` and the final S.
    Differentiable once.
    """
    beta = x["beta"]
    g = x.get("g", torch.zeros_like(beta))
    rows = [tensor.flatten(0, 1) for tensor in (x["q"], x["k"], x["v"], g, beta)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, S))
    output, final = DeltaScan.apply(*rows, S, places, groups, scale, keep)  # type: ignore[no-untyped-call]
    return output.view(x["v"].shape), final
