"""What is sequential in a chunked scan: solving inside a chunk for the erases, and carrying states across chunks.

Both are autograd functions of their own, because their gradients are shorter than what autograd would record.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# unit triangular blocks of this size go to the library solver
SOLVED = 16


class UnitLowerInverse(torch.autograd.Function):
    """See `unit_lower_inverse`."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        inverse = invert(A)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -torch.bmm(inverse.mT, torch.bmm(grad, inverse.mT)).tril(-1)


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + strictly lower part of A)^-1, `[B, C, C]`."""
    inverse: Tensor = UnitLowerInverse.apply(A)
    return inverse


def invert(A: Tensor) -> Tensor:
    """Halve until small: the inverse of [[P, 0], [X, Q]] is [[P^-1, 0], [-Q^-1 X P^-1, Q^-1]]."""
    C = A.shape[-1]
    if C <= SOLVED:
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    h = C // 2
    first, second = invert(A[:, :h, :h]), invert(A[:, h:, h:])
    inverse = A.new_zeros(A.shape)
    inverse[:, :h, :h] = first
    inverse[:, h:, h:] = second
    inverse[:, h:, :h] = torch.bmm(second, torch.bmm(A[:, h:, :h], first)).neg_()
    return inverse


class Carry(torch.autograd.Function):
    """See `carry`."""

    @staticmethod
    def forward(
        ctx: Any,
        S: Tensor,
        whole: Tensor,
        counts: list[int],
        write: Tensor | None,
        U: Tensor | None,
        W: Tensor | None,
        B: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        S = S.clone()
        starts = S.new_empty(len(whole), *S.shape[1:])
        E = None if U is None else torch.empty_like(U)
        for rows in spans(counts):
            lanes = S[: rows.stop - rows.start]
            starts[rows] = lanes
            if U is not None:
                torch.baddbmm(U[rows], W[rows], lanes, alpha=-1, out=E[rows])
            lanes.mul_(whole[rows])
            if write is not None:
                lanes.add_(write[rows])
            if B is not None:
                lanes.baddbmm_(B[rows].mT, E[rows])
        ctx.save_for_backward(starts, whole, E, W, B)
        ctx.counts = counts
        return starts, E, S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_starts: Tensor, d_E: Tensor | None, d_S: Tensor) -> tuple[Tensor | None, ...]:
        starts, whole, E, W, B = ctx.saved_tensors
        d_S = d_S.clone()
        d_next = torch.empty_like(starts)
        d_U = None if E is None else torch.empty_like(E)
        for rows in reversed(spans(ctx.counts)):
            lanes = d_S[: rows.stop - rows.start]
            d_next[rows] = lanes
            if d_U is not None:
                torch.baddbmm(d_E[rows], B[rows], lanes, out=d_U[rows])
            lanes.mul_(whole[rows]).add_(d_starts[rows])
            if d_U is not None:
                lanes.baddbmm_(W[rows].mT, d_U[rows], alpha=-1)
        d_whole = (d_next * starts).sum_to_size(whole.shape) if ctx.needs_input_grad[1] else None
        d_W, d_B = (None, None) if d_U is None else (-torch.bmm(d_U, starts.mT), torch.bmm(E, d_next.mT))
        return d_S, d_whole, None, d_next if ctx.needs_input_grad[3] else None, d_U, d_W, d_B


def spans(counts: list[int]) -> list[slice]:
    """The rows of each chunk time."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def carry(
    S: Tensor,
    whole: Tensor,
    counts: list[int],
    write: Tensor | None = None,
    erase: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """States from chunk to chunk: S_{t+1} = whole_t S_t + write_t + B_t^T E_t with E_t = U_t - W_t S_t, erase = U, W, B.

    S `[lanes, K, V]`; the others hold `counts[0]` rows for chunk time 0, then `counts[1]` for time 1, ... as lanes drop
    out from the end: whole `[rows, K or 1, V or 1]`, write `[rows, K, V]`, U `[rows, C, V]`, W and B `[rows, C, K]`.
    Returns the state at the start of each chunk `[rows, K, V]`, E `[rows, C, V]` (None without erases), and final states.
    """
    starts, E, final = Carry.apply(S, whole, counts, write, *erase)
    return starts, E, final
