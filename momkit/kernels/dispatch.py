"""The dispatch plan on the device: a stable counting sort of all choices by memory, in three launches.

Tokens of a sequence lie together, so the order of segments is that of (memory, choice), where choice t * J + j is the
j-th of token t. Blocks of choices are counted by memory; one cumulative sum over (memory, block) says where the choices
of a memory in a block begin; each choice then stands behind those of its block that chose the same memory before it.

Letters: T packed tokens, J slots a token, R = T * J slots, B sequences, G groups: the memories with the shared one,
N = G * B segments. Tokens that take part in nothing form one more group, G, the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, compiled_together, launch

# choices of a block at most; pairs of a choice and a group that a program compares
MOST_CHOICES = 512
PAIRS = 8192


@torch.library.custom_op("momkit::plan_slots", mutates_args=())
@compiled_together
def plan_slots(
    memory_ids: Tensor, cu_seqlens: Tensor, mask: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort slots by segment, keeping the order of time inside each; segment n = memory * B + sequence.

    memory_ids: `[T, J]` int64, 0 to num_groups - 1, the shared memory's last. cu_seqlens: `[B + 1]` int32 or int64.
    mask: `[T]` bool; slots of tokens where it is False, or that no sequence covers, stand behind all segments.
    Returns slot_token `[R]`, token_slot `[T, J]`, cu_seqlens `[N + 1]`, segment `[R]` (N for slots in none), memory
    `[R]` and memory_offsets `[num_groups + 1]`, all int64. Raises InputError for 2^31 - 512 slots or more.
    """
    (T, J), B = memory_ids.shape, len(cu_seqlens) - 1
    if T * J >= 2**31 - MOST_CHOICES:
        raise InputError(f"T * J = {T} * {J} slots; allowed: less than 2^31 - {MOST_CHOICES}")
    memory_ids, cu_seqlens = memory_ids.contiguous(), cu_seqlens.contiguous()
    mask = None if mask is None else mask.contiguous()
    groups = triton.next_power_of_2(num_groups + 1)
    block = max(16, min(MOST_CHOICES, PAIRS // groups))
    blocks = max(1, cdiv(T * J, block))
    constants = num_groups, max(1, J), groups, block
    counts = cu_seqlens.new_empty((num_groups + 1) * blocks, dtype=torch.int32)
    launch(count_choices, blocks, (memory_ids, cu_seqlens, mask, counts), (T * J, B, blocks), *constants, num_warps=8)
    ends = counts.cumsum(0, dtype=torch.int32)
    slot_token, segment, memory = (memory_ids.new_empty(T * J) for _ in range(3))
    token_slot, bounds = memory_ids.new_empty(T, J), memory_ids.new_empty(num_groups * B + 1)
    memory_offsets = memory_ids.new_empty(num_groups + 1)
    launch(
        place_choices, blocks + B,
        (memory_ids, cu_seqlens, mask, ends, slot_token, token_slot, bounds, segment, memory, memory_offsets),
        (T * J, B, blocks, triton.next_power_of_2(max(1, B))), *constants, num_warps=8,
    )  # fmt: skip
    return slot_token, token_slot, bounds, segment, memory, memory_offsets


@plan_slots.register_fake
def _(
    memory_ids: Tensor, cu_seqlens: Tensor, mask: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, J), B = memory_ids.shape, cu_seqlens.shape[0] - 1
    slot_token, segment, memory = (memory_ids.new_empty(T * J) for _ in range(3))
    bounds, memory_offsets = memory_ids.new_empty(num_groups * B + 1), memory_ids.new_empty(num_groups + 1)
    return slot_token, memory_ids.new_empty(T, J), bounds, segment, memory, memory_offsets


@triton.jit
def group_of(memory_ids, cu_seqlens, mask, choice, R, B, G: tl.constexpr, J: tl.constexpr):
    """The group of each choice, and -1 past the last choice."""
    inside = choice < R
    live = inside & (choice // J < tl.load(cu_seqlens + B))
    if mask is not None:
        live = live & (tl.load(mask + choice // J, mask=live, other=0) != 0)
    memory = tl.load(memory_ids + choice, mask=live, other=0).to(tl.int32)
    return tl.where(live, memory, tl.where(inside, G, -1))


@triton.jit(do_not_specialize=["R", "B", "blocks"])
def count_choices(
    memory_ids, cu_seqlens, mask, counts, R, B, blocks,
    G: tl.constexpr, J: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts `[G + 1, blocks]`: the choices of each group in each block."""
    block = tl.program_id(0)
    group = group_of(memory_ids, cu_seqlens, mask, block * BLOCK + tl.arange(0, BLOCK), R, B, G, J)
    groups = tl.arange(0, GROUPS)
    count = tl.sum((group[None, :] == groups[:, None]).to(tl.int32), 1)
    tl.store(counts + groups.to(tl.int64) * blocks + block, count, mask=groups <= G)


@triton.jit
def sequence_of(cu_seqlens, token, live, B, step):
    """The last sequence that begins at or before each token, by bisection in steps from a power of two, B or more."""
    sequence = tl.zeros_like(token)
    while step > 0:
        later = sequence + step
        there = live & (later < B)
        begin = tl.load(cu_seqlens + later, mask=there, other=0)
        sequence = tl.where(there & (begin <= token), later, sequence)
        step //= 2
    return sequence


@triton.jit(do_not_specialize=["R", "B", "blocks", "step"])
def place_choices(
    memory_ids, cu_seqlens, mask, ends, slot_token, token_slot, bounds, segment, memory, memory_offsets,
    R, B, blocks, step,
    G: tl.constexpr, J: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The slot of each choice of a block, or, in one more program a sequence, where its segments begin.

    ends `[G + 1, blocks]`: the cumulative sum of counts.
    """
    pid = tl.program_id(0)
    sequence = pid - blocks
    begin = tl.load(cu_seqlens + tl.maximum(sequence, 0)).to(tl.int32) * J
    block = tl.where(sequence < 0, pid, begin // BLOCK)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    group = group_of(memory_ids, cu_seqlens, mask, choice, R, B, G, J)
    groups = tl.arange(0, GROUPS)
    chosen = (group[None, :] == groups[:, None]).to(tl.int32)
    at = groups.to(tl.int64) * blocks + block
    before = tl.load(ends + at - 1, mask=(groups <= G) & (at > 0), other=0)
    if sequence >= 0:
        earlier = tl.sum(tl.where(choice[None, :] < begin, chosen, 0), 1)
        tl.store(bounds + groups.to(tl.int64) * B + sequence, before + earlier, mask=groups < G)
        return
    if pid == 0:
        tl.store(memory_offsets + groups, before, mask=groups <= G)
        tl.store(bounds + groups.to(tl.int64) * B, before, mask=groups == G)
    slot = tl.sum(chosen * (before[:, None] + tl.cumsum(chosen, 1) - 1), 0)
    inside, live = choice < R, group < G
    token = choice // J
    home = group.to(tl.int64) * B + sequence_of(cu_seqlens, token, inside & live, B, step)
    tl.store(token_slot + choice, slot, mask=inside)
    tl.store(slot_token + slot, token, mask=inside)
    tl.store(segment + slot, tl.where(live, home, tl.cast(G, tl.int64) * B), mask=inside)
    tl.store(memory + slot, tl.minimum(group, G - 1), mask=inside)
