"""Checks of the steps around a scan: the plan of slots, grouped linear, short convolution, combine."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit import ops
from momkit.routing import dispatch
from momkit.routing.dispatch import DispatchPlan
from momkit.testing.drawing import Draw, drawn
from momkit.testing.strategies import RoutingCase, bounds, ragged, routings, seeds
from momkit.testing.subjects import DispatchSubject
from momkit.testing.tolerances import assert_close, assert_equal


@dataclass(frozen=True)
class PlanCase:
    """What `make_plan` is given; every third token or so is masked where `masked`."""

    lengths: tuple[int, ...]
    choices: RoutingCase
    shared_memory: bool
    masked: bool

    @property
    def num_groups(self) -> int:
        return self.choices.num_memories + self.shared_memory

    @property
    def mask(self) -> Tensor:
        """`[T]`, True at tokens that take part."""
        generator = torch.Generator().manual_seed(self.choices.seed)
        return torch.rand(self.choices.num_tokens, generator=generator) < (0.7 if self.masked else 2.0)

    def plan(self) -> DispatchPlan:
        return dispatch.make_plan(
            self.choices.routing,
            bounds(self.lengths),
            self.mask if self.masked else None,
            num_memories=self.choices.num_memories,
            shared_memory=self.shared_memory,
        )

    def ids(self, t: int) -> list[int]:
        """The memories of token t, choice by choice, the shared one last."""
        chosen: list[int] = self.choices.routing.memory_ids[t].tolist()
        return [*chosen, self.choices.num_memories] if self.shared_memory else chosen

    def segments(self) -> list[list[int]]:
        """The tokens of each segment, by definition: memory-major, sequences inside, time inside those."""
        starts = bounds(self.lengths).tolist()
        mask = self.mask.tolist()
        return [
            [t for t in range(starts[b], starts[b + 1]) if mask[t] for m in self.ids(t) if m == memory]
            for memory in range(self.num_groups)
            for b in range(len(self.lengths))
        ]


@st.composite
def plan_cases(draw: st.DrawFn) -> PlanCase:
    lengths = draw(ragged(60, 0, 4))
    choices = draw(routings(sum(lengths), draw(st.sampled_from((4, 1, 2, 5, 16)))))
    return PlanCase(lengths, choices, draw(st.booleans()), draw(st.booleans()))


# every choice of every token has one slot, and every slot is one choice of one token
@drawn()
def check_plan_is_permutation(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    num_tokens, J = plan.token_slot.shape
    assert not num_tokens or len(case.ids(0)) == J, f"token_slot has {J} columns"
    slots = plan.token_slot.flatten().sort().values
    assert_equal(slots, torch.arange(num_tokens * J), "slots of all choices")
    tokens = torch.arange(num_tokens)[:, None].expand(num_tokens, J)
    assert_equal(plan.slot_token[plan.token_slot], tokens, "the token of a token's slot")


# packing by slot_token and picking by token_slot gives each token back, once for each choice
@drawn()
def check_pack_unpack_round_trip(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    x = torch.randn(case.choices.num_tokens, 3, generator=torch.Generator().manual_seed(case.choices.seed))
    back = x[plan.slot_token][plan.token_slot]
    assert_equal(back, x[:, None].expand(-1, plan.token_slot.shape[1], -1), "tokens packed and unpacked")


# inside every memory the tokens of a sequence keep the order of time, a token's writes before its reads
@drawn()
def check_time_order_kept_in_each_memory(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    choice = torch.empty_like(plan.slot_token)
    columns = plan.token_slot.shape[1]
    choice[plan.token_slot.flatten()] = torch.arange(columns).repeat(case.choices.num_tokens)
    covered = int(plan.cu_seqlens[-1])
    for r in range(1, covered):
        if plan.segment[r] == plan.segment[r - 1]:
            before = (int(plan.slot_token[r - 1]), int(choice[r - 1]))
            now = (int(plan.slot_token[r]), int(choice[r]))
            assert before < now, f"slot {r}: (token, choice) {now} stands behind {before}"


# cu_seqlens bounds, for memory m and sequence b, segment m * B + b, which holds just its tokens
@drawn()
def check_segments_hold_their_tokens(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    expected = case.segments()
    assert_equal(plan.cu_seqlens.long(), bounds(tuple(map(len, expected))), "cu_seqlens")
    starts = plan.cu_seqlens.tolist()
    for n, tokens in enumerate(expected):
        found = plan.slot_token[starts[n] : starts[n + 1]].tolist()
        assert found == tokens, f"segment {n} holds tokens {found}, expected {tokens}"
        assert (plan.segment[starts[n] : starts[n + 1]] == n).all(), f"segment of the slots of segment {n}"
    B = len(case.lengths)
    per_memory = [sum(len(s) for s in expected[m * B : (m + 1) * B]) for m in range(case.num_groups)]
    assert_equal(plan.memory_offsets.long(), bounds(tuple(per_memory)), "memory_offsets")
    memories = torch.arange(case.num_groups).repeat_interleave(torch.tensor(per_memory))
    assert_equal(plan.memory[: starts[-1]], memories, "memory of each slot")


# masked tokens stand in a tail that no segment covers, with a memory that is a legal index
@drawn()
def check_masked_tokens_in_the_tail(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    covered = int(plan.cu_seqlens[-1])
    J = plan.token_slot.shape[1]
    assert covered == int(case.mask.sum()) * J, f"{covered} slots are covered, of {int(case.mask.sum())} tokens"
    assert not case.mask[plan.slot_token[covered:]].any(), "an unmasked token stands in the tail"
    assert (plan.segment[covered:] == len(case.segments())).all(), "the tail belongs to a segment"
    assert ((plan.memory >= 0) & (plan.memory < case.num_groups)).all(), "a slot's memory is no legal index"


# a slot writes if its choice does, and the shared memory's always does
@drawn()
def check_writes_follow_their_slots(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan = case.plan()
    writes = case.choices.routing.writes
    if writes is None:
        assert plan.writes is None, "writes where every slot writes"
        return
    assert plan.writes is not None, "no writes where some slots only read"
    back = plan.writes[plan.token_slot]
    assert_equal(back[:, : writes.shape[1]], writes, "writes of each choice")
    assert back[:, writes.shape[1] :].all(), "the shared memory does not write"


# combine adds weight times slot in the order of the choices, the shared memory's whole, and zeros masked tokens
@drawn()
def check_combine(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    plan, weights = case.plan(), case.choices.routing.weights
    covered = int(plan.cu_seqlens[-1])
    slots = torch.randn(len(plan.slot_token), 2, 3, dtype=torch.float64)
    slots[covered:] = torch.nan
    slots.requires_grad_()
    mixed = ops.combine(slots, plan.token_slot, weights, case.mask)
    for t in range(case.choices.num_tokens):
        expected = torch.zeros(2, 3, dtype=torch.float64)
        if case.mask[t]:
            for j in range(len(case.ids(t))):
                weight = weights[t, j] if j < weights.shape[1] else 1.0
                expected = expected + slots[plan.token_slot[t, j]] * weight
        assert_equal(mixed[t], expected, f"token {t}")
    (grad,) = torch.autograd.grad(mixed.sum(), slots, materialize_grads=True)
    assert not grad[covered:].any(), "slots in the tail get a gradient"


# the short convolution of a slot sees the writing slots before it in its segment, then the history, and itself
@drawn()
def check_short_conv(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    width = draw(st.sampled_from((4, 2, 3, 1)), "width")
    generator = torch.Generator().manual_seed(draw(seeds, "seed"))
    plan = case.plan()
    num_segments, channels = len(plan.cu_seqlens) - 1, 2
    x = torch.randn(len(plan.slot_token), channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    history = torch.randn(num_segments, width - 1, channels, generator=generator, dtype=torch.float64)
    windows = ops.Windows.of(plan.cu_seqlens, plan.segment, plan.writes, width)
    y, new_history = ops.short_conv(x, weight, bias, history, windows)
    starts = plan.cu_seqlens.tolist()
    for n in range(num_segments):
        past = list(history[n])
        for r in range(starts[n], starts[n + 1]):
            window = torch.stack([*past, x[r]])
            assert_close(y[r], (window * weight.T).sum(0) + bias, f"slot {r} of segment {n}")
            if plan.writes is None or plan.writes[r]:
                past = [*past, x[r]][1:]
        expected = torch.stack(past) if past else history[n]
        assert_equal(new_history[n], expected, f"history of segment {n}")
    assert not y[starts[-1] :].any(), "rows of no segment are not zero"


# rows of memory m go through weight m, forward and backward, and rows of none give zeros
@drawn(0.5)
def check_grouped_linear(subject: DispatchSubject, draw: Draw) -> None:
    case = draw(plan_cases(), "case")
    generator = torch.Generator().manual_seed(draw(seeds, "seed"))
    plan = case.plan()
    x = torch.randn(len(plan.slot_token), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(case.num_groups, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    covered = int(plan.cu_seqlens[-1])
    y = ops.grouped_linear(x, weight, plan.memory_offsets)
    expected = (weight[plan.memory] @ x[..., None])[..., 0]
    assert_close(y[:covered], expected[:covered], "rows of each memory")
    assert not y[covered:].any(), "rows of no memory are not zero"
    scale = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((y * scale).sum(), (x, weight), materialize_grads=True)
    wanted = torch.autograd.grad((expected * scale)[:covered].sum(), (x, weight), materialize_grads=True)
    for name, grad, truth in zip(("x", "weight"), found, wanted, strict=True):
        assert_close(grad, truth, f"gradient of {name}")


# the plan of one decoding step: each slot a segment of one token, its row that of its memory and sequence
@drawn(0.5)
def check_step_plan(subject: DispatchSubject, draw: Draw) -> None:
    batch_size = draw(st.integers(0, 5), "batch_size")
    choices = draw(routings(batch_size, draw(st.sampled_from((4, 1, 6)), "num_memories")), "routing")
    ids = choices.routing.memory_ids[:, : choices.choices]
    plan = dispatch.make_step_plan(ids, None, choices.num_memories)
    R = ids.numel()
    assert_equal(plan.cu_seqlens, torch.arange(R + 1), "cu_seqlens of single tokens")
    assert_equal(plan.slot_token[plan.token_slot], torch.arange(batch_size)[:, None].expand_as(ids), "tokens of slots")
    assert_equal(plan.memory[plan.token_slot], ids, "memories of slots")
    assert (plan.memory.diff() >= 0).all(), "a memory's slots are no single block"
    counts = torch.bincount(ids.flatten(), minlength=choices.num_memories)
    assert_equal(plan.memory_offsets.long(), bounds(tuple(counts.tolist())), "memory_offsets")
