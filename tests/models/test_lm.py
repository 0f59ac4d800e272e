import pytest
import torch
from pydantic import ValidationError

from momkit.errors import InputError
from momkit.models.lm import MoMLM
from momkit.models.spec import LMSpec
from momkit.registry import registry
from momkit.tasks.base import IGNORE

HYBRIDS = [(), (1,), (0, 1)]


def make(attention_layers=(), dtype=torch.float64, **changes):
    torch.manual_seed(0)
    spec = {
        "vocab_size": 30,
        "hidden_size": 16,
        "mlp_ratio": 2,
        "attention_layers": attention_layers,
        "block": {"mechanism": {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 4}, "num_memories": 3},
    }
    return MoMLM(LMSpec.model_validate(spec | changes)).to(dtype)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attention_layers", HYBRIDS)
def test_packed_is_padded_is_single(attention_layers):
    model = make(attention_layers)
    lengths = [5, 0, 9, 1, 3]
    rows = [torch.randint(30, (n,)) for n in lengths]
    packed = model(torch.cat(rows), cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)).hidden_states.split(lengths)
    left, right = torch.full((5, 9), 7), torch.full((5, 9), 7)
    for b, row in enumerate(rows):
        left[b, 9 - len(row) :], right[b, : len(row)] = row, row
    at = torch.arange(9)
    n = torch.tensor(lengths)[:, None]
    padded_left = model(left, mask=at >= 9 - n).hidden_states
    padded_right = model(right, mask=at < n).hidden_states
    for b, row in enumerate(rows):
        alone = model(row).hidden_states
        close(packed[b], alone)
        close(padded_left[b, 9 - len(row) :], alone)
        close(padded_right[b, : len(row)], alone)
    assert (padded_right[at >= n] == 0).all()


@pytest.mark.parametrize("attention_layers", HYBRIDS)
def test_future_changes_nothing(attention_layers):
    model = make(attention_layers)
    tokens = torch.randint(30, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (tokens[:, 7:] + 1) % 30
    close(model(tokens).hidden_states[:, :7], model(other).hidden_states[:, :7])


@pytest.mark.parametrize("attention_layers", HYBRIDS)
def test_any_cut_is_the_whole(attention_layers):
    model = make(attention_layers)
    lengths = [6, 4, 9]
    rows = [torch.randint(30, (n,)) for n in lengths]
    whole = [model(row).hidden_states for row in rows]
    state, done = None, [0, 0, 0]
    for cuts in ([2, 4, 0], [1, 0, 9], [3, 0, 0]):
        parts = [row[at : at + n] for row, at, n in zip(rows, done, cuts, strict=True)]
        before = None if state is None else state.clone()
        out = model(torch.cat(parts), state, cu_seqlens=torch.tensor([0, *cuts]).cumsum(0))
        for b, piece in enumerate(out.hidden_states.split(cuts)):
            close(piece, whole[b][done[b] : done[b] + cuts[b]])
        if state is not None:
            assert state.nbytes() == before.nbytes()
        state, done = out.state, [at + n for at, n in zip(done, cuts, strict=True)]


@pytest.mark.parametrize("attention_layers", HYBRIDS)
@pytest.mark.parametrize("prompt", [0, 4])
def test_decode_is_forward(attention_layers, prompt):
    model = make(attention_layers)
    tokens = torch.randint(30, (3, 9))
    logits = model.logits(model(tokens).hidden_states)
    state = model(tokens[:, :prompt]).state if prompt else model.initial_state(3)
    for t in range(prompt, 9):
        close(model.step(tokens[:, t], state), logits[:, t].detach())


@pytest.mark.parametrize("mechanism", registry().names("mechanism"))
def test_every_rule_decodes_in_constant_memory(mechanism):
    model = make(dtype=torch.float32, block={"mechanism": mechanism, "num_memories": 2})
    tokens = torch.randint(30, (2, 5))
    logits = model.logits(model(tokens).hidden_states)
    state = model.initial_state(2)
    size = state.nbytes()
    steps = torch.stack([model.step(tokens[:, t], state) for t in range(5)], 1)
    torch.testing.assert_close(steps, logits.detach(), rtol=1e-3, atol=1e-4)
    assert state.nbytes() == size


def test_attention_state_grows():
    model = make((1,))
    state = model.initial_state(1)
    sizes = []
    for _ in range(2):
        model.step(torch.tensor([3]), state)
        sizes.append(state.nbytes())
    assert sizes[1] - sizes[0] == 2 * 16 * 8  # one key and one value of hidden_size float64


def test_select_reorders_sequences():
    model = make((1,))
    tokens = torch.randint(30, (3, 6))
    order = torch.tensor([2, 2, 0])
    state = model(tokens[:, :5]).state.select(order)
    close(model.step(tokens[order, 5], state), model.logits(model(tokens).hidden_states)[order, 5].detach())


@pytest.mark.parametrize("tie", [True, False])
def test_chunked_loss_is_whole_loss(tie):
    model = make(tie_embeddings=tie)
    tokens = torch.randint(30, (40,))
    targets = torch.where(torch.rand(40) < 0.3, IGNORE, tokens.roll(-1))
    cu_seqlens = torch.tensor([0, 13, 40])
    grads = []
    for chunk_tokens in (1000, 7, 1):
        model.zero_grad()
        out = model.loss(tokens, targets, cu_seqlens, chunk_tokens=chunk_tokens)
        out.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        hidden = model(tokens, cu_seqlens=cu_seqlens).hidden_states
        whole = torch.nn.functional.cross_entropy(model.logits(hidden), targets, ignore_index=IGNORE)
        close(out.cross_entropy, whole)
        close(out.loss, whole + 0.01 * out.aux_loss)
        assert out.num_targets == int((targets != IGNORE).sum())
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            close(a, b)


def test_logits_never_exist_whole(monkeypatch):
    model = make()
    seen = []
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or whole(hidden))
    tokens = torch.randint(30, (40,))
    model.loss(tokens, tokens, chunk_tokens=8).loss.backward()
    assert max(seen) == 8
    assert sum(seen) == 80  # each chunk once forward, once again for its backward


