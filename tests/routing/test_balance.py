"""Load, the balance loss, and the figures that describe a routing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from momkit.routing.balance import load_balance_loss, memory_load, routing_stats
from momkit.routing.base import Routing


def choose(memory_ids: list[list[int]], num_memories: int) -> tuple[Tensor, Tensor]:
    """Ids `[T, slots]`, and probabilities shared by each token's choices."""
    ids = torch.tensor(memory_ids)
    probs = torch.zeros(len(ids), num_memories, dtype=torch.float64)
    return ids, probs.scatter(1, ids, 1.0) / ids.shape[1]


def routing_of(memory_ids: list[list[int]], logits: list[list[float]], **fields: Tensor) -> Routing:
    ids = torch.tensor(memory_ids)
    weights = fields.pop("weights", torch.full(ids.shape, 1 / ids.shape[1]))
    return Routing(weights, ids, fields.pop("writes", None), torch.zeros(()), torch.tensor(logits))


def test_memory_load_counts_choices() -> None:
    ids = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert memory_load(ids, 5).tolist() == [2, 0, 3, 1, 0]
    assert memory_load(ids, 5, torch.tensor([True, False, True])).tolist() == [2, 0, 2, 0, 0]
    assert memory_load(ids[:0], 5).tolist() == [0] * 5


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 12), st.integers(0, 2**16))
def test_loss_equals_its_definition(data: st.DataObject, num_memories: int, count: int, seed: int) -> None:
    top_k = data.draw(st.integers(1, num_memories))
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(count, num_memories, generator=generator, dtype=torch.float64).softmax(-1)
    ids = probs.topk(top_k).indices
    mask = torch.rand(count, generator=generator) < 0.6

    kept = mask.nonzero().flatten().tolist()
    expected = 0.0
    for m in range(num_memories):
        f = sum(int(m in ids[t].tolist()) for t in kept) / max(1, len(kept))
        p = sum(float(probs[t, m]) for t in kept) / max(1, len(kept))
        expected += num_memories * f * p
    assert_close(float(load_balance_loss(probs, ids, mask)), expected)
    assert_close(load_balance_loss(probs, ids, mask), load_balance_loss(probs[mask], ids[mask]))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_loss_is_the_number_of_choices(top_k: int) -> None:
    ids, probs = choose([[(t + j) % 4 for j in range(top_k)] for t in range(8)], 4)
    assert_close(float(load_balance_loss(probs, ids)), float(top_k))
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert_close(float(load_balance_loss(uniform, ids)), float(top_k))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_collapsed_loss_is_the_number_of_memories(top_k: int) -> None:
    ids, probs = choose([list(range(top_k))] * 8, 4)
    # each of the k chosen memories: M f p = 4 * 1 * 1/k
    assert_close(float(load_balance_loss(probs, ids)), 4.0)


def test_loss_gradient_pushes_down_the_crowded_memory() -> None:
    ids = torch.tensor([[0], [0], [0], [1]])
    logits = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    load_balance_loss(logits.softmax(-1), ids).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()


def test_padding_is_left_out_whatever_it_holds() -> None:
    ids, probs = choose([[0], [1], [1]], 2)
    mask = torch.tensor([True, True, False])
    probs[2] = torch.nan
    assert_close(float(load_balance_loss(probs, ids, mask)), 1.0)
    probs = probs.requires_grad_()
    load_balance_loss(probs, ids, mask).backward()
    assert probs.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]


def test_no_token_gives_no_loss() -> None:
    ids, probs = choose([[0], [1]], 2)
    assert load_balance_loss(probs[:0], ids[:0]) == 0
    assert load_balance_loss(probs, ids, torch.zeros(2, dtype=torch.bool)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_keeps_the_dtype_of_probabilities(dtype: torch.dtype) -> None:
    ids, probs = choose([[0], [1]], 2)
    for mask in (None, torch.tensor([True, False])):
        assert load_balance_loss(probs.to(dtype), ids, mask).dtype == dtype


def test_loss_memory_does_not_grow_with_slots_times_memories() -> None:
    ids, probs = choose([[0, 1, 2, 3]] * 50, 64)
    probs.requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        load_balance_loss(probs, ids, torch.ones(50, dtype=torch.bool))
    assert max(sizes) <= probs.numel()


LOGITS = [[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.5, 1.0], [0.0, 0.0, 5.0, 4.5]]


def test_stats_by_hand() -> None:
    stats = routing_stats(routing_of([[0, 1], [1, 2], [2, 3]], LOGITS))
    assert stats.load == pytest.approx((1 / 6, 2 / 6, 2 / 6, 1 / 6))
    assert stats.entropy == pytest.approx((2 * math.log(6) / 6 + 4 * math.log(3) / 6) / math.log(4))
    assert stats.dropped == 0
    assert stats.margin == pytest.approx((1.0 + 0.5 + 4.5) / 3)


def test_stats_leave_padding_out() -> None:
    routing = routing_of([[0, 1], [1, 2], [2, 3]], [*LOGITS[:2], [math.nan] * 4])
    stats = routing_stats(routing, torch.tensor([True, True, False]))
    assert stats.load == pytest.approx((0.25, 0.5, 0.25, 0.0))
    assert stats.entropy == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert stats.dropped == 0.25
    assert stats.margin == pytest.approx((1.0 + 0.5) / 2)


def test_stats_of_a_collapsed_and_of_a_balanced_routing() -> None:
    collapsed = routing_stats(routing_of([[1]] * 3, LOGITS))
    assert collapsed.load == (0.0, 1.0, 0.0, 0.0)
    assert collapsed.entropy == 0
    assert collapsed.dropped == 0.75
    balanced = routing_stats(routing_of([[0, 1, 2, 3]] * 3, LOGITS))
    assert balanced.entropy == pytest.approx(1.0, abs=1e-12)
    assert balanced.dropped == 0
    assert math.isnan(balanced.margin)


def test_stats_without_a_token_or_a_choice() -> None:
    routing = routing_of([[0, 1], [1, 2], [2, 3]], LOGITS)
    stats = routing_stats(routing, torch.zeros(3, dtype=torch.bool))
    assert stats.load == (0.0,) * 4
    assert stats.dropped == 1
    assert math.isnan(stats.entropy)
    assert math.isnan(stats.margin)
    alone = routing_stats(routing_of([[0], [0]], [[1.0], [2.0]]))
    assert alone.load == (1.0,)
    assert math.isnan(alone.entropy)


def test_stats_take_the_margin_of_reads_and_the_load_of_both() -> None:
    routing = routing_of(
        [[3, 0], [0, 1], [2, 2]],
        LOGITS,
        weights=torch.tensor([[0.0, 1.0]] * 3),
        writes=torch.tensor([[True, False]] * 3),
    )
    stats = routing_stats(routing)
    assert stats.load == pytest.approx((2 / 6, 1 / 6, 2 / 6, 1 / 6))
    assert stats.margin == pytest.approx((2.0 + 0.5 + 0.5) / 3)
