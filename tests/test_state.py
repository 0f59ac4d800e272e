"""What a block remembers: choosing sequences is indexing, and only what says so works in place."""

import pytest
import torch
from torch import Tensor

from momkit import MoMBlock, MoMSpec, MoMState
from momkit.errors import InputError


def block(**fields: object) -> MoMBlock:
    torch.manual_seed(0)
    return MoMSpec(**({"hidden_size": 12} | fields)).build().double()


def state_of(mom: MoMBlock, batch_size: int = 4) -> MoMState:
    x = torch.randn(batch_size, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return mom(x).state.detach()


def tensors(state: MoMState) -> list[Tensor]:
    return [*state.recurrent.values(), *state.conv.values()]


def assert_same(state: MoMState, other: MoMState) -> None:
    torch.testing.assert_close((state.recurrent, state.conv), (other.recurrent, other.conv), rtol=0, atol=0)


def differs(state: MoMState, other: MoMState) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(tensors(state), tensors(other), strict=True))


@pytest.mark.parametrize("conv_size", [4, 1, None])
@pytest.mark.parametrize("shared_memory", [True, False])
def test_layout_is_batch_first(conv_size, shared_memory):
    mom = block(conv_size=conv_size, shared_memory=shared_memory)
    groups = 4 + shared_memory
    for state in (mom.initial_state(3), state_of(mom, 3)):
        assert state.batch_size == 3
        assert {n: t.shape for n, t in state.recurrent.items()} == {"S": (3, groups, 4, 3, 3)}
        expected = {} if conv_size is None else dict.fromkeys("qkv", (3, groups, conv_size - 1, 12))
        assert {n: t.shape for n, t in state.conv.items()} == expected
    assert mom.initial_state(0).batch_size == 0


def test_conv_histories_are_in_the_dtype_of_activations():
    mom = MoMSpec(hidden_size=12).build().bfloat16()
    for state in (mom.initial_state(2), mom(torch.randn(2, 3, 12).bfloat16()).state):
        assert {t.dtype for t in state.recurrent.values()} == {torch.float32}
        assert {t.dtype for t in state.conv.values()} == {torch.bfloat16}


@pytest.mark.parametrize("router", ["softmax_topk", "read_write"])
@pytest.mark.parametrize("mechanism", ["gated_deltanet", "titans", "gsa", "mamba"])
def test_select_then_go_on(mechanism, router):
    """Sequences continue from any rows of a state, doubled or left out, as they would have on their own."""
    mom = block(mechanism=mechanism, router=router)
    state, index = state_of(mom), torch.tensor([2, 0, 2])
    chosen = state.select(index)
    assert chosen.batch_size == 3
    for before, after in zip(tensors(state), tensors(chosen), strict=True):
        assert torch.equal(after, before[index])
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    y = mom(x, state).hidden_states
    torch.testing.assert_close(mom(x[index], chosen).hidden_states, y[index])


def test_select_copies():
    state = state_of(block())
    kept = state.clone()
    for tensor in tensors(state.select(torch.arange(4))):
        tensor.zero_()
    assert_same(state, kept)


def test_select_none():
    assert state_of(block()).select(torch.zeros(0, dtype=torch.long)).batch_size == 0


def test_reorder_is_select_in_place():
    state, index = state_of(block()), torch.tensor([3, 3, 0, 1])
    expected, before = state.select(index), tensors(state)
    assert state.reorder(index) is None
    assert_same(state, expected)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(tensors(state), before, strict=True))


@pytest.mark.parametrize("index", [torch.tensor([0, 1]), torch.tensor([[0, 1, 2, 3]])])
def test_reorder_keeps_the_number_of_sequences(index):
    with pytest.raises(InputError, match=r"index has shape .*; allowed: \[B\] = \[4\]"):
        state_of(block()).reorder(index)


def test_clone_shares_nothing():
    state = state_of(block())
    copy, kept = state.clone(), [t.tolist() for t in tensors(state)]
    assert_same(state, copy)
    for tensor in tensors(copy):
        tensor.zero_()
    assert [t.tolist() for t in tensors(state)] == kept


def test_detach_cuts_the_graph():
    mom = block()
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    state = mom(x).state
    assert all(t.requires_grad for t in tensors(state))
    assert not any(t.requires_grad for t in tensors(state.detach()))
    assert_same(state, state.detach())
    mom(torch.randn(2, 6, 12, dtype=torch.float64), state.detach()).hidden_states.sum().backward()
    assert x.grad is None


