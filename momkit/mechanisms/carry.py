"""What is sequential in a chunked scan: solving inside a chunk for the erases, and carrying states across chunks.

Both are autograd functions of their own, because their gradients are shorter than what autograd would record.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient in the dtypes of its forward, though `backward()` be called under autocast."""

    @wraps(backward)
    def plain(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return plain


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient that has none itself, and says so when it is asked for one: RuntimeError under `create_graph=True`."""

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("backend 'chunked' can be differentiated once; 'reference' any number of times")
        return backward(ctx, *grads)

    return without_autocast(once)


# unit triangular blocks of at most this size go to the library solver
SOLVED = 32


class UnitLowerInverse(torch.autograd.Function):
    """See `unit_lower_inverse`."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        inverse = invert(A)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return torch.bmm(inverse.mT, torch.bmm(grad, inverse.mT)).tril(-1).neg()


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + strictly lower part of A)^-1, `[B, C, C]`."""
    inverse: Tensor = UnitLowerInverse.apply(A)  # type: ignore[no-untyped-call]
    return inverse


def invert(A: Tensor) -> Tensor:
    """(I + strictly lower part of A)^-1, transposed in memory where small; else in halves: the inverse of
    [[P, 0], [X, Q]] is [[P^-1, 0], [-Q^-1 X P^-1, Q^-1]]."""
    C = A.shape[-1]
    if C <= SOLVED:
        # from the right, and of a contiguous matrix: half the time of the same from the left, and as exact
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        solved: Tensor = torch.linalg.solve_triangular(A.contiguous(), eye, upper=False, left=False, unitriangular=True)
        return solved
    h = C // 2
    first, second = invert(A[:, :h, :h]), invert(A[:, h:, h:])
    inverse = A.new_zeros(A.shape)
    inverse[:, :h, :h] = first
    inverse[:, h:, h:] = second
    inverse[:, h:, :h] = torch.bmm(second, torch.bmm(A[:, h:, :h], first)).neg_()
    return inverse


# tensors of chunks `[rows, ...]` that describe erases, or None for each
Erase = tuple[Tensor | None, ...]


class Carry(torch.autograd.Function):
    """See `carry`."""

    @staticmethod
    def forward(
        ctx: Any,
        S: Tensor,
        whole: Tensor,
        counts: list[int],
        write: Tensor | None,
        V: Tensor | None,
        K: Tensor | None,
        T: Tensor | None,
        B: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        starts = S.new_empty(len(whole), *S.shape[1:])
        Z, E = (None, None) if V is None else (V.clone(), torch.empty_like(V))
        final = walk(S, whole, counts, starts, write, (Z, K, T, transposed(B), E))
        ctx.save_for_backward(starts, whole, Z, E, K, T, B)
        ctx.counts = counts
        return starts, E, final

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_starts: Tensor, d_E: Tensor | None, d_final: Tensor) -> tuple[Tensor | None, ...]:
        starts, whole, Z, E, K, T, B = ctx.saved_tensors
        d_next = torch.empty_like(starts)
        d_write_E, d_Z = (None, None) if d_E is None or E is None else (d_E.clone(), torch.empty_like(E))
        erase = d_write_E, transposed(K), transposed(T), B, d_Z
        d_S = walk_back(d_final, whole, ctx.counts, d_starts, d_next, erase)
        d_whole = dot_to_size(starts, d_next, whole.shape) if ctx.needs_input_grad[1] else None
        d_write = d_next if ctx.needs_input_grad[3] else None
        if E is None or d_Z is None or d_write_E is None:
            return d_S, d_whole, None, d_write, None, None, None, None
        d_K = torch.baddbmm(K, d_Z, starts.mT, beta=0, alpha=-1)
        d_T, d_B = torch.bmm(d_write_E, Z.mT), torch.bmm(E, d_next.mT)
        return d_S, d_whole, None, d_write, d_Z, d_K, d_T, d_B


def walk(S: Tensor, whole: Tensor, counts: list[int], starts: Tensor, write: Tensor | None, erase: Erase) -> Tensor:
    """`carry` in place: fills starts and, in erase = (Z, K, T, B^T, E), E; turns Z = V to V - K S; returns final S."""
    Zs, Ks, Ts, Bs, Es, writes = (split(x, counts) for x in (*erase, write))
    states, wholes = starts.split(counts), whole.split(counts)
    retired: list[Tensor] = []
    states[0].copy_(S)
    for t, (start, alive) in enumerate(zip(states, [*counts[1:], 0], strict=True)):
        after = states[t + 1] if alive == counts[t] else torch.empty_like(start)
        torch.mul(start, wholes[t], out=after)
        if writes:
            after.add_(writes[t])
        if Zs:
            Zs[t].baddbmm_(Ks[t], start, alpha=-1)
            after.baddbmm_(Bs[t], torch.bmm(Ts[t], Zs[t], out=Es[t]))
        if alive < counts[t]:
            retired.append(after[alive:])
            if alive:
                states[t + 1].copy_(after[:alive])
    return torch.cat(retired[::-1])


def walk_back(
    d_final: Tensor, whole: Tensor, counts: list[int], d_starts: Tensor, d_next: Tensor, erase: Erase
) -> Tensor:
    """The gradient of `walk`, in place: fills d_next, of the state after each chunk, and, of erase = (d_E, K^T, T^T, B,
    d_Z), d_Z, adds to d_E what later chunks ask for, returns the gradient of S."""
    d_Es, Ks, Ts, Bs, d_Zs = (split(x, counts) for x in erase)
    d_after, d_start, wholes = d_next.split(counts), d_starts.split(counts), whole.split(counts)
    # lanes that drop out after a chunk time come in there with the gradient of their final state
    for at, count, alive in zip(d_after, counts, [*counts[1:], 0], strict=True):
        if alive < count:
            at[alive:] = d_final[alive:count]
    d_S = torch.empty_like(d_final)
    for t in reversed(range(len(counts))):
        before = d_after[t - 1][: counts[t]] if t else d_S
        torch.addcmul(d_start[t], wholes[t], d_after[t], out=before)
        if d_Zs:
            d_Es[t].baddbmm_(Bs[t], d_after[t])
            before.baddbmm_(Ks[t], torch.bmm(Ts[t], d_Es[t], out=d_Zs[t]), alpha=-1)
    return d_S


def dot_to_size(x: Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    """(x * y).sum_to_size(shape); where whole matrices meet, over flat rows, which is quicker."""
    if shape[1:] == (1, 1):
        return (x * y).flatten(1).sum(1)[:, None, None]
    return (x * y).sum_to_size(shape)


def transposed(x: Tensor | None) -> Tensor | None:
    """Each matrix transposed, nothing for nothing."""
    return None if x is None else x.mT


def split(x: Tensor | None, counts: list[int]) -> tuple[Tensor, ...]:
    """The rows of each chunk time, nothing for nothing."""
    return () if x is None else x.split(counts)


def carry(
    S: Tensor,
    whole: Tensor,
    counts: list[int],
    write: Tensor | None = None,
    erase: Erase = (None, None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """States from chunk to chunk: S_{t+1} = whole_t S_t + write_t + B_t^T E_t, E_t = T_t (V_t - K_t S_t).

    erase is (V, K, T, B). What the state holds is taken off V before T, which is ill-conditioned when keys are
    alike, is applied.
    S `[lanes, K, V]`; the others hold `counts[0]` rows for chunk time 0, then `counts[1]` for time 1, ... as lanes drop
    out from the end: whole `[rows, K or 1, V or 1]`, write `[rows, K, V]`, V `[rows, C, V]`, K, B `[rows, C, K]`,
    T `[rows, C, C]`. Returns the state at the start of each chunk `[rows, K, V]`, E `[rows, C, V]` (None without
    erases), final states.
    """
    starts, E, final = Carry.apply(S, whole, counts, write, *erase)  # type: ignore[no-untyped-call]
    return starts, E, final
