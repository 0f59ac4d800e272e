"""The chunked scan of the delta rules that decay by head, as one function with a gradient of its own.

Token j writes y_j = beta_j k_j times f_j = v_j - (what k_j reads), so that inside a chunk

    (I + P_k) F = V - K' S        O = scale (P_q F + Q' S)        next S = whole S + Y'^T F

where P_x,ij = (decay from j to i) x_i . y_j, K' and Q' are decayed since the chunk began, Y' until it ends. What the
state holds is taken off V before the system, ill-conditioned when keys are alike, is solved. Keys and queries read
alike, so they go through matrix products together. Groups of chunks are small enough to stay in cache. The gradient
keeps what is costly, and computes again what is cheap.

Letters: B chunks times heads, C tokens of a chunk, K key dim, V value dim.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from momkit.mechanisms.base import Inputs
from momkit.mechanisms.carry import differentiable_once, invert, walk, walk_back
from momkit.mechanisms.chunk_layout import Places, spans

Cut = tuple[Places, list[list[int]], float]  # where tokens go, lanes alive at each chunk time by group, scale
TOGETHER = 4  # groups in one piece of memory


class Decay(NamedTuple):
    """Decays under one gate a token, as products of gates, exact from one to zero.

    between: `[B, C, C]`, from token j to token i, zero for j > i. since, until: `[B, C, 1]`, since the chunk began and
    until it ends. whole: `[B, 1, 1]`, of the whole chunk.
    """

    between: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor

    def rows(self, some: slice) -> "Decay":
        return Decay(*(part[some] for part in self))

    @staticmethod
    def of(g: Tensor) -> "Decay":
        """Under the gates g `[B, C]`."""
        gate = g.exp()[..., None]
        later = torch.ones(g.shape[1], g.shape[1], dtype=g.dtype, device=g.device).tril(-1)
        between = torch.addcmul(1 - later, gate, later).cumprod(1).tril_()
        since = between[:, :, :1] * gate[:, :1]
        return Decay(between, since, between[:, -1, :, None], since[:, -1:])


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


class Kept(NamedTuple):
    """What is kept of a group: keys, then queries `[B, 2, C, K]`; P_k, then P_q `[B, 2, C, C]`; (I + P_k)^-1
    `[B, C, C]`; the states that chunks start from `[B, K, V]`; F `[B, C, V]`."""

    x: Tensor
    pairs: Tensor
    inverse: Tensor
    starts: Tensor
    F: Tensor

    @staticmethod
    def rooms(S: Tensor, C: int, sizes: list[int]) -> "list[Kept]":
        """Room for groups of so many chunks. A few groups share one piece of memory: pieces of middling size go back to
        the system whenever they are freed, and to get them again takes longer than to fill them."""
        K, V = S.shape[1:]
        shapes = (2, C, K), (2, C, C), (C, C), (K, V), (C, V)
        each = [math.prod(shape) for shape in shapes]
        rooms: list[Kept] = []
        for some in (sizes[i : i + TOGETHER] for i in range(0, len(sizes), TOGETHER)):
            for B, piece in zip(some, S.new_empty(sum(some), sum(each)).split(some), strict=True):
                parts = piece.flatten().split([B * n for n in each])
                room = Kept(*(part.view(B, *shape) for part, shape in zip(parts, shapes, strict=True)))
                rooms.append(room._replace(inverse=room.inverse.mT))  # as `invert` returns it
        return rooms


def forward_chunks(
    kept: Kept, v: Tensor, decay: Decay, beta: Tensor, S: Tensor, counts: list[int], scale: float
) -> Tensor:
    """scale (P_q F + Q' S) of a group of chunks whose `kept.x` is there; fills what else is kept, and moves S on."""
    x, pairs, inverse, starts, F = kept
    y = x[:, 0] * beta
    torch.bmm(x.flatten(1, 2), y.mT, out=pairs.flatten(1, 2))
    pairs.mul_(decay.between[:, None])
    inverse.copy_(invert(pairs[:, 0]))
    read_k, read_q = (x * decay.since[:, None]).unbind(1)
    S.copy_(walk(S, decay.whole, counts, starts, None, (v, read_k, inverse, (y * decay.until).mT, F)))
    return torch.bmm(pairs[:, 1], F).baddbmm_(read_q, starts, beta=scale, alpha=scale)


def backward_chunks(
    kept: Kept, d_reads: Tensor, decay: Decay, beta: Tensor, d_S: Tensor, counts: list[int], gates: bool
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, beta and, if `gates`, of g, in a group of chunks; moves d_S back.

    d_reads `[B, 2, C, V]`: of what queries read, in [:, 1]; that of what keys read is minus the gradient of v.
    """
    x, pairs, inverse, starts, F = kept
    (k, q), (d_k_reads, d_q_reads) = x.unbind(1), d_reads.unbind(1)
    y = k * beta
    d_F, d_starts = torch.bmm(pairs[:, 1].mT, d_q_reads), torch.bmm(q.mT, d_q_reads * decay.since)
    d_ends, d_v = torch.empty_like(starts), torch.empty_like(F)
    erase = d_F, (k * decay.since).mT, inverse.mT, y * decay.until, d_v
    d_S.copy_(walk_back(d_S, decay.whole, counts, d_starts, d_ends, erase))

    torch.neg(d_v, out=d_k_reads)
    d_reads = d_reads.flatten(1, 2)
    d_x = torch.bmm(d_reads, starts.mT).view_as(x).mul_(decay.since[:, None])
    d_y = torch.bmm(F, d_ends.mT).mul_(decay.until)
    d_pairs = torch.bmm(d_reads, F.mT).view_as(pairs)
    d_pairs[:, 0].diagonal(dim1=1, dim2=2).zero_()
    if gates:
        d_between = (d_pairs[:, 0] * pairs[:, 0]).addcmul_(d_pairs[:, 1], pairs[:, 1])
        d_whole = vecdot(starts.flatten(1), d_ends.flatten(1)) * decay.whole.flatten()
        d_g = gradient_of_gates(d_between, vecdot(x, d_x).sum(1), vecdot(y, d_y), d_whole)
    d_pairs = d_pairs.mul_(decay.between[:, None]).flatten(1, 2)
    d_x.flatten(1, 2).baddbmm_(d_pairs, y)
    d_y.baddbmm_(d_pairs.mT, x.flatten(1, 2))
    return d_x[:, 1], d_x[:, 0].addcmul_(d_y, beta), d_v, vecdot(k, d_y), *([d_g] if gates else [])


class DeltaScan(torch.autograd.Function):
    """See `delta_scan`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor, cut: Cut, keep: bool
    ) -> tuple[Tensor, Tensor]:
        places, groups, scale = ctx.cut = cut
        S, output = S.clone(), places.room(v)
        beta = places.take(beta)[..., None]
        every = Decay.of(places.take(g)) if keep else None
        C, sizes = places.there.shape[1], [sum(counts) for counts in groups]
        rooms = Kept.rooms(S, C, sizes if keep else [max(sizes)])
        for n, (rows, counts) in enumerate(spans(groups)):
            kept = rooms[n] if keep else Kept(*(room[: sizes[n]] for room in rooms[0]))
            places.take(k, rows, kept.x[:, 0])
            places.take(q, rows, kept.x[:, 1])
            decay = Decay.of(places.take(g, rows)) if every is None else every.rows(rows)
            alive = S[: counts[0]]
            read = forward_chunks(kept, places.take(v, rows), decay, beta[rows], alive, counts, scale)
            places.put(read, rows, output)
        if every is not None:
            ctx.save_for_backward(beta, *every, *(tensor for kept in rooms for tensor in kept))
        # a view would forbid callers to change the output in place
        return output[: len(v)].clone() if places.gaps else output, S

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        places, groups, scale = ctx.cut
        beta, *saved = ctx.saved_tensors
        decay, rooms = Decay(*saved[:4]), [Kept(*saved[i : i + 5]) for i in range(4, len(saved), 5)]
        d_S, gates = d_final.clone(), ctx.needs_input_grad[4]
        key, head = rooms[0].x[:, 0, 0], beta[:, 0, 0]
        grads = [places.room(like) for like in (key, key, d_output, head, *([head] if gates else []))]
        for (rows, counts), kept in reversed(list(zip(spans(groups), rooms, strict=True))):
            d_reads = d_output.new_empty(*kept.x.shape[:3], d_output.shape[1])
            places.take(d_output, rows, d_reads[:, 1]).mul_(scale)
            alive = d_S[: counts[0]]
            found = backward_chunks(kept, d_reads, decay.rows(rows), beta[rows], alive, counts, gates)
            for grad, room in zip(found, grads, strict=True):
                places.put(grad, rows, room)
        d_q, d_k, d_v, d_beta, *d_g = (room[: len(places.back)] for room in grads)
        return d_q, d_k, d_v, d_beta, *(d_g or [None]), d_S, None, None


def delta_scan(x: Inputs, S: Tensor, places: Places, groups: list[list[int]], scale: float) -> tuple[Tensor, Tensor]:
    """S_t = e^g S, then S += beta k (v - S^T k)^T, o = scale q^T S, for rows (token, head) that go to `places`.

    x: q, k `[T, H, K]`, v `[T, H, V]`, beta and, unless nothing decays, g `[T, H]`. S `[lanes, K, V]`. places.there
    `[B, C]`. groups: the lanes alive at each chunk time. Returns the output `[T, H, V]` and the final S.
    Differentiable once.
    """
    beta = x["beta"]
    g = x.get("g", torch.zeros_like(beta))
    rows = [tensor.flatten(0, 1) for tensor in (x["q"], x["k"], x["v"], beta, g)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, S))
    output, final = DeltaScan.apply(*rows, S, (places, groups, scale), keep)  # type: ignore[no-untyped-call]
    return output.view(x["v"].shape), final
