"""One projection in one decoding step, after its linear map: bias, short convolution, activation, l2 norm.

The last inputs of each convolution lie in a block's state; a slot reads those of its row and memory, and moves them on
by one, in place.

Letters: B rows, J slots of a row, S = B J slots in the order of (row, choice), M memories, W conv width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, launch
from momkit.kernels.short_conv import ACTIVATIONS, activate
from momkit.kernels.tuning import padded

# channels of a program where no norm joins more
MOST_CHANNELS = 256


@torch.library.custom_op("momkit::step_conv", mutates_args=("history",))
def step_conv(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    conv_bias: Tensor | None,
    history: Tensor | None,
    memory_ids: Tensor,
    writes: Tensor | None,
    activation: str,
    norm_size: int,
) -> Tensor:
    """y = l2(act(sum_w weight_w x_{t-W+1+w} + conv_bias)), x_t = x + bias, of each slot: `[S, width]` as x.

    x: `[S, width]`, or `[B, width]` for a projection that memories share, any row stride. bias: `[M, width]`, or
    `[1, width]` for all. weight: `[width, W]`, conv_bias `[width]`; history: `[B, M, W - 1, width]`, its last two axes
    contiguous, oldest first, None where weight is: no convolution. memory_ids: `[B, J]` int64, no memory twice in a
    row. writes: `[B, J]` bool, False at slots that leave the history as it was. activation: none, silu, tanh or
    sigmoid. norm_size: l2 joins as many neighbouring channels, x / sqrt(sum x^2 + 1e-6); 0 for none. Sums are float32.
    It gives no gradients.
    Raises InputError for an unknown activation, and a history that does not fit.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation = {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if (weight is None) != (history is None):
        raise InputError("one of weight and history is None; allowed: both or neither")
    (B, J), width, groups, past = memory_ids.shape, x.shape[1], 1, 0
    if weight is not None and history is not None:
        groups, past = history.shape[1], weight.shape[1] - 1
        wanted = (B, groups, past, width)
        if history.shape != wanted or (B and not history[0, 0].is_contiguous()):
            found = f"history has shape {tuple(history.shape)}, strides {history.stride()}"
            raise InputError(f"{found}; allowed: {wanted}, the last two axes contiguous")
    y = x.new_empty((B * J, width))
    x = x if x.stride(1) == 1 else x.contiguous()
    block = padded(norm_size) if norm_size else min(MOST_CHANNELS, padded(width))
    size, rows_of_history = norm_size or block, triton.next_power_of_2(max(1, past))
    others = (None if tensor is None else tensor.contiguous() for tensor in (bias, weight, conv_bias))
    launch(
        step_conv_kernel, B * J * cdiv(width, size),
        (x, *others, history, memory_ids.contiguous(), None if writes is None else writes.contiguous(), y),
        (x.stride(0), J, B * J // max(1, len(x)), *((0, 0) if history is None else history.stride()[:2])),
        width, past, rows_of_history, size, block, bias is not None and len(bias) > 1, activation, norm_size > 0,
        num_warps=1 if block <= MOST_CHANNELS else 4,
    )  # fmt: skip
    return y


@step_conv.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    conv_bias: Tensor | None,
    history: Tensor | None,
    memory_ids: Tensor,
    *others: object,
) -> Tensor:
    return x.new_empty((memory_ids.numel(), x.shape[1]))


@triton.jit(do_not_specialize=["x_stride", "J", "readers", "row_stride", "memory_stride"])
def step_conv_kernel(
    x, bias, weight, conv_bias, history, memory_ids, writes, y, x_stride, J, readers, row_stride, memory_stride,
    WIDTH: tl.constexpr, PAST: tl.constexpr, BP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BIASES: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program a (slot, SIZE channels, a head's where there is a norm). readers: slots that read a row of x.
    BIASES: one a memory."""
    TILES: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
    slot = (tl.program_id(0) // TILES).to(tl.int64)
    within = tl.arange(0, BLOCK)
    channels = tl.program_id(0) % TILES * SIZE + within
    inside = (within < SIZE) & (channels < WIDTH)
    memory = tl.load(memory_ids + slot)
    now = tl.load(x + slot // readers * x_stride + channels, mask=inside, other=0.0)
    if bias is not None:
        row = bias + (memory * WIDTH if BIASES else 0)
        # rounded as the history keeps it
        now = (now.to(tl.float32) + tl.load(row + channels, mask=inside, other=0.0).to(tl.float32)).to(now.dtype)
    out = now.to(tl.float32)
    if weight is not None:
        out *= tl.load(weight + channels * (PAST + 1) + PAST, mask=inside, other=0.0).to(tl.float32)
        if PAST > 0:
            past = tl.arange(0, BP)[:, None]
            seen = (past < PAST) & inside[None, :]
            kept = history + slot // J * row_stride + memory * memory_stride + channels[None, :]
            old = tl.load(kept + past * WIDTH, mask=seen, other=0.0)
            taps = tl.load(weight + channels[None, :] * (PAST + 1) + past, mask=seen, other=0.0)
            out += tl.sum(old.to(tl.float32) * taps.to(tl.float32), 0)
            # what one thread loads, another may store
            tl.debug_barrier()
            enters = inside[None, :]
            if writes is not None:
                enters = enters & (tl.load(writes + slot) != 0)
            tl.store(kept + (past - 1) * WIDTH, old, mask=(past > 0) & (past < PAST) & enters)
            tl.store(kept + (PAST - 1) * WIDTH, now.to(old.dtype)[None, :], mask=enters)
        if conv_bias is not None:
            out += tl.load(conv_bias + channels, mask=inside, other=0.0).to(tl.float32)
    out, _ = activate(out, ACTIVATION)
    if NORM:
        out = tl.where(inside, out, 0.0)
        out *= tl.rsqrt(tl.sum(out * out, 0) + 1e-6)
    tl.store(y + slot * WIDTH + channels, out.to(y.dtype.element_ty), mask=inside)
