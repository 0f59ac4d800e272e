"""Checks of a block's state: cuts, decoding, beams, and memories that nothing was sent to."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.state import MoMState
from momkit.testing.blocks import BlockCase, block_cases, reordered, scripted, scripted_case
from momkit.testing.drawing import Draw, drawn
from momkit.testing.oracle import gradients_of
from momkit.testing.strategies import bounds, cuts, routings
from momkit.testing.subjects import HIDDEN_SIZE, BlockSubject
from momkit.testing.tolerances import assert_close, assert_equal


def tensors(state: MoMState) -> dict[str, Tensor]:
    """Every tensor of a state, by name."""
    recurrent = {f"recurrent {name}": tensor for name, tensor in state.recurrent.items()}
    return recurrent | {f"conv {name}": tensor for name, tensor in state.conv.items()}


def assert_same_state(actual: MoMState, expected: MoMState, what: str) -> None:
    for name, tensor in tensors(expected).items():
        assert_close(tensors(actual)[name], tensor, f"{what}: {name}")


def random_state(case: BlockCase, batch_size: int) -> MoMState:
    """A state of order one."""
    state = case.block.initial_state(batch_size)
    values = {name: case.random(case.seed + 7 + i, *t.shape) for i, (name, t) in enumerate(tensors(state).items())}
    return MoMState(
        {name: values[f"recurrent {name}"] for name in state.recurrent},
        {name: values[f"conv {name}"] for name in state.conv},
    )


# any cut of the sequences, with the state carried over, gives what the whole gives
@drawn()
def check_split_invariance(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, max_tokens=30, max_sequences=1), "case")
    pieces = draw(cuts(case.num_tokens), "lengths of the pieces")
    batch = case.random(case.seed + 3, 2, case.num_tokens, HIDDEN_SIZE)
    start = random_state(case, 2)
    whole = case.block(batch, start)
    state, outputs, at = start, [], 0
    for length in pieces:
        out = case.block(batch[:, at : at + length], state)
        outputs.append(out.hidden_states)
        state, at = out.state, at + length
    assert_close(torch.cat(outputs, 1), whole.hidden_states, f"{subject.id}: outputs of the pieces {pieces}")
    assert_same_state(state, whole.state, f"{subject.id}: after the pieces {pieces}")


# decoding token by token is the scan of the whole
@drawn()
def check_decode_is_scan(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, max_tokens=8, max_sequences=1), "case")
    batch_size = draw(st.sampled_from((2, 1, 3)), "batch_size")
    whole_router = step_router = case.block.router
    if draw(st.sampled_from((True, True, False)), "a routing from the script"):
        # one routing a sequence; forward walks the sequences in turn, decoding the tokens in turn
        routing = draw(routings(batch_size * case.num_tokens, case.num_memories), "routing").routing
        by_time = torch.arange(batch_size * case.num_tokens).view(batch_size, case.num_tokens).T.reshape(-1)
        whole_router, step_router = scripted(case, routing), scripted(case, reordered(routing, by_time))
    batch = case.random(case.seed + 3, batch_size, case.num_tokens, HIDDEN_SIZE)
    state = random_state(case, batch_size)
    case.block.router = whole_router
    whole = case.block(batch, state)
    case.block.router = step_router
    state = state.clone()
    for t in range(case.num_tokens):
        out = case.block.step(batch[:, t], state)
        assert out.state is state, f"{subject.id}: step returns another state than it was given"
        assert_close(out.hidden_states, whole.hidden_states[:, t], f"{subject.id}: token {t} decoded")
    assert_same_state(state, whole.state, f"{subject.id}: after decoding")


# a memory that nothing was written to is bitwise what it was, and so is its conv history; its weights get no gradient
@drawn()
def check_unrouted_memories_unchanged(subject: BlockSubject, draw: Draw) -> None:
    case, routing = scripted_case(subject, draw, max_tokens=20)
    state = random_state(case, len(case.lengths))
    out = case.block(case.x, state, cu_seqlens=case.cu_seqlens)
    writes = torch.ones_like(routing.memory_ids, dtype=torch.bool) if routing.writes is None else routing.writes
    touched: set[int] = set()
    for b in range(len(case.lengths)):
        rows = case.sequence(b)
        written = set(routing.memory_ids[rows][writes[rows]].tolist())
        touched |= set(routing.memory_ids[rows].flatten().tolist())
        for m in set(range(case.num_memories)) - written:
            for name, tensor in tensors(state).items():
                what = f"{subject.id}: {name} of sequence {b}, memory {m}, which got no write"
                assert_equal(tensors(out.state)[name][b, m], tensor[b, m], what)
    if not case.block.project.per_memory:
        return
    total = out.hidden_states.square().sum() + sum(t.square().sum() for t in tensors(out.state).values())
    grad = gradients_of(total, {"memory_weight": case.block.project.memory_weight})["memory_weight"]
    for m in set(range(case.num_memories)) - touched:
        assert not grad[m].any(), f"{subject.id}: memory {m}, which got no token, gets a gradient"


# one decoding step changes only the memories that it writes to
@drawn(0.5)
def check_step_touches_only_its_slots(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, max_tokens=1, max_sequences=1), "case")
    batch_size = draw(st.sampled_from((3, 1)), "batch_size")
    routing = draw(routings(batch_size, case.num_memories), "routing").routing
    case.block.router = scripted(case, routing)
    before = random_state(case, batch_size)
    state = before.clone()
    case.block.step(case.random(case.seed + 3, batch_size, HIDDEN_SIZE), state)
    writes = torch.ones_like(routing.memory_ids, dtype=torch.bool) if routing.writes is None else routing.writes
    for b in range(batch_size):
        written = set(routing.memory_ids[b][writes[b]].tolist())
        for m in range(case.num_memories):
            for name, tensor in tensors(before).items():
                now = tensors(state)[name][b, m]
                what = f"{subject.id}: {name} of sequence {b}, memory {m}"
                if m not in written:
                    assert_equal(now, tensor[b, m], f"{what}, which got no write")
                elif name.startswith("recurrent"):
                    assert not torch.equal(now, tensor[b, m]), f"{what}, which got a write, is as it was"


# forward leaves the state it is given alone, and a state can be used twice
@drawn(0.5)
def check_state_never_mutated(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    state = random_state(case, len(case.lengths))
    before = state.clone()
    first = case.block(case.x, state, cu_seqlens=case.cu_seqlens)
    for name, tensor in tensors(before).items():
        assert_equal(tensors(state)[name], tensor, f"{subject.id}: {name} after a forward")
    again = case.block(case.x, state, cu_seqlens=case.cu_seqlens)
    assert_equal(again.hidden_states, first.hidden_states, f"{subject.id}: the second use of a state")


# choosing, repeating and reordering sequences of a state is choosing, repeating and reordering sequences
@drawn(0.5)
def check_beams(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject, max_tokens=10, max_sequences=1), "case")
    beams = draw(st.lists(st.integers(0, 2), min_size=3, max_size=3), "beams")
    index = torch.tensor(beams)
    history = case.random(case.seed + 3, 3, case.num_tokens, HIDDEN_SIZE)
    following = case.random(case.seed + 4, 3, 2, HIDDEN_SIZE)
    state = case.block(history, random_state(case, 3)).state
    expected = case.block(history[index], random_state(case, 3).select(index)).state
    selected, reordered_state = state.select(index), state.clone()
    reordered_state.reorder(index)
    for name, chosen in (("select", selected), ("reorder", reordered_state)):
        assert_same_state(chosen, expected, f"{subject.id}: {name}({beams})")
        onward = case.block(following, chosen).hidden_states
        assert_close(
            onward, case.block(following, expected).hidden_states, f"{subject.id}: onward from {name}({beams})"
        )
    where = torch.tensor([True, False, True])
    state.reset(where, case.block.initial_state(3))
    for name, tensor in tensors(case.block.initial_state(3)).items():
        assert_equal(tensors(state)[name][where], tensor[where], f"{subject.id}: {name} after reset")


# no token leaves the state as it is, and no sequence is legal
@drawn(0.3)
def check_no_tokens(subject: BlockSubject, draw: Draw) -> None:
    case = draw(block_cases(subject), "case")
    state = random_state(case, 2)
    out = case.block(case.x[:0], state, cu_seqlens=bounds((0, 0)))
    assert out.hidden_states.shape == (0, HIDDEN_SIZE), f"{subject.id}: {tuple(out.hidden_states.shape)} for no token"
    for name, tensor in tensors(state).items():
        assert_equal(tensors(out.state)[name], tensor, f"{subject.id}: {name} after no token")
    empty = case.block(case.random(0, 2, 0, HIDDEN_SIZE))
    assert empty.hidden_states.shape == (2, 0, HIDDEN_SIZE), f"{subject.id}: {tuple(empty.hidden_states.shape)}"
    none = case.block(case.random(0, 0, 3, HIDDEN_SIZE))
    assert none.hidden_states.shape == (0, 3, HIDDEN_SIZE), f"{subject.id}: {tuple(none.hidden_states.shape)}"
