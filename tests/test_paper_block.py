"""The default block against the paper's layer, written out once more in numpy, one head at a time.

Nothing of the library is used by `PaperLayer` but the values of a block's weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from momkit import MoMBlock, MoMSpec, MoMState

TOLERANCE = 1e-10
D, M, H, K, V = 10, 4, 2, 3, 4


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@dataclass
class Memory:
    """S: `[H, K, V]`. seen: the last W - 1 inputs of each short convolution, oldest first."""

    S: np.ndarray
    seen: dict[str, list[np.ndarray]]


class PaperLayer:
    """Gated DeltaNet memories behind a softmax router, from the weights of a `MoMBlock`."""

    def __init__(self, block: MoMBlock) -> None:
        w = {name: tensor.detach().double().numpy() for name, tensor in block.state_dict().items()}
        spec = block.spec
        self.top_k, self.shared, self.eps = spec.router.top_k, spec.shared_memory, spec.norm_eps
        self.num_memories, self.width = spec.num_memories, spec.conv_size or 1
        self.router = w["router.weight"]
        self.A_log, self.dt_bias = w["mechanism.A_log"], w["mechanism.dt_bias"]
        self.norm, self.out = w["norm_weight"], w["out_proj.weight"]
        self.gate = w["gate_proj.weight"] if spec.output_gate else None
        self.q = w["project.shared_weight"]
        self.heads, self.v_dim = len(self.A_log), len(self.norm)
        self.k_dim = len(self.q) // self.heads
        key, value = self.heads * self.k_dim, self.heads * self.v_dim
        # rows of a memory's projections: keys, values, write strengths, decay inputs
        self.k, self.v, self.b, self.a = np.split(
            w["project.memory_weight"], [key, key + value, key + value + self.heads], 1
        )
        self.conv = {name: w[f"project.{name}_conv_weight"] for name in "qkv"} if spec.conv_size else {}

    def fresh(self) -> list[Memory]:
        """Memories of one sequence before its first token, the shared one last."""
        channels = {"q": len(self.q), "k": self.k.shape[1], "v": self.v.shape[1]}
        return [
            Memory(
                np.zeros((self.heads, self.k_dim, self.v_dim)),
                {name: [np.zeros(n)] * (self.width - 1) for name, n in channels.items()},
            )
            for _ in range(self.num_memories + self.shared)
        ]

    def sequence(self, x: np.ndarray, memories: list[Memory]) -> np.ndarray:
        """`[T, D]` -> `[T, D]`, one token after the other."""
        return np.array([self.token(row, memories) for row in x]).reshape(x.shape)

    def token(self, x: np.ndarray, memories: list[Memory]) -> np.ndarray:
        logits = self.router @ x
        chosen = sorted(range(self.num_memories), key=lambda m: -logits[m])[: self.top_k]
        p = softmax(logits)
        total = sum(p[m] for m in chosen)
        o = np.zeros((self.heads, self.v_dim))
        for m in chosen:
            o += p[m] / total * self.visit(memories[m], m, x)
        if self.shared:
            o += self.visit(memories[-1], self.num_memories, x)
        gate = None if self.gate is None else silu(self.gate @ x).reshape(o.shape)
        for h in range(self.heads):
            o[h] = o[h] / np.sqrt((o[h] ** 2).mean() + self.eps) * self.norm
            if gate is not None:
                o[h] *= gate[h]
        return self.out @ o.reshape(-1)

    def visit(self, memory: Memory, m: int, x: np.ndarray) -> np.ndarray:
        """Write x to memory m, then read it."""
        q = self.convolved("q", self.q @ x, memory).reshape(self.heads, self.k_dim)
        k = self.convolved("k", self.k[m] @ x, memory).reshape(self.heads, self.k_dim)
        v = self.convolved("v", self.v[m] @ x, memory).reshape(self.heads, self.v_dim)
        beta = sigmoid(self.b[m] @ x)
        decay = np.exp(-np.exp(self.A_log) * np.logaddexp(0, self.a[m] @ x + self.dt_bias))
        o = np.zeros_like(v)
        for h in range(self.heads):
            key = k[h] / np.sqrt((k[h] ** 2).sum() + 1e-6)
            query = q[h] / np.sqrt((q[h] ** 2).sum() + 1e-6)
            S = decay[h] * memory.S[h]
            S = S + beta[h] * np.outer(key, v[h] - S.T @ key)
            memory.S[h] = S
            o[h] = self.k_dim**-0.5 * (S.T @ query)
        return o

    def convolved(self, name: str, value: np.ndarray, memory: Memory) -> np.ndarray:
        if not self.conv:
            return silu(value)
        window = [*memory.seen[name], value]
        memory.seen[name] = window[1:]
        return silu(sum(self.conv[name][:, w] * window[w] for w in range(self.width)))


def make(**fields: object) -> MoMBlock:
    """A float64 block in training mode, none of whose weights is at a special value."""
    torch.manual_seed(3)
    sizes = {"kind": "gated_deltanet", "num_heads": H, "head_dim": K, "head_v_dim": V}
    block = MoMSpec(**({"hidden_size": D, "mechanism": sizes} | fields)).build().double()
    with torch.no_grad():
        block.norm_weight.uniform_(0.5, 1.5)
        block.mechanism.A_log.uniform_(-2, 1)
        block.mechanism.dt_bias.uniform_(-2, 1)
    return block


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


def close_states(state: MoMState, expected: list[list[Memory]]) -> None:
    """A state against the memories of each sequence."""
    for b, memories in enumerate(expected):
        for m, memory in enumerate(memories):
            close(state.recurrent["S"][b, m], memory.S)
            for name in state.conv:
                close(state.conv[name][b, m], np.array(memory.seen[name]).reshape(state.conv[name].shape[2:]))


def paper(block: MoMBlock, sequences: list[Tensor], memories: list[list[Memory]] | None = None) -> Iterator[np.ndarray]:
    layer = PaperLayer(block)
    for b, x in enumerate(sequences):
        yield layer.sequence(x.numpy(), layer.fresh() if memories is None else memories[b])


def top_k(k: int) -> dict[str, object]:
    return {"kind": "softmax_topk", "top_k": k}


LAYERS: dict[str, dict[str, object]] = {
    "paper": {},
    "default": {"mechanism": "gated_deltanet", "hidden_size": 16},
    "one memory": {"num_memories": 1, "router": top_k(1), "shared_memory": False},
    "one memory and the shared one": {"num_memories": 1, "router": top_k(1)},
    "no shared memory": {"shared_memory": False},
    "no convolution": {"conv_size": None},
    "convolution of one": {"conv_size": 1},
    "convolution of two": {"conv_size": 2},
    "no output gate": {"output_gate": False},
    "bare": {"conv_size": None, "output_gate": False, "shared_memory": False},
    "top 1": {"router": top_k(1)},
    "top 3 of 5": {"router": top_k(3), "num_memories": 5},
    "all of 3": {"router": top_k(3), "num_memories": 3},
    "large eps": {"norm_eps": 0.3},
    "heads narrower than hidden_size": {"hidden_size": 33},
}
every_layer = pytest.mark.parametrize("fields", LAYERS.values(), ids=[name.replace(" ", "-") for name in LAYERS])


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch(fields, training):
    block = make(**fields).train(training)
    x = tokens(3, 14, block.spec.hidden_size)
    memories = [PaperLayer(block).fresh() for _ in x]
    out = block(x)
    close(out.hidden_states, np.stack(list(paper(block, list(x), memories))))
    close_states(out.state, memories)


@every_layer
def test_packed_and_continued(fields):
    """Sequences empty, of one token, shorter than the convolution; then more of each, from the state they left."""
    block = make(**fields)
    memories = [PaperLayer(block).fresh() for _ in range(6)]
    state = None
    for part, lengths in enumerate(([0, 1, 2, 9, 0, 3], [2, 0, 1, 1, 0, 7], [1, 1, 1, 1, 1, 1])):
        x = tokens(sum(lengths), block.spec.hidden_size, seed=part)
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
        out = block(x, state, cu_seqlens=cu_seqlens)
        close(out.hidden_states, np.concatenate(list(paper(block, list(x.split(lengths)), memories))))
        close_states(out.state, memories)
        state = out.state


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_long(backend):
    """Longer than any chunk, so that state passes between chunks."""
    block = make()
    block.backend = backend
    x = tokens(150, D)
    memories = [PaperLayer(block).fresh()]
    out = block(x)
    close(out.hidden_states, next(paper(block, [x], memories)))
    close_states(out.state, memories)


@every_layer
@pytest.mark.parametrize("side", ["left", "right", "both", "scattered"])
def test_masked(fields, side):
    """A masked token is as if it were not there, whatever it holds; its output is zero."""
    block = make(**fields)
    x = tokens(5, 9, block.spec.hidden_size)
    kept, at = torch.tensor([9, 5, 1, 0, 7])[:, None], torch.arange(9)
    mask = {
        "left": at >= 9 - kept,
        "right": at < kept,
        "both": (at >= 2) & (at < 2 + kept),
        "scattered": (at * 7 + kept) % 3 > 0,
    }[side]
    memories = [PaperLayer(block).fresh() for _ in x]
    expected = np.zeros(x.shape)
    for b, y in enumerate(paper(block, [row[keep] for row, keep in zip(x, mask, strict=True)], memories)):
        expected[b, mask[b].numpy()] = y
    out = block(torch.where(mask[..., None], x, torch.nan), mask=mask)
    close(out.hidden_states, expected)
    close_states(out.state, memories)
    assert (out.hidden_states[~mask] == 0).all()
    assert out.aux_loss.isfinite()


def test_masked_and_packed_and_continued():
    block = make()
    memories = [PaperLayer(block).fresh() for _ in range(3)]
    state = None
    for part in range(3):
        x, cu_seqlens = tokens(11, D, seed=part), torch.tensor([0, 4, 4, 11])
        mask = torch.rand(11, generator=torch.Generator().manual_seed(part)) < 0.6
        sequences = [x[a:b][mask[a:b]] for a, b in ((0, 4), (4, 4), (4, 11))]
        out = block(x, state, cu_seqlens=cu_seqlens, mask=mask)
        close(out.hidden_states[mask], np.concatenate(list(paper(block, sequences, memories))))
        close_states(out.state, memories)
        state = out.state


@every_layer
def test_decoding(fields):
    """Token by token, from nothing and from the state that a batch of prompts left."""
    block = make(**fields)
    x = tokens(3, 9, block.spec.hidden_size)
    memories = [PaperLayer(block).fresh() for _ in x]
    expected = np.stack(list(paper(block, list(x), memories)))
    for prompt in (0, 4):
        state = block(x[:, :prompt]).state.detach() if prompt else block.initial_state(3)
        for t in range(prompt, 9):
            close(block.step(x[:, t], state).hidden_states, expected[:, t])
        close_states(state, memories)


def test_weights_that_underflow():
    """A weight of zero mixes nothing in, but its memory is written all the same."""
    block = make()
    with torch.no_grad():
        block.router.weight.mul_(1e4)
    x = tokens(2, 12, D)
    memories = [PaperLayer(block).fresh() for _ in x]
    out = block(x)
    assert (out.routing.weights[:, 1] == 0).any()
    close(out.hidden_states, np.stack(list(paper(block, list(x), memories))))
    close_states(out.state, memories)


# faults of published implementations


def changed(x: Tensor, *where: object) -> Tensor:
    other = x.clone()
    other[where] = tokens(*other[where].shape, seed=99)
    return other


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared_memory", [True, False])
def test_future_does_not_leak(training, shared_memory):
    """The short convolution must not run over from one memory's tokens into the next one's."""
    block = make(shared_memory=shared_memory).train(training)
    x = tokens(1, 40, D)
    before = block(x).hidden_states
    for t in (1, 13, 39):
        after = block(changed(x, slice(None), slice(t, None))).hidden_states
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-14)
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_other_sequences_do_not_leak(training):
    block = make().train(training)
    x = tokens(4, 12, D)
    before = block(x).hidden_states
    for b in range(4):
        after = block(changed(x, b)).hidden_states
        others = [i for i in range(4) if i != b]
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-14)


def test_future_does_not_leak_into_gradients():
    block = make()
    x = tokens(2, 12, D).requires_grad_()
    (block(x).hidden_states[0, 5].sum()).backward()
    assert (x.grad[1] == 0).all()
    assert (x.grad[0, 6:] == 0).all()
    assert (x.grad[0, :6] != 0).any(-1).all()


def test_training_is_evaluation():
    block = make()
    x = tokens(2, 20, D)
    assert torch.equal(block.train()(x).hidden_states, block.eval()(x).hidden_states)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("length", [2, 5, 20])
def test_short_sequences_give_gradients(training, length):
    """Through every parameter, in training and evaluation, shorter than the convolution or longer."""
    block = make().train(training)
    out = block(tokens(8, length, D))
    (out.hidden_states.square().sum() + out.aux_loss).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_continuation_of_few_tokens():
    """Pieces shorter than the convolution, which reach only some of the memories."""
    block = make(router=top_k(1))
    x = tokens(1, 30, D)
    whole = block(x)
    state, parts, at = None, [], 0
    for length in (7, 1, 2, 3, 1, 4, 0, 5, 7):
        out = block(x[:, at : at + length], state)
        parts.append(out.hidden_states)
        state, at = out.state, at + length
    torch.testing.assert_close(torch.cat(parts, 1), whole.hidden_states, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.recurrent, whole.state.recurrent, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.conv, whole.state.conv, rtol=0, atol=1e-12)


def test_memories_without_tokens_stay():
    """Decay is a write: a memory that no token chose keeps its state to the last bit."""
    block = make(router=top_k(1))
    state = block(tokens(2, 30, D)).state
    out = block(tokens(2, 1, D, seed=5), state)
    for b in range(2):
        chosen = [int(out.routing.memory_ids[b, 0]), M]
        for m in range(M + 1):
            kept = torch.equal(out.state.recurrent["S"][b, m], state.recurrent["S"][b, m])
            assert kept == (m not in chosen)
            assert torch.equal(out.state.conv["k"][b, m], state.conv["k"][b, m]) == (m not in chosen)


def test_masked_row_keeps_its_state():
    block = make()
    state = block(tokens(3, 6, D)).state
    out = block(tokens(3, 1, D, seed=5), state, mask=torch.tensor([[True], [False], [True]]))
    for before, after in ((state.recurrent, out.state.recurrent), (state.conv, out.state.conv)):
        for name in before:
            assert torch.equal(after[name][1], before[name][1])
            assert not torch.equal(after[name][0], before[name][0])
    assert (out.hidden_states[1] == 0).all()


def test_a_given_state_is_not_changed():
    block = make()
    state = block(tokens(2, 6, D)).state
    kept = state.clone()
    block(tokens(2, 6, D, seed=1), state)
    torch.testing.assert_close((state.recurrent, state.conv), (kept.recurrent, kept.conv), rtol=0, atol=0)


def test_balance_is_judged_layer_by_layer():
    """Two layers collapsed on opposite pairs of memories are not balanced together: each costs twice the optimum."""
    x = torch.ones(1, 8, D, dtype=torch.float64)
    for favoured in ([0, 1], [2, 3]):
        block = make()
        with torch.no_grad():
            block.router.weight.zero_()[favoured] = 100.0
        torch.testing.assert_close(block(x).aux_loss, torch.tensor(4.0, dtype=torch.float64))


def test_padding_is_not_counted_as_load():
    block = make()
    x = tokens(2, 10, D)
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    padded = block(torch.where(mask[..., None], x, 0.0), mask=mask)
    packed = block(x[mask], cu_seqlens=torch.tensor([0, 10, 14]))
    torch.testing.assert_close(padded.aux_loss, packed.aux_loss)
    p = torch.softmax(x[mask] @ block.router.weight.T, -1)
    counts = torch.stack([(packed.routing.memory_ids == m).sum() for m in range(M)])
    torch.testing.assert_close(packed.aux_loss, M * (counts / 14 * p.mean(0)).sum())


def test_nothing_but_padding():
    block = make()
    out = block(tokens(2, 3, D), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert out.aux_loss == 0
    (out.hidden_states.sum() + out.aux_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())
    fresh = block.initial_state(2)
    assert all(torch.equal(out.state.recurrent[n], fresh.recurrent[n]) for n in fresh.recurrent)
    assert all(torch.equal(out.state.conv[n], fresh.conv[n]) for n in fresh.conv)
