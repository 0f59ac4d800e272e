"""Decoding from a pool: rows of a batch go on with chosen sequences of a larger state, and padding rows do nothing."""

import pytest
import torch
from torch import Tensor

from momkit import MoMBlock, MoMSpec, MoMState
from momkit.errors import InputError


def block(**fields: object) -> MoMBlock:
    torch.manual_seed(0)
    return MoMSpec(**({"hidden_size": 12} | fields)).build().double()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefilled(mom: MoMBlock, batch_size: int = 5) -> MoMState:
    return mom(random(batch_size, 7, 12)).state.detach()


def tensors(state: MoMState) -> list[Tensor]:
    return [*state.recurrent.values(), *state.conv.values()]


def assert_same(state: MoMState, other: MoMState) -> None:
    for a, b in zip(tensors(state), tensors(other), strict=True):
        torch.testing.assert_close(a, b)


LAYERS = [
    {},
    {"shared_memory": False, "conv_size": None},
    {"router": "read_write"},
    {"router": "dense", "output_gate": False},
    {"mechanism": "mamba"},
    {"mechanism": "gsa"},
]


@pytest.mark.parametrize("fields", LAYERS)
@pytest.mark.parametrize("index", [[3, 0], [2, -1, 4, -1], [-1, 0, -1], [4, 3, 2, 1, 0, -1], [-1, -1], []])
def test_rows_of_a_pool_are_steps_of_their_own(fields, index):
    mom = block(**fields)
    pool, x = prefilled(mom), random(len(index), 12, seed=2)
    expected, before = pool.clone(), pool.clone()
    rows = torch.tensor(index, dtype=torch.long)
    live = rows >= 0
    alone = expected.select(rows[live])
    y = mom.step(x[live], alone).hidden_states
    out = mom.step(x, pool, rows)
    torch.testing.assert_close(out.hidden_states[live], y)
    assert torch.equal(out.hidden_states[~live], torch.zeros_like(x[~live]))
    idle = [s for s in range(5) if s not in index]
    for mine, was, wanted in zip(tensors(pool), tensors(before), tensors(alone), strict=True):
        torch.testing.assert_close(mine[rows[live]], wanted)
        assert torch.equal(mine[idle], was[idle])
    assert out.state is pool


def test_all_rows_in_order_are_no_index():
    mom = block()
    pool, x = prefilled(mom), random(5, 12, seed=2)
    other = pool.clone()
    assert torch.equal(mom.step(x, pool, torch.arange(5)).hidden_states, mom.step(x, other).hidden_states)
    assert_same(pool, other)


def test_padding_has_no_part_in_the_loss_and_spreads_no_nan():
    mom = block()
    pool, x = prefilled(mom), random(3, 12, seed=2)
    x[1] = torch.nan
    rows = torch.tensor([4, -1, 0], dtype=torch.int32)
    other = pool.select(torch.tensor([4, 0]))
    out, expected = mom.step(x, pool, rows), mom.step(x[[0, 2]], other)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    torch.testing.assert_close(out.hidden_states[[0, 2]], expected.hidden_states)
    assert torch.equal(out.hidden_states[1], torch.zeros(12, dtype=torch.float64))
    assert all(t.isfinite().all() for t in tensors(pool))


@pytest.mark.parametrize("router", ["softmax_topk", "read_write"])
def test_serving_from_one_pool(router):
    """Prefill in chunks, decode while batches change, fork a beam and reuse a prefix: as each sequence on its own."""
    mom = block(router=router)
    x = random(3, 9, 12, seed=3)
    whole = mom(x).hidden_states
    first = mom(x[:, :4])
    second = mom(x[:, 4:6], first.state)
    pool = second.state.detach()
    for t, index in ((6, [0, -1, 2]), (7, [2, 0, -1])):
        rows = torch.tensor(index)
        y = mom.step(x[rows.clamp_min(0), t], pool, rows).hidden_states
        torch.testing.assert_close(y[rows >= 0], whole[rows[rows >= 0], t])
    # sequence 1 has waited; two more go on from where it is, each with a token of its own
    pool.reorder(torch.tensor([1, 1, 2]))
    tokens = torch.stack([x[1, 6], x[0, 0]])
    forked = mom.step(tokens, pool, torch.tensor([0, 1])).hidden_states
    torch.testing.assert_close(forked[0], whole[1, 6])
    torch.testing.assert_close(forked[1], mom(torch.cat([x[1, :6], x[0, :1]])[None]).hidden_states[0, -1])
    torch.testing.assert_close(mom.step(x[2:, 8], pool, torch.tensor([2])).hidden_states[0], whole[2, 8])


@pytest.mark.parametrize(
    "index, message",
    [
        (torch.tensor([0, 1, 2]), r"state_index has shape \(3,\) on cpu; allowed: \[B\] = \[2\] on cpu"),
        (torch.tensor([0.0, 1.0]), "state_index is torch.float32; allowed: an int32 or int64 tensor"),
        ([0, 1], "state_index is list; allowed"),
        (torch.tensor([0, 5]), r"state_index holds \[0, 5\]; allowed: 0 to 4, and -1 for padding"),
        (torch.tensor([3, 3]), "no pool row twice"),
    ],
)
def test_wrong_indices_are_named(index, message):
    mom = block()
    with pytest.raises(InputError, match=message):
        mom.step(random(2, 12), prefilled(mom), index)


def test_a_pool_has_as_many_sequences_in_all_states():
    mom = block()
    pool = prefilled(mom)
    pool.conv["k"] = pool.conv["k"][:4]
    with pytest.raises(InputError, match=r"state.conv\['k'\] has shape \(4, 5, 3, 12\); allowed: \(5, 5, 3, 12\)"):
        mom.step(random(2, 12), pool, torch.tensor([0, 1]))
