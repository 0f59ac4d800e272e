"""The block as a module: parameters, precisions, copies, checkpoints, and every rule and router inside it."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from momkit import MoMBlock, MoMOutput, MoMSpec
from momkit.block import is_decayed, parameter_groups
from momkit.mechanisms.base import HeadSpec
from momkit.registry import find_mechanism, registry
from momkit.scan import BackendChoice
from momkit.testing.targets import backends_for

D = 12
RULES = registry().names("mechanism")
ROUTERS = registry().names("router")
every_rule = pytest.mark.parametrize("mechanism", RULES)
# every rule with the paper's router, every router with the paper's rule
PAIRS = [(rule, "softmax_topk") for rule in RULES] + [("gated_deltanet", r) for r in ROUTERS if r != "softmax_topk"]
every_block = pytest.mark.parametrize(("mechanism", "router"), PAIRS, ids=["-".join(pair) for pair in PAIRS])


def make(seed: int = 0, **fields: object) -> MoMBlock:
    torch.manual_seed(seed)
    return MoMSpec(**({"hidden_size": D} | fields)).build()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(out: MoMOutput) -> Tensor:
    return out.hidden_states.float().square().sum() + out.aux_loss


def small_heads(mechanism: str) -> dict[str, int]:
    """Three heads of 5, or 7 channels."""
    heads = issubclass(find_mechanism(mechanism).Spec, HeadSpec)
    return {"num_heads": 3, "head_dim": 5} if heads else {"channels": 7}


# parameters


@every_block
def test_parameter_groups_hold_each_parameter_once(mechanism, router):
    block = make(mechanism=mechanism, router=router)
    decayed, kept = block.parameter_groups(0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    grouped = [id(p) for p in decayed["params"] + kept["params"]]
    assert sorted(grouped) == sorted(id(p) for p in block.parameters())
    torch.optim.AdamW([decayed, kept])


@every_block
def test_norms_biases_and_gates_are_not_decayed(mechanism, router):
    block = make(mechanism=mechanism, router=router)
    decayed = {id(p) for p in block.parameter_groups()[0]["params"]}
    names = {id(p): n for n, p in block.named_parameters()}
    for n, p in block.named_parameters():
        leaf = n.rsplit(".", 1)[-1]
        if p.ndim < 2 or leaf in ("A_log", "dt_bias", "D") or "bias" in n or "norm" in n:
            assert id(p) not in decayed, n
    # what multiplies tokens is
    assert {"out_proj.weight", "gate_proj.weight"} <= {names[i] for i in decayed}
    assert any(n.startswith("project.") for n in (names[i] for i in decayed))


@every_rule
def test_vectors_of_a_head_are_not_decayed(mechanism):
    """One number a head, or a channel of a head, is a bias, a gain or a gate, whatever its name."""
    block = make(hidden_size=24, mechanism={"kind": mechanism} | small_heads(mechanism))
    sizes = block.mechanism.sizes
    vectors = {(sizes[a], sizes[b]) for a, b in ("HK", "HV")} if "H" in sizes else set()
    decayed = {id(p) for p in block.parameter_groups()[0]["params"]}
    wrong = [n for n, p in block.mechanism.named_parameters() if tuple(p.shape) in vectors and id(p) in decayed]
    assert not wrong


def test_the_papers_block_by_name():
    block = make()
    decayed, kept = block.parameter_groups()
    names = {id(p): n for n, p in block.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {"mechanism.A_log", "mechanism.dt_bias", "norm_weight"}
    assert {names[id(p)] for p in decayed["params"]} == {
        "router.weight",
        "project.shared_weight",
        "project.memory_weight",
        "project.q_conv_weight",
        "project.k_conv_weight",
        "project.v_conv_weight",
        "gate_proj.weight",
        "out_proj.weight",
    }


def test_frozen_parameters():
    block = make()
    block.router.weight.requires_grad_(False)
    decayed, kept = block.parameter_groups()
    assert not any(p is block.router.weight for p in decayed["params"] + kept["params"])
    assert not is_decayed("layers.0.norm.weight", nn.Parameter(torch.ones(3)))


def test_parameter_groups_of_a_whole_model():
    """Embeddings and heads beside the blocks, a tied weight once."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, D), "block": make(), "norm": nn.LayerNorm(D), "head": nn.Linear(D, 7)}
    )
    model["head"].weight = model["embed"].weight
    decayed, kept = parameter_groups(model, 0.1)
    grouped = [id(p) for p in decayed["params"] + kept["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    assert any(p is model["head"].bias for p in kept["params"])


@every_rule
def test_an_optimizer_step_lowers_the_loss(mechanism):
    block = make(mechanism=mechanism)
    x, target = tokens(4, 10, D), tokens(4, 10, D, seed=1)
    optimizer = torch.optim.AdamW(block.parameter_groups(0.0), lr=0.01)
    losses = []
    for _ in range(4):
        loss = (block(x).hidden_states - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# backends


@every_rule
def test_backend_report(mechanism):
    block = make(mechanism=mechanism)
    report = block.backend_report()
    assert set(report) == {"scan", "step", "layer"}
    assert report["layer"].backend == "torch"
    assert report["scan"].backend == ("chunked" if block.mechanism.has_chunked_form else "reference")
    assert report["step"].backend == "reference"
    assert all(choice.reason for choice in report.values())
    asked = MoMSpec(hidden_size=D, mechanism=mechanism).build(backend="reference").backend_report()
    assert asked["scan"] == BackendChoice("reference", "asked for")


def test_decay_rates_stay_wide_in_a_narrow_block():
    block = make()
    before = block.mechanism.A_log.detach().clone()
    block.mechanism.A_log.grad = torch.ones_like(before)
    block.bfloat16()
    assert block.out_proj.weight.dtype == torch.bfloat16
    assert torch.equal(block.mechanism.A_log, before) and block.mechanism.dt_bias.dtype == torch.float32
    assert block.mechanism.A_log.grad.dtype == torch.float32
    assert block(tokens(1, 3, D).bfloat16()).hidden_states.dtype == torch.bfloat16
    assert block.double().mechanism.A_log.dtype == torch.float64


@every_block
def test_backends_give_the_same_block(mechanism, router):
    block = make(mechanism=mechanism, router=router).double().eval()
    x = tokens(2, 70, D).double()
    block.backend = "reference"
    reference = block(x)
    for backend in backends_for(block.mechanism):
        block.backend = backend
        out = block(x)
        assert_close(out.hidden_states, reference.hidden_states, rtol=0, atol=1e-9)
        assert_close(out.state.recurrent, reference.state.recurrent, rtol=0, atol=1e-9)


def test_the_layer_reaches_the_rule():
    """Constants that depend on depth are those of the layer that was asked for."""
    spec = MoMSpec(hidden_size=D, mechanism="lightning_attention", router={"kind": "hash"})
    blocks = [spec.build(layer_index=i, num_layers=3) for i in range(3)]
    assert [b.mechanism.context.layer_index for b in blocks] == [0, 1, 2]
    assert {b.mechanism.context.num_layers for b in blocks} == {3}
    assert not torch.equal(blocks[0].router.projection, blocks[1].router.projection)


# shapes


@every_rule
def test_output_width_need_not_be_hidden_size(mechanism):
    sizes = small_heads(mechanism)
    block = make(mechanism={"kind": mechanism, **sizes})
    assert block(tokens(2, 5, D)).hidden_states.shape == (2, 5, D)
    assert block.out_proj.weight.shape == (D, 15 if "head_dim" in sizes else 7)


@every_block
def test_padded_packed_and_batched_are_one(mechanism, router):
    block = make(mechanism=mechanism, router=router).double().eval()
    x = tokens(3, 8, D).double()
    batch = block(x).hidden_states
    packed = block(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 8, 16, 24], dtype=torch.int32)).hidden_states
    wrapped = block(x.reshape(1, 24, D), cu_seqlens=torch.tensor([0, 8, 16, 24])).hidden_states
    alone = torch.stack([block(row).hidden_states for row in x])
    mask = torch.ones(3, 8, dtype=torch.int64)
    masked = block(x, mask=mask).hidden_states
    assert packed.shape == (24, D)
    assert wrapped.shape == (1, 24, D)
    for other in (packed.view(3, 8, D), wrapped.view(3, 8, D), alone, masked):
        assert_close(other, batch, rtol=0, atol=1e-11)


@every_block
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(mechanism, router, shape):
    block = make(mechanism=mechanism, router=router)
    out = block(torch.zeros(*shape, D))
    assert out.hidden_states.shape == (*shape, D)
    assert out.state.batch_size == shape[0]
    assert out.aux_loss.isfinite()
    fresh = block.initial_state(shape[0])
    assert all(torch.equal(out.state.recurrent[n], fresh.recurrent[n]) for n in fresh.recurrent)
    loss_of(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


@every_block
def test_no_sequences(mechanism, router):
    block = make(mechanism=mechanism, router=router)
    out = block(torch.zeros(0, D), cu_seqlens=torch.tensor([0]))
    assert out.hidden_states.shape == (0, D)
    assert block.step(torch.zeros(0, D), block.initial_state(0)).hidden_states.shape == (0, D)


# precision


@every_block
def test_autocast(mechanism, router):
    """Matmuls in bfloat16, memories, routing and gates in float32, everything finite, gradients in float32."""
    block = make(mechanism=mechanism, router=router)
    x = tokens(2, 20, D).requires_grad_()
    exact = block.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.hidden_states.dtype == torch.bfloat16
    assert {s.dtype for s in out.state.recurrent.values()} == {torch.float32}
    assert out.routing.weights.dtype == out.routing.logits.dtype == out.aux_loss.dtype == torch.float32
    assert torch.equal(out.routing.memory_ids, exact.routing.memory_ids)
    assert_close(out.hidden_states.float(), exact.hidden_states, rtol=0.1, atol=0.1)
    loss_of(out).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        step = block.step(x[:, 0].detach(), block.initial_state(2))
        again = block(x, out.state)
    assert step.hidden_states.isfinite().all()
    assert again.hidden_states.isfinite().all()


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(mechanism, router, dtype):
    block = make(mechanism=mechanism, router=router).eval()
    x = tokens(2, 20, D)
    exact = block(x)
    block = block.to(dtype)
    out = block(x.to(dtype))
    assert out.hidden_states.dtype == dtype
    assert {s.dtype for s in out.state.recurrent.values()} == {torch.float32}
    assert {s.dtype for s in out.state.conv.values()} <= {dtype}
    assert out.routing.weights.dtype == out.aux_loss.dtype == torch.float32
    assert out.hidden_states.isfinite().all()
    assert out.hidden_states.float().std() < 3 * exact.hidden_states.std()
    loss_of(out).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    state = out.state.detach()
    stepped = block.step(tokens(2, D).to(dtype), state.clone())
    assert stepped.hidden_states.dtype == dtype
    assert stepped.hidden_states.isfinite().all()
    assert block(x.to(dtype), state).hidden_states.isfinite().all()


def test_half_precision_is_close_where_routing_agrees():
    block = make(router="dense").eval()
    x = tokens(2, 40, D)
    exact = block(x).hidden_states
    rounded = block.bfloat16()(x.bfloat16()).hidden_states
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


# copies


@every_block
def test_copies_and_checkpoints(mechanism, router):
    """deepcopy, a state dict into another block, and torch.save all carry everything there is to a block."""
    block = make(mechanism=mechanism, router=router).eval()
    block.router.update(torch.arange(4) * 3)
    x = tokens(2, 9, D)
    expected = block(x)
    clone = copy.deepcopy(block)
    other = make(seed=1, mechanism=mechanism, router=router).eval()
    assert not torch.equal(other(x).hidden_states, expected.hidden_states)
    other.load_state_dict(block.state_dict())
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    saved = make(seed=2, mechanism=mechanism, router=router).eval()
    saved.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (clone, other, saved):
        out = same(x)
        assert torch.equal(out.hidden_states, expected.hidden_states)
        assert torch.equal(out.aux_loss, expected.aux_loss)
    with torch.no_grad():
        next(clone.parameters()).add_(1)
    assert torch.equal(block(x).hidden_states, expected.hidden_states)


@every_block
def test_evaluation_changes_nothing(mechanism, router):
    block = make(mechanism=mechanism, router=router)
    kept = copy.deepcopy(block.state_dict())
    out = block(tokens(2, 9, D))
    block.step(tokens(2, D), out.state.detach())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in block.state_dict().items())


@every_block
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_activation_checkpointing(mechanism, router, use_reentrant):
    """Recomputed, the same gradients to the last bit, also with a state and in noisy routers."""
    block = make(mechanism=mechanism, router=router)
    state = make(mechanism=mechanism, router=router)(tokens(2, 5, D, seed=3)).state.detach()
    gradients = []
    for recompute in (False, True):
        block.zero_grad()
        x = tokens(2, 9, D).requires_grad_()
        torch.manual_seed(7)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            out = block(x, state)
            return out.hidden_states, out.aux_loss

        y, aux = checkpoint(forward, x, use_reentrant=use_reentrant) if recompute else forward(x)
        (y.square().sum() + aux).backward()
        gradients.append({"x": x.grad} | {n: p.grad for n, p in block.named_parameters()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        if gradient is None:
            assert recomputed[name] is None, name
        else:
            assert torch.equal(recomputed[name], gradient), name


@every_block
def test_runs_repeat_bitwise(mechanism, router):
    block = make(mechanism=mechanism, router=router)
    results = []
    for _ in range(2):
        block.zero_grad()
        torch.manual_seed(7)
        out = block(tokens(3, 17, D))
        loss_of(out).backward()
        results.append([out.hidden_states, *out.state.recurrent.values(), *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_step_records_no_graph():
    block = make()
    state = block.initial_state(2)
    out = block.step(tokens(2, D).requires_grad_(), state)
    assert not out.hidden_states.requires_grad
    assert not any(t.requires_grad for t in state.recurrent.values())


def test_output_gate_and_conv_are_left_out_when_not_asked_for():
    names = {n for n, _ in make(output_gate=False, conv_size=None, shared_memory=False).named_parameters()}
    assert not any("gate_proj" in n or "conv" in n for n in names)
    assert make(shared_memory=False).project.memory_weight.shape[0] == 4
    assert make().project.memory_weight.shape[0] == 5
