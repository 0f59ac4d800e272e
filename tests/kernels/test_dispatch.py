"""The plan's kernels under Triton's interpreter, equal to the plan in torch: `TRITON_INTERPRET=1 pytest`."""

from itertools import accumulate
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.routing import dispatch as routing_dispatch
from momkit.routing.base import Routing
from momkit.routing.dispatch import DispatchPlan, make_plan
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import dispatch
from momkit.kernels.dispatch import MOST_CHOICES, plan_slots

few = settings(max_examples=30, deadline=None, database=None, derandomize=True)
PARTS = "slot_token", "token_slot", "cu_seqlens", "segment", "memory", "memory_offsets"


def bounds(lengths, dtype=torch.int64) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def spread(T, J, M, seed=0) -> Tensor:
    """J distinct memories for each token."""
    return torch.rand(T, M, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :J]


def some(T, seed=0) -> Tensor:
    return torch.rand(T, generator=torch.Generator().manual_seed(seed)) < 0.6


def plan_in_torch(memory_ids, cu_seqlens, mask, num_groups) -> DispatchPlan:
    routing = Routing(torch.ones(memory_ids.shape), memory_ids, None, torch.zeros(()), torch.zeros(0))
    with mock.patch.object(routing_dispatch, "why_no_kernels", return_value="they are what is tested"):
        return make_plan(routing, cu_seqlens, mask, num_memories=num_groups, shared_memory=False)


def assert_same_plan(memory_ids, cu_seqlens, mask, num_groups, expected_mask=None) -> None:
    """All parts of the plan bit for bit, every element written; expected_mask: for the plan in torch, if another."""
    expected = plan_in_torch(memory_ids, cu_seqlens, mask if expected_mask is None else expected_mask, num_groups)
    with poisoned_empty():
        found = plan_slots(memory_ids, cu_seqlens, mask, num_groups)
    for name, x in zip(PARTS, found, strict=True):
        wanted = getattr(expected, name)
        assert x.dtype == wanted.dtype, name
        assert_equal(x, wanted, name)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 20), max_size=6))
    T, M = sum(lengths), draw(st.integers(1, 5))
    J = draw(st.integers(1, M))
    seed = draw(st.integers(0, 2**31 - 1))
    collapsed = draw(st.booleans())
    memory_ids = spread(1, J, M, seed).repeat(T, 1) if collapsed else spread(T, J, M, seed)
    shared = draw(st.booleans())
    if shared:
        memory_ids = torch.nn.functional.pad(memory_ids, (0, 1), value=M)
    mask = some(T, seed) if draw(st.booleans()) else None
    return memory_ids, bounds(lengths, draw(st.sampled_from([torch.int32, torch.int64]))), mask, M + shared


@few
@given(case=cases())
@example(case=(torch.zeros(0, 2, dtype=torch.int64), bounds([]), None, 3))
@example(case=(torch.zeros(0, 2, dtype=torch.int64), bounds([0, 0]), None, 3))
# the last sequences begin where the last block ends
@example(case=(torch.zeros(32, 1, dtype=torch.int64), bounds([32, 0, 0]), None, 2))
@example(case=(torch.zeros(5, 1, dtype=torch.int64), bounds([5]), torch.zeros(5, dtype=torch.bool), 1))
def test_same_plan_as_in_torch(case):
    """In blocks of 16 choices, so that a few tokens fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MOST_CHOICES", 16)
        assert_same_plan(*case)


@pytest.mark.parametrize("masked", [False, True])
def test_many_memories_choices_and_sequences(masked):
    lengths = [n % 4 for n in range(100)]
    T = sum(lengths)
    assert_same_plan(spread(T, 9, 64), bounds(lengths), some(T) if masked else None, 64)


def test_blocks_of_full_size():
    lengths = (700, 0, 1, 500, 0)
    assert_same_plan(spread(1201, 3, 5), bounds(lengths), some(1201), 5)


def test_a_token_may_write_to_and_read_from_one_memory():
    assert_same_plan(spread(40, 2, 4).repeat(1, 2), bounds([11, 29]), None, 4)


def test_tokens_that_no_sequence_covers_are_masked():
    mask = some(50)
    covered = mask & (torch.arange(50) < 30)
    assert_same_plan(spread(50, 2, 3), bounds([10, 20]), mask, 3, covered)
    assert_same_plan(spread(50, 2, 3), bounds([10, 20]), None, 3, torch.arange(50) < 30)


def test_views_are_as_good_as_copies():
    memory_ids, mask = spread(20, 3, 5), some(20)
    assert_same_plan(memory_ids.T.contiguous().T, bounds([20, 0]).repeat(2, 1).T[:, 0], mask, 5)
    assert_same_plan(memory_ids, bounds([20]), torch.stack([mask, ~mask], 1)[:, 0], 5)


def test_too_many_slots():
    memory_ids = torch.zeros((), dtype=torch.int64).expand(2**31 - MOST_CHOICES, 1)
    with pytest.raises(InputError, match=r"allowed: less than 2\^31"):
        plan_slots(memory_ids, bounds([5]), None, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    arguments = (spread(7, 2, 3), bounds([3, 0, 4]), some(7) if masked else None, 3)
    torch.library.opcheck(torch.ops.momkit.plan_slots.default, arguments)
