"""All linear maps of one decoding step in one launch: y_b = W x_b for row b, y_s = W_m x_b for its slot in memory m.

A program takes a weight, a memory and a few output columns, and walks over all slots. It finds those of its memory on
the device, in windows; their rows of x, 16 or more, meet the tile of the weight in one product. So no slot is sorted,
and a weight is read once by a small batch, once every 64 rows or so by a large one.

Letters: B rows, J slots of a row, S = B J slots in the order of (row, choice), M memories, D input, N output width.
"""

from collections.abc import Sequence
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
def step_linear(x: Tensor, weights: Sequence[Tensor], memory_ids: Tensor, shared_id: int | None) -> list[Tensor]:
    """y_b = W x_b, `[B, N]`, for each weight `[N, D]`; y_bj = W_m x_b, `[B, J, N]`, for each `[M, N, D]`.

    x `[B, D]` and weights of one dtype, bf16, fp16 or fp32. m is memory_ids[b, j], `[B, choices]` int64 from 0 to
    M - 1, and in one slot more the memory shared_id, unless it is None. Sums are float32, y is as x. It gives no
    gradients.
    """
    (B, D), choices = x.shape, memory_ids.shape[1]
    ys = outputs(x, weights, memory_ids, shared_id)
    J = choices + (shared_id is not None)
    tile = next(tile for most, tile in TILES.items() if most >= B * J)
    widths = tuple(weight.shape[-2] for weight in weights)
    memories = tuple(len(weight) if weight.ndim == 3 else 0 for weight in weights)
    programs = sum(max(1, M) * cdiv(N, tile.columns) for M, N in zip(memories, widths, strict=True))
    launch(
        step_linear_kernel, programs if B else 0,
        (x.contiguous(), memory_ids.contiguous(), tuple(weight.contiguous() for weight in weights), tuple(ys)), (B,),
        D, J, choices, shared_id or 0, widths, memories, *tile[:3], tile.depth // x.element_size(),
        "tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return ys


@step_linear.register_fake
def outputs(x: Tensor, weights: Sequence[Tensor], memory_ids: Tensor, shared_id: int | None) -> list[Tensor]:
    """y of each weight, to be filled."""
    B, J = len(x), memory_ids.shape[1] + (shared_id is not None)
    return [x.new_empty((B, J, w.shape[1]) if w.ndim == 3 else (B, w.shape[0])) for w in weights]


@triton.jit
def memory_of(memory_ids, row, choice, live, CHOICES: tl.constexpr, SHARED: tl.constexpr):
    """The memory of a row's choice; behind those of the router stands the shared memory."""
    return tl.load(memory_ids + row * CHOICES + choice, mask=live & (choice < CHOICES), other=SHARED)


@triton.jit(do_not_specialize=["B"])
def step_linear_kernel(
    x, memory_ids, weights, ys, B,
    D: tl.constexpr, J: tl.constexpr, CHOICES: tl.constexpr, SHARED: tl.constexpr,
    WIDTHS: tl.constexpr, MEMORIES: tl.constexpr, WINDOW: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a (weight, memory, BN columns). WIDTHS: N of each weight; MEMORIES: M, 0 where all rows share it."""
    pid = tl.program_id(0)
    for i in tl.static_range(len(WIDTHS)):
        tiles = (WIDTHS[i] + BN - 1) // BN
        programs = tiles * MEMORIES[i] if MEMORIES[i] > 0 else tiles
        if (pid >= 0) & (pid < programs):
            multiply(
                x, memory_ids, weights[i], ys[i], pid // tiles, pid % tiles * BN + tl.arange(0, BN), B, D,
                tl.constexpr(WIDTHS[i]), tl.constexpr(MEMORIES[i] > 0), J, CHOICES, SHARED, WINDOW, BS, BD, PRECISION,
            )  # fmt: skip
        pid -= programs


@triton.jit
def multiply(
    x, memory_ids, weight, y, memory, columns, B,
    D: tl.constexpr, N: tl.constexpr, ROUTED: tl.constexpr, J: tl.constexpr, CHOICES: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of y for all slots of a memory, or all rows if not ROUTED."""
    SLOTS: tl.constexpr = J if ROUTED else 1
    map = weight + memory.to(tl.int64) * (N * D)
    for start in range(0, B * SLOTS, WINDOW):
        slots = start + tl.arange(0, WINDOW)
        mine = slots < B * SLOTS
        if ROUTED:
            mine = mine & (memory_of(memory_ids, slots // J, slots % J, mine, CHOICES, SHARED) == memory)
        found = tl.sum(mine.to(tl.int32), 0)
        # the place of each among those found
        place = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
        for first in range(0, found, BS):
            wanted = first + tl.arange(0, BS)
            live = wanted < found
            slot = tl.sum(tl.where(wanted[:, None] == place[None, :], slots[None, :], 0), 1)
            sums = tl.zeros([BS, columns.shape[0]], tl.float32)
            for d in range(0, D, BD):
                depth = d + tl.arange(0, BD)
                b_x = load_tile(x, slot // SLOTS, live, depth, D, D, D % BD == 0)
                b_w = load_tile(map, columns, columns < N, depth, D, D, D % BD == 0)
                sums = tl.dot(b_x, tl.trans(b_w), sums, input_precision=PRECISION)
            inside = live[:, None] & (columns < N)[None, :]
            to = y + slot.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(to, sums.to(y.dtype.element_ty), mask=inside)
