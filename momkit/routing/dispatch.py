"""From tokens to slots: memory order without padding, on the device, with static shapes.

Letters: T packed tokens, B sequences, M memories, J slots a token, R = T * J slots, N = (M + shared) * B segments.
Segment n = m * B + b: memory-major, the shared memory last, so that a memory's slots are one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.kernels.available import why_no_kernels
from momkit.routing.base import Routing


@dataclass(frozen=True)
class DispatchPlan:
    """Where each slot of each token stands in memory order.

    slot_token: `[R]` the token of each slot. token_slot: `[T, J]` the slot of each choice, the shared memory's last.
    cu_seqlens: `[N + 1]` bounds of the segments; masked tokens stand behind its end, in no segment.
    segment: `[R]` the segment of each slot, N for those in none.
    memory: `[R]` the memory of each slot; meaningless at slots in no segment, but always a legal index.
    memory_offsets: `[M + shared + 1]` bounds of each memory's block.
    writes: `[R]` bool, False at slots that only read; None when every slot writes.
    """

    slot_token: Tensor
    token_slot: Tensor
    cu_seqlens: Tensor
    segment: Tensor
    memory: Tensor
    memory_offsets: Tensor
    writes: Tensor | None


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence of each packed token: `[B + 1]` -> `[T]`."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1


def choices(routing: Routing, num_memories: int, shared_memory: bool) -> tuple[Tensor, Tensor | None]:
    """memory_ids and writes `[T, J]`, the shared memory added as a last choice that always writes."""
    memory_ids, writes = routing.memory_ids, routing.writes
    if shared_memory:
        memory_ids = torch.nn.functional.pad(memory_ids, (0, 1), value=num_memories)
        writes = None if writes is None else torch.nn.functional.pad(writes, (0, 1), value=True)
    return memory_ids, writes


def make_plan(
    routing: Routing, cu_seqlens: Tensor, mask: Tensor | None = None, *, num_memories: int, shared_memory: bool
) -> DispatchPlan:
    """Sort slots by segment, keeping the order of time inside each: stable, no host synchronisation.

    cu_seqlens: `[B + 1]` bounds of the sequences. mask: `[T]` bool, False tokens take part in nothing.
    """
    memory_ids, writes = choices(routing, num_memories, shared_memory)
    num_tokens, J = memory_ids.shape
    num_sequences = len(cu_seqlens) - 1
    num_groups = num_memories + shared_memory
    if why_no_kernels(memory_ids.device) is None:
        from momkit.kernels.dispatch import plan_slots

        slot_token, token_slot, bounds, segment, memory, offsets = plan_slots(memory_ids, cu_seqlens, mask, num_groups)
        if writes is not None:
            writes = torch.empty_like(writes).flatten().index_copy(0, token_slot.flatten(), writes.flatten())
        return DispatchPlan(slot_token, token_slot, bounds, segment, memory, offsets, writes)
    num_segments = num_groups * num_sequences
    segment = memory_ids * num_sequences + sequence_of_token(cu_seqlens, num_tokens)[:, None]
    if mask is not None:
        segment = torch.where(mask[:, None], segment, num_segments)
    segment, order = torch.sort(segment.reshape(-1), stable=True)
    token_slot = torch.empty_like(order)
    token_slot[order] = torch.arange(num_tokens * J, device=order.device)
    bounds = torch.arange(num_segments + 1, device=order.device)
    plan_cu_seqlens = torch.searchsorted(segment, bounds)
    return DispatchPlan(
        slot_token=order // max(1, J),
        token_slot=token_slot.view(num_tokens, J),
        cu_seqlens=plan_cu_seqlens,
        segment=segment,
        memory=(segment // max(1, num_sequences)).clamp_max(num_groups - 1),
        memory_offsets=plan_cu_seqlens[::num_sequences] if num_sequences else plan_cu_seqlens.expand(num_groups + 1),
        writes=None if writes is None else writes.reshape(-1)[order],
    )


def make_step_plan(memory_ids: Tensor, writes: Tensor | None, num_groups: int) -> DispatchPlan:
    """The plan of one decoding step: every slot is a segment of its own, of one token.

    memory_ids, writes: `[B, J]` choices of one token of each sequence, no memory twice. num_groups: memories with the
    shared one. A slot's state is row (slot_token, memory) of a `[B, num_groups, ...]` pool.
    """
    num_sequences, J = memory_ids.shape
    memory, order = torch.sort(memory_ids.reshape(-1), stable=True)
    token_slot = torch.empty_like(order)
    slots = torch.arange(num_sequences * J, device=order.device)
    token_slot[order] = slots
    return DispatchPlan(
        slot_token=order // max(1, J),
        token_slot=token_slot.view(num_sequences, J),
        cu_seqlens=torch.arange(num_sequences * J + 1, device=order.device),
        segment=slots,
        memory=memory,
        memory_offsets=torch.searchsorted(memory, torch.arange(num_groups + 1, device=order.device)),
        writes=None if writes is None else writes.reshape(-1)[order],
    )