def test_gradients_pass_through_a_state():
    mom = block()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, 12, dtype=torch.float64)
    (whole,) = torch.autograd.grad((mom(x).hidden_states * weight).sum(), x)
    first = mom(x[:, :4])
    second = mom(x[:, 4:], first.state)
    y = torch.cat([first.hidden_states, second.hidden_states], 1)
    (cut,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("mechanism", ["gated_deltanet", "ttt_linear"])
def test_reset_starts_some_sequences_again(mechanism):
    """Back to what the rule starts from, which need not be zeros."""
    mom = block(mechanism=mechanism)
    state = state_of(mom)
    before, fresh = state.clone(), mom.initial_state(4)
    where = torch.tensor([False, True, False, True])
    with torch.no_grad():
        state.reset(where, fresh)
    for mine, was, new in zip(tensors(state), tensors(before), tensors(fresh), strict=True):
        assert torch.equal(mine[where], new[where])
        assert torch.equal(mine[~where], was[~where])
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(mom(x, state).hidden_states[where], mom(x).hidden_states[where])


def test_reset_forgets_nan():
    mom = block()
    state = state_of(mom)
    for tensor in tensors(state):
        tensor[1] = torch.nan
    state.reset(torch.tensor([False, True, False, False]), mom.initial_state(4))
    assert all(t.isfinite().all() for t in tensors(state))


@pytest.mark.parametrize("where", [torch.tensor([True]), torch.ones(5, dtype=torch.bool), torch.tensor([1, 0, 1, 0])])
def test_reset_names_each_sequence(where):
    """One flag must not stand for all of them, nor indices for flags."""
    mom = block()
    with pytest.raises(InputError, match=r"where is .*; allowed: bool, \[B\] = \[4\]"):
        state_of(mom).reset(where, mom.initial_state(4))


def test_nbytes():
    state = MoMState(
        {"S": torch.zeros(2, 3, 4), "m": torch.zeros(2, 5, dtype=torch.float64)}, {"q": torch.zeros(2, 7).bfloat16()}
    )
    assert state.nbytes() == 2 * (3 * 4 * 4 + 5 * 8 + 7 * 2)
    mom = block()
    assert mom.initial_state(3).nbytes() == 3 * mom.initial_state(1).nbytes()


def test_step_works_in_place_on_any_state():
    """On one made by hand, one that a forward pass left, and one chosen from another; on nothing but its rows."""
    mom = block()
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    whole = mom(x)
    with torch.no_grad():
        prompt = mom(x[:, :5]).state
    for state in (prompt.clone(), prompt, state_of(mom, 3)):
        given = tensors(state)
        expected = mom(x[:, 5:], state).state
        out = mom.step(x[:, 5], state)
        assert out.state is state
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(tensors(state), given, strict=True))
        torch.testing.assert_close((state.recurrent, state.conv), (expected.recurrent, expected.conv))
    torch.testing.assert_close(prompt.recurrent, whole.state.recurrent)


def test_step_leaves_other_memories_alone():
    mom = block()
    state = mom.initial_state(3)
    for t in range(6):
        before = state.clone()
        out = mom.step(torch.randn(3, 12, dtype=torch.float64), state)
        for b in range(3):
            chosen = {*out.routing.memory_ids[b].tolist(), 4}
            for m in range(5):
                same = all(torch.equal(x[b, m], y[b, m]) for x, y in zip(tensors(before), tensors(state), strict=True))
                assert same == (m not in chosen), (t, b, m)


def test_beams_do_not_disturb_each_other():
    """A prefix shared by two continuations serves both."""
    mom = block()
    prefix = state_of(mom, 1)
    kept = prefix.clone()
    beams = prefix.select(torch.tensor([0, 0]))
    tokens = torch.randn(2, 12, dtype=torch.float64)
    y = mom.step(tokens, beams).hidden_states
    assert_same(prefix, kept)
    for b in range(2):
        torch.testing.assert_close(mom.step(tokens[b : b + 1], prefix.clone()).hidden_states[0], y[b])
    swapped = beams.clone()
    swapped.reorder(torch.tensor([1, 0]))
    assert differs(swapped, beams)
