"""Linear maps of one decoding step: y_s = W_m x_b for slot s of row b, m the memory it goes to.

A program takes a memory and a few output columns, and walks over all slots. It finds those of its memory on the
device, in windows; their rows of x, 16 or more, meet the tile of the weight in one product. So no slot is sorted, and
a weight is read once by a small batch, once every 64 rows or so by a large one.

Letters: B rows, J slots of a row, S = B J slots in the order of (row, choice), M memories, D input, N output width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.kernels.launch import cdiv, launch
from momkit.kernels.tiles import load_tile


class Tile(NamedTuple):
    """Slots among which a program looks for its own at a time, rows of a product, output columns, bytes along D that
    it contracts at a time, and launch options."""

    window: int
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# by the most slots that a row of this table serves: few need many programs, that all of the GPU reads weights
TILES = {
    32: Tile(32, 16, 16, 256, 4, 6),
    256: Tile(128, 16, 32, 256, 4, 4),
    2**31: Tile(256, 64, 64, 128, 8, 4),
}


@torch.library.custom_op("momkit::step_linear", mutates_args=())
def step_linear(x: Tensor, weight: Tensor, memory_ids: Tensor | None, wide: bool) -> Tensor:
    """y_{bj} = W_{memory_ids[b, j]} x_b for each slot: `[B * J, N]`, float32 if wide, else in the dtype of x.

    x `[B, D]`, weight `[M, N, D]` of one dtype, bf16, fp16 or fp32; memory_ids `[B, J]` int64 from 0 to M - 1, or None:
    one weight for all rows, M = J = 1. Sums are float32. It gives no gradients.
    """
    (B, D), (M, N, _) = x.shape, weight.shape
    J = 1 if memory_ids is None else memory_ids.shape[1]
    y = x.new_empty((B * J, N), dtype=torch.float32 if wide else x.dtype)
    tile = next(tile for most, tile in TILES.items() if most >= B * J)
    launch(
        step_linear_kernel, M * cdiv(N, tile.columns) if B * J else 0,
        (x.contiguous(), weight.contiguous(), None if memory_ids is None else memory_ids.contiguous(), y), (B * J, J),
        D, N, *tile[:3], tile.depth // x.element_size(), "tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


@step_linear.register_fake
def _(x: Tensor, weight: Tensor, memory_ids: Tensor | None, wide: bool) -> Tensor:
    slots = x.shape[0] * (1 if memory_ids is None else memory_ids.shape[1])
    return x.new_empty((slots, weight.shape[1]), dtype=torch.float32 if wide else x.dtype)


@triton.jit(do_not_specialize=["S", "J"])
def step_linear_kernel(
    x, weight, memory_ids, y, S, J,
    D: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x `[B, D]`, weight `[M, N, D]`, memory_ids `[S]`, y `[S, N]`; one program a (memory, BN columns)."""
    TILES: tl.constexpr = (N + BN - 1) // BN
    memory = tl.program_id(0) // TILES
    columns = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
    map = weight + memory.to(tl.int64) * (N * D)
    for start in range(0, S, WINDOW):
        slots = start + tl.arange(0, WINDOW)
        mine = slots < S
        if memory_ids is not None:
            mine = mine & (tl.load(memory_ids + slots, mask=mine, other=-1) == memory)
        found = tl.sum(mine.to(tl.int32), 0)
        # the place of each among those found
        place = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
        for first in range(0, found, BS):
            wanted = first + tl.arange(0, BS)
            live = wanted < found
            slot = tl.sum(tl.where(wanted[:, None] == place[None, :], slots[None, :], 0), 1)
            sums = tl.zeros([BS, BN], tl.float32)
            for d in range(0, D, BD):
                depth = d + tl.arange(0, BD)
                b_x = load_tile(x, slot // J, live, depth, D, D, D % BD == 0)
                b_w = load_tile(map, columns, columns < N, depth, D, D, D % BD == 0)
                sums = tl.dot(b_x, tl.trans(b_w), sums, input_precision=PRECISION)
            inside = live[:, None] & (columns < N)[None, :]
            to = y + slot.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(to, sums.to(y.dtype.element_ty), mask=inside)
