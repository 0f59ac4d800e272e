"""Tiles of packed tensors, as every kernel reads and writes them, and the sum over heads that share keys."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tile(base, rows, live, cols, STRIDE: tl.constexpr, WIDTH, EXACT: tl.constexpr):
    """Rows `[C, cols]` of a packed tensor, zeros where no token or no column is."""
    mask = live[:, None] if EXACT else live[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * STRIDE + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, tile, rows, live, cols, STRIDE: tl.constexpr, WIDTH, EXACT: tl.constexpr):
    """Write rows `[C, cols]` of a packed tensor, in its dtype."""
    mask = live[:, None] if EXACT else live[:, None] & (cols < WIDTH)[None, :]
    tl.store(base + rows[:, None] * STRIDE + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)


def sum_groups(wide: Tensor, narrow: Tensor) -> Tensor:
    """`[T, H, K]` summed to the key heads that the heads read: `[T, G, K]` in the dtype of `narrow`."""
    if wide.shape == narrow.shape:
        return wide.to(narrow.dtype)
    T, G, K = narrow.shape
    return wide.view(T, G, wide.shape[1] // G, K).sum(2).to(narrow.dtype)
