"""Tiles of packed tensors, as every kernel reads and writes them, and the sum over heads that share keys."""

import triton
import triton.language as tl
from torch import Tensor

# an interpreter has no caches
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def load_tile(base, rows, live, cols, STRIDE: tl.constexpr, WIDTH, EXACT: tl.constexpr):
    """Rows `[C, cols]` of a packed tensor, zeros where no token or no column is."""
    mask = live[:, None] if EXACT else live[:, None] & (cols < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * STRIDE + cols[None, :], mask=mask, other=0.0)


@triton.jit
def fetch_tile(base, rows, last, first, WIDE: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Have the L2 cache fetch rows `[C, WIDE]` of a packed tensor, up to row `last`, from column `first` on.

    Nothing waits for it: a load that comes later finds there what it would have waited for.
    """
    if COMPILED:
        LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
        cols = tl.minimum(first + tl.arange(0, (WIDE + LINE - 1) // LINE) * LINE, WIDTH - 1)
        lines = base + tl.minimum(rows, last)[:, None] * STRIDE + cols[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )


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
