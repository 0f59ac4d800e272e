"""What a block is given, in the one form it works on: packed tokens, bounds of sequences, mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.checks import FLOATS, check_cu_seqlens, check_finite, check_mask
from momkit.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """x: `[T, D]`, zeros where masked. cu_seqlens: `[B + 1]`. mask: `[T]` bool or None. shape: what `restore` gives."""

    x: Tensor
    cu_seqlens: Tensor
    mask: Tensor | None
    shape: torch.Size

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, hidden_size: int) -> "Tokens":
        """From `[B, T, D]` with an optional mask `[B, T]`, or `[T, D]` or `[1, T, D]` with optional cu_seqlens."""
        check_hidden_states(x, hidden_size)
        if x.ndim not in (2, 3):
            raise InputError(f"x has shape {tuple(x.shape)}; allowed: [B, T, D], or packed [T, D]")
        check_finite(x, "x")
        packed = x.reshape(-1, hidden_size)
        if cu_seqlens is None:
            num_sequences, length = (1, len(x)) if x.ndim == 2 else x.shape[:2]
            cu_seqlens = torch.arange(num_sequences + 1, device=x.device) * length
        else:
            if x.ndim == 3 and len(x) != 1:
                raise InputError(f"x has B = {len(x)} with cu_seqlens; allowed: packed [T, D], or B = 1")
            check_cu_seqlens(cu_seqlens, len(packed), x.device)
        if mask is not None:
            mask = check_mask(mask, x.shape[:-1], x.device)
            packed = torch.where(mask[:, None], packed, 0.0)
        return Tokens(packed, cu_seqlens, mask, x.shape)

    def restore(self, y: Tensor) -> Tensor:
        """`[T, D]` back in the shape that was given."""
        return y.view(self.shape)


def check_hidden_states(x: Tensor, hidden_size: int) -> None:
    """Type and width of hidden states."""
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; allowed: float32, float64, bfloat16, float16")
    if x.ndim < 1 or x.shape[-1] != hidden_size:
        raise InputError(f"x has shape {tuple(x.shape)}; its last axis must be hidden_size = {hidden_size}")
