"""The plan: slots in memory order, each in time order, nobody lost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from momkit.routing.base import Routing
from momkit.routing.dispatch import DispatchPlan, choices, make_plan, make_step_plan, sequence_of_token

few = settings(max_examples=60, deadline=None)


def routing_of(memory_ids: Tensor, num_memories: int, writes: Tensor | None = None) -> Routing:
    weights = torch.ones(memory_ids.shape)
    return Routing(weights, memory_ids, writes, torch.zeros(()), torch.zeros(len(memory_ids), num_memories))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Lengths of sequences, and what a router might say of their tokens: spread, or all on the same memories."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=5))
    T, M = sum(lengths), draw(st.integers(1, 5))
    J = draw(st.integers(1, M))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    memory_ids = torch.rand(T, M, generator=generator).argsort(1)[:, :J]
    if draw(st.booleans()):
        memory_ids = torch.randperm(M, generator=generator)[:J].repeat(T, 1)
    return {
        "lengths": lengths,
        "memory_ids": memory_ids,
        "writes": torch.rand(T, J, generator=generator) < 0.5 if draw(st.booleans()) else None,
        "mask": torch.rand(T, generator=generator) < 0.6 if draw(st.booleans()) else None,
        "num_memories": M,
        "shared_memory": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }


def plan_of(case: dict) -> DispatchPlan:
    return make_plan(
        routing_of(case["memory_ids"], case["num_memories"], case["writes"]),
        torch.tensor([0, *case["lengths"]]).cumsum(0).to(case["dtype"]),
        case["mask"],
        num_memories=case["num_memories"],
        shared_memory=case["shared_memory"],
    )


def expected_segments(case: dict) -> list[list[tuple[int, int]]]:
    """The (token, choice) pairs of each segment in time order, by walking over the tokens."""
    B, groups = len(case["lengths"]), case["num_memories"] + case["shared_memory"]
    segments: list[list[tuple[int, int]]] = [[] for _ in range(groups * B)]
    t = 0
    for b, length in enumerate(case["lengths"]):
        for _ in range(length):
            if case["mask"] is None or case["mask"][t]:
                chosen = case["memory_ids"][t].tolist() + [case["num_memories"]] * case["shared_memory"]
                for j, m in enumerate(chosen):
                    segments[m * B + b].append((t, j))
            t += 1
    return segments


@few
@given(cases())
def test_segments_hold_their_tokens_in_time_order(case: dict) -> None:
    plan, expected = plan_of(case), expected_segments(case)
    J = case["memory_ids"].shape[1] + case["shared_memory"]
    pairs = [(int(t), j) for t, j in zip(plan.slot_token, slot_choice(plan), strict=True)]
    cu = plan.cu_seqlens.tolist()
    assert cu[0] == 0
    assert [pairs[a:b] for a, b in pairwise(cu)] == expected
    # behind them, each in no segment, the masked tokens
    masked = [] if case["mask"] is None else (~case["mask"]).nonzero().flatten().tolist()
    assert pairs[cu[-1] :] == [(t, j) for t in masked for j in range(J)]


def slot_choice(plan: DispatchPlan) -> list[int]:
    """The choice that each slot is, from `token_slot`."""
    choice = torch.full_like(plan.slot_token, -1)
    T, J = plan.token_slot.shape
    choice[plan.token_slot] = torch.arange(J).expand(T, J)
    return choice.tolist()


@few
@given(cases())
def test_the_parts_of_a_plan_agree(case: dict) -> None:
    plan = plan_of(case)
    T, J = plan.token_slot.shape
    B, groups = len(case["lengths"]), case["num_memories"] + case["shared_memory"]
    R, N = T * J, groups * B
    # every slot once, under its own token
    assert plan.token_slot.flatten().sort().values.tolist() == list(range(R))
    assert torch.equal(plan.slot_token[plan.token_slot], torch.arange(T)[:, None].expand(T, J))
    assert plan.cu_seqlens.shape == (N + 1,)
    lengths = plan.cu_seqlens.diff()
    tail = torch.tensor([R - int(plan.cu_seqlens[-1])])
    assert torch.equal(plan.segment, torch.repeat_interleave(torch.arange(N + 1), torch.cat([lengths, tail])))
    assert torch.equal(plan.memory_offsets, plan.cu_seqlens[torch.arange(groups + 1) * B])
    assert plan.memory.shape == (R,)
    assert all(0 <= m < groups for m in plan.memory.tolist())
    for m in range(groups):
        assert (plan.memory[plan.memory_offsets[m] : plan.memory_offsets[m + 1]] == m).all()
    for index in (plan.slot_token, plan.token_slot, plan.segment, plan.memory, plan.cu_seqlens):
        assert index.dtype == torch.int64


@few
@given(cases())
def test_writes_follow_their_slots(case: dict) -> None:
    """The shared memory always writes; nothing is said where every slot writes."""
    plan = plan_of(case)
    if case["writes"] is None:
        assert plan.writes is None
        return
    writes = case["writes"]
    if case["shared_memory"]:
        writes = torch.cat([writes, torch.ones(len(writes), 1, dtype=torch.bool)], 1)
    assert torch.equal(plan.writes[plan.token_slot], writes)


@pytest.mark.parametrize("num_tokens", [17, 64, 5000])
def test_order_is_stable(num_tokens: int) -> None:
    """All ties: an unstable sort would scramble time, which it does from 17 elements on."""
    ids = torch.zeros(num_tokens, 1, dtype=torch.int64)
    plan = make_plan(routing_of(ids, 2), torch.tensor([0, num_tokens]), num_memories=2, shared_memory=True)
    time = torch.arange(num_tokens)
    assert torch.equal(plan.slot_token, torch.cat([time, time]))
    assert plan.cu_seqlens.tolist() == [0, num_tokens, num_tokens, 2 * num_tokens]


def test_a_token_may_write_and_read_one_memory() -> None:
    """Its write stands before its read, so that the read sees it."""
    ids, writes = torch.tensor([[1, 1], [0, 1]]), torch.tensor([[True, False], [True, False]])
    plan = make_plan(routing_of(ids, 2, writes), torch.tensor([0, 2]), num_memories=2, shared_memory=False)
    assert plan.slot_token.tolist() == [1, 0, 0, 1]
    assert plan.writes.tolist() == [True, True, False, False]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_no_tokens(lengths: list[int], shared_memory: bool, masked: bool) -> None:
    ids = torch.zeros(0, 2, dtype=torch.int64)
    plan = make_plan(
        routing_of(ids, 3),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(0, dtype=torch.bool) if masked else None,
        num_memories=3,
        shared_memory=shared_memory,
    )
    groups = 3 + shared_memory
    assert plan.token_slot.shape == (0, 2 + shared_memory)
    assert plan.cu_seqlens.tolist() == [0] * (groups * len(lengths) + 1)
    assert plan.memory_offsets.tolist() == [0] * (groups + 1)


def test_all_masked() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]])
    plan = make_plan(
        routing_of(ids, 2),
        torch.tensor([0, 1, 3]),
        torch.zeros(3, dtype=torch.bool),
        num_memories=2,
        shared_memory=True,
    )
    assert plan.cu_seqlens.tolist() == [0] * 7
    assert plan.slot_token.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (plan.segment == 6).all()


def test_sequence_of_token() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 2, 5, 5])
    assert sequence_of_token(cu_seqlens, 5).tolist() == [0, 0, 3, 3, 3]
    assert sequence_of_token(cu_seqlens.int(), 5).tolist() == [0, 0, 3, 3, 3]


def test_choices_add_the_shared_memory_last() -> None:
    ids, writes = torch.tensor([[2, 0]]), torch.tensor([[True, False]])
    with_shared = choices(routing_of(ids, 3, writes), 3, True)
    assert [x.tolist() for x in with_shared] == [[[2, 0, 3]], [[True, False, True]]]
    assert choices(routing_of(ids, 3), 3, True)[1] is None
    without = choices(routing_of(ids, 3, writes), 3, False)
    assert without[0] is ids
    assert without[1] is writes


@pytest.mark.parametrize("masked", [True, False])
def test_a_plan_reads_no_values(masked: bool) -> None:
    """Under fake tensors any look at a value raises: shapes follow from shapes, so no host waits for a device."""
    with FakeTensorMode():
        ids, mask = torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, dtype=torch.bool) if masked else None
        routing = routing_of(ids, 3, torch.ones(6, 2, dtype=torch.bool))
        plan = make_plan(routing, torch.zeros(3, dtype=torch.int32), mask, num_memories=3, shared_memory=True)
        make_step_plan(ids, None, 3)
    assert plan.token_slot.shape == (6, 3)
    assert plan.cu_seqlens.shape == (9,)


@few
@given(data=st.data(), B=st.integers(0, 5), M=st.integers(1, 5), separate=st.booleans())
def test_step_plan(data: st.DataObject, B: int, M: int, separate: bool) -> None:
    """Each slot a segment of one token, grouped by memory, with its row in a batch-first pool."""
    J = data.draw(st.integers(1, M))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    ids = torch.rand(B, M, generator=generator).argsort(1)[:, :J]
    writes = torch.rand(B, J, generator=generator) < 0.5 if separate else None
    plan = make_step_plan(ids, writes, M)
    R = B * J
    assert plan.cu_seqlens.tolist() == list(range(R + 1))
    assert plan.segment.tolist() == list(range(R))
    assert torch.equal(plan.slot_token[plan.token_slot], torch.arange(B)[:, None].expand(B, J))
    assert torch.equal(plan.memory[plan.token_slot], ids)
    assert len(set((plan.slot_token * M + plan.memory).tolist())) == R
    assert plan.memory_offsets.shape == (M + 1,)
    for m in range(M):
        assert (plan.memory[plan.memory_offsets[m] : plan.memory_offsets[m + 1]] == m).all()
    assert int(plan.memory_offsets[-1]) == R
    if writes is None:
        assert plan.writes is None
    else:
        assert torch.equal(plan.writes[plan.token_slot], writes)
