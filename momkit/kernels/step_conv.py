"""All projections of one decoding step, after their linear maps, in one launch: bias, short conv, activation, norm.

The last inputs of each convolution lie in a block's state; a slot reads those of its sequence and memory, and moves
them on by one, in place. What says where they lie says so for the memories too, and is handed on.

Letters: B rows, J slots of a row, S = B J slots in the order of (row, choice), M memories, P sequences, W conv width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, launch
from momkit.kernels.short_conv import ACTIVATIONS, Part, pack, packed, unpack
from momkit.kernels.short_conv_kernels import activate
from momkit.kernels.step_linear import memory_of
from momkit.kernels.tuning import padded

# channels of a program where no norm joins more
MOST_CHANNELS = 256


def step_conv(
    values: Sequence[Tensor],
    parts: Sequence[Part],
    memory_ids: Tensor,
    shared_id: int | None,
    writes: Tensor | None,
    state_index: Tensor | None,
    sequence_stride: int,
    memory_stride: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y = l2(act(sum_w weight_w u_{t-W+1+w} + conv_bias)), u_t = value_t + bias, for each part, at each slot.

    values: of each part `[B, width]`, all slots of a row reading the same, or `[B, J, width]`; any row stride. parts:
    what becomes of them; a history here is `[P M, W - 1, width]`, contiguous, and changes in place. memory_ids:
    `[B, choices]` int64, no memory twice in a row; shared_id: the memory of one slot more, or None. writes:
    `[B, choices]` bool, False at slots that leave histories as they were. state_index: `[B]` int32 or int64, the
    sequence of each row, -1 for a padding row, whose y are zeros and which changes nothing; None: row b is sequence b.
    Sequence s, memory m is row s sequence_stride + m memory_stride of a history. Sums are float32; no gradients.
    Returns y of each part `[S, width]` as its value, the row of each slot in a history `[S]` int64, -1 at padding, and
    the slots of each row `[B, J]`. Raises InputError for an unknown activation, and a history that does not fit.
    """
    for part in parts:
        if part.activation not in ACTIVATIONS:
            raise InputError(f"activation = {part.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
        if (part.weight is None) != (part.history is None):
            raise InputError("one of weight and history is None; allowed: both or neither")
        if part.history is None:
            continue
        wanted = (part.conv_size - 1, part.width)
        if part.history.shape[1:] != wanted or not part.history.is_contiguous():
            found = f"history has shape {tuple(part.history.shape)}, strides {part.history.stride()}"
            raise InputError(f"{found}; allowed: [P M, {wanted[0]}, {wanted[1]}], contiguous")
    B, J = len(memory_ids), memory_ids.shape[1] + (shared_id is not None)
    ys = [value.new_empty((B * J, value.shape[-1])) for value in values]
    rows, token_slot = memory_ids.new_empty(B * J), memory_ids.new_empty((B, J))
    histories = [part.history for part in parts if part.history is not None]
    tensors, layout = pack([part._replace(history=None) for part in parts])
    convolve_parts(
        values, tensors, layout, memory_ids, shared_id, writes, state_index, sequence_stride, memory_stride,
        histories, ys, rows, token_slot,
    )  # fmt: skip
    return ys, rows, token_slot


# ops that change some of their arguments may not return a list of tensors
@torch.library.custom_op("momkit::step_conv", mutates_args=("histories", "ys", "rows", "token_slot"))
def convolve_parts(
    values: Sequence[Tensor], tensors: Sequence[Tensor], layout: Sequence[int], memory_ids: Tensor,
    shared_id: int | None, writes: Tensor | None, state_index: Tensor | None, sequence_stride: int, memory_stride: int,
    histories: Sequence[Tensor], ys: Sequence[Tensor], rows: Tensor, token_slot: Tensor,
) -> None:  # fmt: skip
    """`step_conv`, into tensors that it gives."""
    parts, left = list(unpack(tensors, layout)), iter(histories)
    xs = [value if value.stride(-1) == 1 else value.contiguous() for value in values]
    xs = [x.flatten(0, -2) for x in xs]
    blocks = [padded(part.norm_size) if part.norm_size else min(MOST_CHANNELS, padded(part.width)) for part in parts]
    sizes = [part.norm_size or block for part, block in zip(parts, blocks, strict=True)]
    tiles = sum(cdiv(part.width, size) for part, size in zip(parts, sizes, strict=True))
    launch(
        step_conv_kernel, len(rows) * tiles,
        (
            *packed(memory_ids, writes, state_index), tuple(xs), packed(*(part.bias for part in parts)),
            packed(*(part.weight for part in parts)), packed(*(part.conv_bias for part in parts)),
            tuple(None if part.weight is None else next(left) for part in parts), tuple(ys), rows, token_slot,
        ),
        (sequence_stride, memory_stride), token_slot.shape[1], memory_ids.shape[1], shared_id or 0, tiles,
        tuple(part.width for part in parts), tuple(x.stride(0) for x in xs),
        tuple(value.ndim == 3 for value in values), tuple(part.conv_size - 1 for part in parts),
        tuple(sizes), tuple(blocks), tuple(part.bias is not None and len(part.bias) > 1 for part in parts),
        tuple(part.activation for part in parts), tuple(part.norm_size > 0 for part in parts),
        num_warps=1 if max(blocks) <= MOST_CHANNELS else 4,
    )  # fmt: skip


@convolve_parts.register_fake
def _(*arguments: object) -> None:
    """It gives nothing."""


@triton.jit(do_not_specialize=["sequence_stride", "memory_stride"])
def step_conv_kernel(
    memory_ids, writes, state_index, xs, biases, weights, conv_biases, histories, ys, rows, token_slot,
    sequence_stride, memory_stride,
    J: tl.constexpr, CHOICES: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr, WIDTHS: tl.constexpr,
    STRIDES: tl.constexpr, PER_SLOT: tl.constexpr, PASTS: tl.constexpr, SIZES: tl.constexpr, BLOCKS: tl.constexpr,
    BIASES: tl.constexpr, ACTIVATIONS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One program a (slot, part, SIZES channels, a head's where there is a norm); what is in capitals and plural has an
    entry a part. STRIDES: of x; PER_SLOT: x has a row a slot; BIASES: one a memory."""
    slot = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    sequence = slot // J
    memory = memory_of(memory_ids, slot // J, slot % J, slot >= 0, CHOICES, SHARED)
    if state_index is not None:
        sequence = tl.load(state_index + slot // J).to(tl.int64)
    row = tl.where(sequence < 0, -1, sequence * sequence_stride + memory * memory_stride)
    enters = row >= 0
    if writes is not None:
        # the shared memory always writes
        choice = writes + slot // J * CHOICES + slot % J
        enters = enters & (tl.load(choice, mask=slot % J < CHOICES, other=1) != 0)
    if tile == 0:
        tl.store(rows + slot, row)
        tl.store(token_slot + slot, slot)
    for i in tl.static_range(len(WIDTHS)):
        tiles = (WIDTHS[i] + SIZES[i] - 1) // SIZES[i]
        if (tile >= 0) & (tile < tiles):
            convolve(
                xs[i] + (slot if PER_SLOT[i] else slot // J) * STRIDES[i], biases[i], weights[i], conv_biases[i],
                histories[i], ys[i] + slot * WIDTHS[i], tile * SIZES[i], memory, row, enters,
                tl.constexpr(WIDTHS[i]), tl.constexpr(PASTS[i]), tl.constexpr(SIZES[i]), tl.constexpr(BLOCKS[i]),
                tl.constexpr(BIASES[i]), tl.constexpr(ACTIVATIONS[i]), tl.constexpr(NORMS[i]),
            )  # fmt: skip
        tile -= tiles


@triton.jit
def convolve(
    x, bias, weight, conv_bias, history, y, first, memory, row, enters,
    WIDTH: tl.constexpr, PAST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BIASES: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """SIZE channels of one part at one slot, from channel `first` on; row: in the history, negative at padding."""
    within = tl.arange(0, BLOCK)
    channels = first + within
    inside = (within < SIZE) & (channels < WIDTH)
    now = tl.load(x + channels, mask=inside, other=0.0)
    if bias is not None:
        biases = bias + (memory * WIDTH if BIASES else 0)
        # rounded as the history keeps it
        now = (now.to(tl.float32) + tl.load(biases + channels, mask=inside, other=0.0).to(tl.float32)).to(now.dtype)
    out = now.to(tl.float32)
    if weight is not None:
        out *= tl.load(weight + channels * (PAST + 1) + PAST, mask=inside, other=0.0).to(tl.float32)
        if PAST > 0:
            past = tl.arange(0, triton.next_power_of_2(PAST))[:, None]
            there = (past < PAST) & inside[None, :]
            kept = history + row * (PAST * WIDTH) + channels[None, :]
            old = tl.load(kept + past * WIDTH, mask=there & (row >= 0), other=0.0)
            taps = tl.load(weight + channels[None, :] * (PAST + 1) + past, mask=there, other=0.0)
            out += tl.sum(old.to(tl.float32) * taps.to(tl.float32), 0)
            # what one thread loads, another may store
            tl.debug_barrier()
            tl.store(kept + (past - 1) * WIDTH, old, mask=(past > 0) & there & enters)
            tl.store(kept + (PAST - 1) * WIDTH, now.to(old.dtype)[None, :], mask=inside[None, :] & enters)
        if conv_bias is not None:
            out += tl.load(conv_bias + channels, mask=inside, other=0.0).to(tl.float32)
    out, _ = activate(out, ACTIVATION)
    if NORM:
        out = tl.where(inside, out, 0.0)
        out *= tl.rsqrt(tl.sum(out * out, 0) + 1e-6)
    tl.store(y + channels, tl.where(row >= 0, out, 0.0).to(y.dtype.element_ty), mask=inside)
