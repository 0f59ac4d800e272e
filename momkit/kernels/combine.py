"""From slots back to tokens: weighted sum over a token's memories, RMSNorm of each head, gate.

    o_t = sum_j w_tj slot(t, j) (+ slot of the shared memory)
    y_t = o_t / rms(o_t) * weight * silu(gate_t)

A program takes the heads of a few tokens side by side and adds up their slots in the order of j, in fp32. Backward
finds o_t again instead of keeping it; every slot belongs to one choice of one token, which alone writes its gradient.

Letters: T tokens, J slots a token, R = T * J slots, H heads, V value dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.tiles import load_tile, store_tile
from momkit.kernels.tuning import multiprocessors, padded

# elements of a program's tile, unless one head has more, and of what one warp holds at most, forward and backward
TILE = 2048
SHARE = 512
BACKWARD_SHARE = 256
# programs of the backward pass on each multiprocessor, at most: each leaves a part of the gradient of the norm's weight
OCCUPANCY = 4


def combine_norm(
    slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, norm_weight: Tensor, gate: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """Combine slots, normalise each head and gate: `[T, H, V]` in the dtype of slots; differentiable.

    slots: `[R, H, V]` bf16, fp16 or fp32. token_slot: `[T, J]` int64, each of the R slots once; where J is one more
    than the columns of `weights` `[T, J or J - 1]` fp32, the last is the shared memory's and has weight one. mask:
    `[T]` bool; tokens where it is False come out as zeros and pass no gradient, whatever they hold. norm_weight: `[V]`.
    gate: `[T, H, V]`. Raises BackendError for other dtypes of slots and weights.
    """
    return forward(slots, token_slot, weights, mask, norm_weight, gate, eps)[0]


class Tiling(NamedTuple):
    """tokens and heads of a program's tile, columns that hold V."""

    tokens: int
    heads: int
    columns: int

    @staticmethod
    def of(H: int, V: int) -> "Tiling":
        columns = padded(V)
        heads = min(triton.next_power_of_2(H), max(1, TILE // columns))
        return Tiling(max(1, TILE // (columns * heads)), heads, columns)

    def num_warps(self, share: int) -> int:
        return min(16, self.tokens * self.heads * self.columns // share)


def packed(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor contiguous."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


@torch.library.custom_op("momkit::combine_norm", mutates_args=())
@compiled_together
def forward(
    slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, norm_weight: Tensor, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y `[T, H, V]`, and for the backward pass 1 / rms `[T, H]` float32, 1 for tokens that are masked."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    if slots.dtype not in narrow or weights.dtype != torch.float32:
        raise BackendError(
            f"combine_norm got slots in {slots.dtype} and weights in {weights.dtype}; "
            f"allowed: bfloat16, float16 or float32 slots, float32 weights"
        )
    (T, J), (H, V) = token_slot.shape, slots.shape[1:]
    tiling = Tiling.of(H, V)
    y, rstd = slots.new_empty((T, H, V)), weights.new_empty((T, H))
    launch(
        combine_kernel, cdiv(T, tiling.tokens) * cdiv(H, tiling.heads),
        (*packed(slots, token_slot, weights, mask, norm_weight, gate), y, rstd), (T, eps),
        J, weights.shape[1], H, V, *tiling, tiling.columns == V,
        num_warps=tiling.num_warps(SHARE),
    )  # fmt: skip
    return y, rstd


@forward.register_fake
def _(
    slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, norm_weight: Tensor, gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, _), (H, V) = token_slot.shape, slots.shape[1:]
    return slots.new_empty((T, H, V)), weights.new_empty((T, H))


@torch.library.custom_op("momkit::combine_norm_backward", mutates_args=())
@compiled_together
def backward(
    slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, norm_weight: Tensor, gate: Tensor | None,
    rstd: Tensor, dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of slots, weights, norm_weight and gate (empty if there is none)."""
    (T, J), (H, V) = token_slot.shape, slots.shape[1:]
    tiling = Tiling.of(H, V)
    programs = min(cdiv(T, tiling.tokens), OCCUPANCY * multiprocessors(slots.device))
    d_slots, d_weights = slots.new_empty(slots.shape), weights.new_empty(weights.shape)
    d_gate = slots.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    parts = rstd.new_empty((programs, V))
    launch(
        combine_backward_kernel, programs,
        (*packed(slots, token_slot, weights, mask, norm_weight, gate, rstd, dy), d_slots, d_weights, d_gate, parts),
        (T, programs),
        J, weights.shape[1], H, V, *tiling, tiling.columns == V,
        num_warps=tiling.num_warps(BACKWARD_SHARE),
    )  # fmt: skip
    return d_slots, d_weights, parts.sum(0).to(norm_weight.dtype), d_gate


@backward.register_fake
def _(
    slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None, norm_weight: Tensor, gate: Tensor | None,
    rstd: Tensor, dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_gate = slots.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return (
        slots.new_empty(slots.shape),
        weights.new_empty(weights.shape),
        norm_weight.new_empty(norm_weight.shape),
        d_gate,
    )


def setup_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, dy, _):
    d_slots, d_weights, d_norm_weight, d_gate = backward(*ctx.saved_tensors, dy)
    gated = ctx.saved_tensors[5] is not None
    return d_slots, None, d_weights, None, d_norm_weight, d_gate if gated else None, None


forward.register_autograd(differentiate, setup_context=setup_context)


@triton.jit
def tile_rows(mask, block, first, T, H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Rows of a tile, heads fastest: token, head, row in the block of tokens, whether it is one and is not masked."""
    place = tl.arange(0, TOKENS * HEADS)
    token, head = block * TOKENS + place // HEADS, first + place % HEADS
    inside = (token < T) & (head < H)
    live = inside
    if mask is not None:
        live = live & (tl.load(mask + token, mask=live, other=0) != 0)
    return token, head, place // HEADS * H + head, inside, live


@triton.jit
def load_rows(base, row, live, cols, V: tl.constexpr, EXACT: tl.constexpr):
    """Rows `[rows, cols]` of a tensor `[..., V]`, float32, zeros where a row is not live."""
    return load_tile(base, row, live, cols, V, V, EXACT).to(tl.float32)


@triton.jit
def slot_row(token_slot, token, head, inside, j, J: tl.constexpr, H: tl.constexpr):
    """The row, in slots `[R * H, V]`, of choice j of each row's token."""
    return tl.load(token_slot + token * J + j, mask=inside, other=0) * H + head


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z), without an overflow on the way."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1.0 + small)


@triton.jit
def mix_slots(
    slots, token_slot, weights, token, head, live, cols,
    J: tl.constexpr, WEIGHTED: tl.constexpr, H: tl.constexpr, V: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """o of each row, added up in the order of j; zeros where a row is not live."""
    mixed = tl.zeros([token.shape[0], cols.shape[0]], tl.float32)
    for j in tl.static_range(J):
        picked = load_rows(slots, slot_row(token_slot, token, head, live, j, J, H), live, cols, V, EXACT)
        if j < WEIGHTED:
            picked *= tl.load(weights + token * WEIGHTED + j, mask=live, other=0.0)[:, None]
        mixed += picked
    return mixed


@triton.jit(do_not_specialize=["T", "eps"])
def combine_kernel(
    slots, token_slot, weights, mask, norm_weight, gate, y, rstd, T, eps,
    J: tl.constexpr, WEIGHTED: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of y and 1 / rms: TOKENS tokens, HEADS heads."""
    HEAD_TILES: tl.constexpr = (H + HEADS - 1) // HEADS
    block, first = tl.program_id(0) // HEAD_TILES, tl.program_id(0) % HEAD_TILES * HEADS
    token, head, row, inside, live = tile_rows(mask, block, first, T, H, TOKENS, HEADS)
    start = block.to(tl.int64) * (TOKENS * H)
    cols = tl.arange(0, COLUMNS)
    x = mix_slots(slots, token_slot, weights, token, head, live, cols, J, WEIGHTED, H, V, EXACT)
    # masked rows are all zeros: if eps is 0 too, they have no 1 / rms
    inverse = tl.rsqrt(tl.where(live, tl.sum(x * x, 1) / V + eps, 1.0))
    out = x * inverse[:, None] * tl.load(norm_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        z = load_rows(gate + start * V, row, live, cols, V, EXACT)
        out *= z * sigmoid(z)
    store_tile(y + start * V, out, row, inside, cols, V, V, EXACT)
    tl.store(rstd + start + row, inverse, mask=inside)


@triton.jit(do_not_specialize=["T", "programs"])
def combine_backward_kernel(
    slots, token_slot, weights, mask, norm_weight, gate, rstd, dy, d_slots, d_weights, d_gate, parts, T, programs,
    J: tl.constexpr, WEIGHTED: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients of every programs-th block of TOKENS tokens; parts `[programs, V]`: of the norm's weight."""
    CHOICES: tl.constexpr = triton.next_power_of_2(J)
    pid = tl.program_id(0)
    cols, choices = tl.arange(0, COLUMNS), tl.arange(0, CHOICES)
    scale = tl.load(norm_weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    d_scale = tl.zeros([TOKENS * HEADS, COLUMNS], tl.float32)
    for turn in range(tl.cdiv(tl.cdiv(T, TOKENS) - pid, programs)):
        block = pid + turn * programs
        start = block.to(tl.int64) * (TOKENS * H)
        d_weight = tl.zeros([TOKENS, CHOICES], tl.float32)
        for first in range(0, H, HEADS):
            token, head, row, inside, live = tile_rows(mask, block, first, T, H, TOKENS, HEADS)
            inverse = tl.load(rstd + start + row, mask=live, other=0.0)[:, None]
            x = mix_slots(slots, token_slot, weights, token, head, live, cols, J, WEIGHTED, H, V, EXACT) * inverse
            d = load_rows(dy + start * V, row, live, cols, V, EXACT)
            if gate is not None:
                z = load_rows(gate + start * V, row, live, cols, V, EXACT)
                opening = sigmoid(z)
                dz = d * x * scale * opening * (1 + z * (1 - opening))
                store_tile(d_gate + start * V, dz, row, inside, cols, V, V, EXACT)
                d *= z * opening
            d_scale += d * x
            d *= scale
            d = inverse * (d - x * (tl.sum(d * x, 1) / V)[:, None])
            for j in range(WEIGHTED):
                source = slot_row(token_slot, token, head, inside, j, J, H)
                along = tl.sum(load_rows(slots, source, live, cols, V, EXACT) * d, 1)
                along = tl.sum(tl.reshape(along, [TOKENS, HEADS]), 1)
                d_weight += tl.where(choices[None, :] == j, along[:, None], 0.0)
                weight = tl.load(weights + token * WEIGHTED + j, mask=live, other=0.0)
                store_tile(d_slots, d * weight[:, None], source, inside, cols, V, V, EXACT)
            for j in tl.static_range(WEIGHTED, J):
                source = slot_row(token_slot, token, head, inside, j, J, H)
                store_tile(d_slots, d, source, inside, cols, V, V, EXACT)
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        spot = tokens[:, None] * WEIGHTED + choices[None, :]
        tl.store(d_weights + spot, d_weight, mask=(tokens < T)[:, None] & (choices < WEIGHTED)[None, :])
    tl.store(parts + pid * V + cols, tl.sum(d_scale, 0), mask=cols < V)