def test_nothing_asked_is_a_loss_of_zero():
    model = make(aux_loss_scale=0)
    out = model.loss(torch.randint(30, (6,)), torch.full((6,), IGNORE))
    out.loss.backward()
    assert out.loss == 0 and out.num_targets == 0


@pytest.mark.parametrize("attention_layers", HYBRIDS)
def test_no_tokens(attention_layers):
    model = make(attention_layers)
    state = model(torch.randint(30, (2, 3))).state
    out = model(torch.zeros(2, 0, dtype=torch.long), state)
    assert out.hidden_states.shape == (2, 0, 16)
    tokens = torch.randint(30, (2,))
    close(model.step(tokens, out.state), model.step(tokens, state))


def test_every_parameter_gets_a_gradient():
    model = make((1,), tie_embeddings=False)
    tokens = torch.randint(30, (40,))
    model.loss(tokens, tokens.roll(-1)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parameter_groups_hold_each_once():
    model = make((1,))
    decayed, others = (group["params"] for group in model.parameter_groups(0.1))
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert all(p.ndim >= 2 for p in decayed)


def test_residual_projections_start_small():
    model = make(dtype=torch.float32, hidden_size=64, num_layers=8, block={"mechanism": "deltanet"})
    layer = model.layers[3]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for weight in (layer.mlp.down_proj.weight, layer.mixer.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_spec_round_trip():
    spec = make((1,)).spec
    assert LMSpec.from_yaml(spec.to_yaml()) == spec
    assert LMSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.block.hidden_size == 16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block": {"hidden_size": 8}}, "block.hidden_size"),
        ({"attention_layers": [2]}, "attention_layers"),
        ({"attention_layers": [1, 0]}, "attention_layers"),
        ({"attention_layers": [-1]}, "attention_layers"),
        ({"attention_layers": [0], "attention_heads": 3}, "attention_heads"),
        ({"attention_layer": [0]}, "attention_layer"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"dropout": 1}, "dropout"),
        ({"num_layers": 0}, "num_layers"),
        ({"block": {"mechanism": "nothing"}}, "nothing"),
    ],
)
def test_spec_refuses(changes, named):
    with pytest.raises(ValidationError, match=named):
        make(**changes)


def test_inputs_refused():
    model = make()
    tokens = torch.randint(30, (2, 4))
    for bad, named in (
        (tokens.float(), "tokens"),
        (tokens + 30, "tokens"),
        (-tokens - 1, "tokens"),
        (tokens[None], "tokens"),
        ([1, 2], "tokens"),
    ):
        with pytest.raises(InputError, match=named):
            model(bad)
    with pytest.raises(InputError, match="cu_seqlens"):
        model(tokens, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(InputError, match="cu_seqlens"):
        model(tokens[0], cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(InputError, match="mask"):
        model(tokens, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="mask"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 4]), mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="targets"):
        model.loss(tokens, tokens[0])
    with pytest.raises(InputError, match="tokens"):
        model.step(tokens, model.initial_state(2))
