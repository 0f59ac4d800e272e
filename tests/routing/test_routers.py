"""Every built-in router, against the contract and against its own equation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from momkit.errors import InputError
from momkit.routing.balance import load_balance_loss, memory_load
from momkit.routing.base import Router, RouterContext, RouterSpec, Routing
from momkit.routing.dense import Dense, DenseSpec
from momkit.routing.hash import HashRouter, HashRouterSpec
from momkit.routing.noisy_topk import NoisyTopK, NoisyTopKSpec
from momkit.routing.read_write import ReadWrite, ReadWriteSpec
from momkit.routing.sigmoid_topk import SigmoidTopK, SigmoidTopKSpec
from momkit.routing.softmax_topk import SoftmaxTopK, SoftmaxTopKSpec

ROUTERS: list[type[Router]] = [SoftmaxTopK, SigmoidTopK, NoisyTopK, HashRouter, Dense, ReadWrite]
BALANCED = [SoftmaxTopK, SigmoidTopK, NoisyTopK, ReadWrite]
every_router = pytest.mark.parametrize("cls", ROUTERS, ids=lambda cls: cls.name)


def make(cls: type[Router], num_memories: int = 5, top_k: int = 2, hidden_size: int = 8, **fields: object) -> Router:
    """A router whose every choice is of `top_k` memories."""
    spec: RouterSpec
    if cls is Dense:
        spec = DenseSpec()
    elif cls is ReadWrite:
        spec = ReadWriteSpec(**{"k_write": top_k, "k_read": top_k, **fields})
    else:
        spec = cls.Spec(**{"top_k": top_k, **fields})
    torch.manual_seed(0)
    return cls(spec, RouterContext(hidden_size, num_memories))


def tokens(count: int, hidden_size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden_size, generator=generator, dtype=torch.float64).to(dtype)


def parts(routing: Routing, router: Router) -> list[tuple[Tensor, Tensor]]:
    """(weights, ids) of the writes and of the reads, which are one choice for most routers."""
    if routing.writes is None:
        return [(routing.weights, routing.memory_ids)]
    k = router.spec.k_write
    return [
        (routing.weights[:, :k], routing.memory_ids[:, :k]),
        (routing.weights[:, k:], routing.memory_ids[:, k:]),
    ]


@every_router
@settings(max_examples=15, deadline=None)
@given(data=st.data(), num_memories=st.integers(1, 6), count=st.integers(0, 9), training=st.booleans())
def test_choices_are_legal(
    cls: type[Router], data: st.DataObject, num_memories: int, count: int, training: bool
) -> None:
    top_k = data.draw(st.integers(1, num_memories))
    size = data.draw(st.sampled_from([0.0, 1.0, 1e3, 1e30]))
    router = make(cls, num_memories, top_k).train(training)
    routing = router.route(tokens(count, dtype=torch.float32) * size)

    assert routing.weights.shape == routing.memory_ids.shape == (count, router.slots)
    assert routing.logits.shape == (count, num_memories)
    assert routing.memory_ids.dtype == torch.int64
    assert routing.memory_ids.is_contiguous()
    assert routing.aux_loss.shape == ()
    assert routing.aux_loss.isfinite()
    assert (routing.weights >= 0).all()
    assert_close(routing.weights.sum(-1), torch.ones(count))
    for _, ids in parts(routing, router):
        ordered = ids.sort(-1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()
        assert ((ids >= 0) & (ids < num_memories)).all()


@every_router
def test_a_route_depends_on_its_own_token_alone(cls: type[Router]) -> None:
    router = make(cls).double()
    x = tokens(12)
    other = torch.cat([x[:5], tokens(7, seed=1) * 100])
    poisoned = torch.cat([x[:5], torch.full_like(x[5:], torch.nan)])
    for training in (True, False):
        router.train(training)
        torch.manual_seed(3)
        expected = router.route(x)
        for changed in (other, poisoned):
            torch.manual_seed(3)
            routing = router.route(changed)
            assert torch.equal(routing.memory_ids[:5], expected.memory_ids[:5])
            assert_close(routing.weights[:5], expected.weights[:5])
    alone = [router.route(x[t : t + 1]) for t in range(12)]
    assert torch.equal(torch.cat([r.memory_ids for r in alone]), expected.memory_ids)
    assert_close(torch.cat([r.weights for r in alone]), expected.weights)


@every_router
def test_masked_tokens_stay_out_of_the_auxiliary_loss(cls: type[Router]) -> None:
    router = make(cls).double().eval()
    x, mask = tokens(20), torch.arange(20) % 3 != 0
    assert_close(router.route(x, mask).aux_loss, router.route(x[mask]).aux_loss)
    routed, unmasked = router.route(x, mask), router.route(x)
    assert torch.equal(routed.memory_ids, unmasked.memory_ids)
    poisoned = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(router.route(poisoned, mask).aux_loss, routed.aux_loss)
    assert router.route(x, torch.zeros_like(mask)).aux_loss == 0


@every_router
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_every_parameter_gets_a_gradient(cls: type[Router], top_k: int) -> None:
    router = make(cls, top_k=top_k).double()
    routing = router.route(tokens(30))
    loss = (routing.weights * tokens(30, router.slots, seed=4)).sum() + routing.aux_loss
    if cls is HashRouter:
        assert not loss.requires_grad
        return
    loss.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # with every memory written to, there is no choice of writes to learn
        if not (name == "write_weight" and top_k == 5):
            assert (parameter.grad.abs().sum(1) > 1e-9).all(), name


@every_router
def test_weights_and_loss_pass_gradcheck(cls: type[Router]) -> None:
    router = make(cls, num_memories=3).double()
    names = [name for name, _ in router.named_parameters()]
    x = tokens(4).requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        state = dict(zip(names, parameters, strict=True))
        routing = torch.func.functional_call(Routed(router), {f"router.{n}": p for n, p in state.items()}, (x,))
        return routing.weights, routing.aux_loss

    if names:
        assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in router.parameters())))
    else:
        assert not any(t.requires_grad for t in call(x))


class Routed(torch.nn.Module):
    """`route` as a forward, for functional_call and compile."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        return self.router.route(x, mask)


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(cls: type[Router], dtype: torch.dtype) -> None:
    router = make(cls).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router.route(tokens(6, dtype=dtype))
    assert routing.weights.dtype == routing.logits.dtype == routing.aux_loss.dtype == expected
    plain = router.eval().route(tokens(6, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.route(tokens(6, dtype=dtype)).weights, plain.weights)


@every_router
def test_runs_without_reading_a_value(cls: type[Router]) -> None:
    router = make(cls)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, mask = mode.from_tensor(torch.randn(6, 8)), mode.from_tensor(torch.ones(6, dtype=torch.bool))
        assert router.route(x, mask).weights.shape == (6, router.slots)


@every_router
def test_compiles_to_one_graph(cls: type[Router]) -> None:
    torch._dynamo.reset()
    router = make(cls).eval()
    compiled = torch.compile(Routed(router), fullgraph=True, backend="eager", dynamic=True)
    for count in (3, 7):
        x = tokens(count, dtype=torch.float32)
        assert torch.equal(compiled(x).memory_ids, router.route(x).memory_ids)


@every_router
def test_repeats_bitwise(cls: type[Router]) -> None:
    router, x = make(cls), tokens(9, dtype=torch.float32)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(router.route(x))
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert torch.equal(runs[0].aux_loss, runs[1].aux_loss)


@every_router
def test_one_memory(cls: type[Router]) -> None:
    router = make(cls, num_memories=1, top_k=1)
    routing = router.route(tokens(3, dtype=torch.float32))
    assert (routing.memory_ids == 0).all()
    assert_close(routing.weights.sum(-1), torch.ones(3))


@every_router
def test_describes_itself(cls: type[Router]) -> None:
    sentence, equation, paper = (cls.__doc__ or "").split("\n\n")
    assert sentence.strip().endswith(".")
    assert "=" in equation
    assert any(char.isdigit() for char in paper)
    spec = make(cls).spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("cls", [SoftmaxTopK, SigmoidTopK, NoisyTopK, HashRouter])
def test_too_many_choices_are_refused(cls: type[Router]) -> None:
    with pytest.raises(InputError, match=r"router\.top_k = 5 is more than num_memories = 4"):
        cls.Spec(top_k=5).check(4)
    with pytest.raises(InputError, match=r"router\.top_k"):
        make(cls, num_memories=4, top_k=5)
    cls.Spec(top_k=4).check(4)


@pytest.mark.parametrize("field", ["k_write", "k_read"])
def test_too_many_writes_or_reads_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=rf"router\.{field} = 5 is more than num_memories = 4"):
        ReadWriteSpec(**{field: 5}).check(4)
    with pytest.raises(ValidationError, match=field):
        ReadWriteSpec(**{field: 0})


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        (SoftmaxTopKSpec, "top_k", 0),
        (NoisyTopKSpec, "top_k", 1.5),
        (SigmoidTopKSpec, "update_rate", -1.0),
        (SigmoidTopKSpec, "update_rate", math.nan),
        (HashRouterSpec, "seed", -1),
        (HashRouterSpec, "seed", 2**32),
        (DenseSpec, "top_k", 2),
    ],
)
def test_bad_fields_are_refused(spec: type[RouterSpec], field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        spec(**{field: value})


def test_a_spec_of_another_router_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a SigmoidTopKSpec, got DenseSpec"):
        SigmoidTopK(DenseSpec(), RouterContext(8, 4))


def test_softmax_equals_the_papers_formula() -> None:
    router = make(SoftmaxTopK).double()
    routing = router.route(tokens(9))
    probs = (tokens(9) @ router.weight.T).softmax(-1)
    top, ids = probs.topk(2)
    assert torch.equal(routing.memory_ids, ids)
    assert_close(routing.weights, top / top.sum(-1, keepdim=True))
    assert_close(routing.aux_loss, load_balance_loss(probs, ids))


def test_softmax_orders_memories_whose_probability_underflows() -> None:
    router = make(SoftmaxTopK, num_memories=4, top_k=3, hidden_size=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-400.0], [0.0], [-300.0], [-200.0]]))
    assert router.route(torch.ones(1, 1)).memory_ids.tolist() == [[1, 3, 2]]


def test_sigmoid_bias_moves_the_choice_and_no_weight() -> None:
    router = make(SigmoidTopK).double()
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0]))
    routing = router.route(tokens(9))
    scores = (tokens(9) @ router.weight.T).sigmoid()
    assert (routing.memory_ids == 3).any(1).all()
    chosen = scores.gather(1, routing.memory_ids)
    assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    assert_close(routing.aux_loss, load_balance_loss(scores / scores.sum(-1, keepdim=True), routing.memory_ids))
    assert_close(routing.logits, scores + router.bias)


def test_sigmoid_weights_survive_scores_that_all_underflow() -> None:
    router = make(SigmoidTopK, num_memories=3, hidden_size=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-500.0], [-501.0], [-600.0]]))
    routing = router.route(torch.ones(2, 1))
    (routing.weights[:, 0].sum() + routing.aux_loss).backward()
    assert_close(routing.weights.sum(-1), torch.ones(2))
    assert routing.aux_loss.isfinite()
    assert router.weight.grad.isfinite().all()


def test_sigmoid_update_follows_the_sign_of_the_missing_load() -> None:
    router = make(SigmoidTopK, num_memories=4, update_rate=0.25)
    router.update(torch.tensor([10, 0, 5, 5]))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.update(torch.full((4,), 7))
    router.update(torch.zeros(4))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    with pytest.raises(InputError, match=r"load has shape \[3\]; it must be \[4\]"):
        router.update(torch.zeros(3))


def test_sigmoid_update_moves_load_towards_balance() -> None:
    router = make(SigmoidTopK, num_memories=6, update_rate=0.01)
    generator = torch.Generator().manual_seed(0)
    lean = torch.randn(8, generator=generator)
    excess = []
    for _ in range(300):
        routing = router.route(torch.randn(400, 8, generator=generator) + lean)
        load = memory_load(routing.memory_ids, 6)
        excess.append(float(load.max() / load.double().mean()) - 1)
        router.update(load)
    assert excess[0] > 0.8
    assert sum(excess[-20:]) / 20 < 0.15


def test_sigmoid_route_reads_the_bias_only() -> None:
    router = make(SigmoidTopK)
    version = router.bias._version
    routing = router.route(tokens(5, dtype=torch.float32))
    (routing.weights[:, 0].sum() + routing.aux_loss).backward()
    assert router.bias._version == version
    assert set(router.state_dict()) == {"weight", "bias"}


def test_sigmoid_bias_keeps_its_precision_in_a_bfloat16_module() -> None:
    router = make(SigmoidTopK).double().bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    for _ in range(1000):
        router.update(torch.tensor([0, 1, 1, 1, 2]))
    assert_close(router.bias[[0, 4]], torch.tensor([1.0, -1.0]))


def test_noise_is_for_training_alone() -> None:
    router = make(NoisyTopK).double()
    x = tokens(2000)
    plain = make(SoftmaxTopK).double().route(x)
    assert torch.equal(router.eval().route(x).weights, plain.weights)
    noise = router.train().route(x).logits - plain.logits
    # a head of zeros makes noise of standard deviation softplus(0)
    assert_close(noise.std(), torch.tensor(math.log(2.0), dtype=torch.float64), rtol=0.03, atol=0)
    assert abs(noise.mean()) < 0.03
    with torch.no_grad():
        router.noise_weight.copy_(torch.ones_like(router.noise_weight))
    torch.manual_seed(5)
    noisy = router.route(x)
    torch.manual_seed(5)
    eps = torch.randn(2000, 5, dtype=torch.float64)
    assert_close(noisy.logits, plain.logits + eps * torch.nn.functional.softplus(x.sum(1, keepdim=True)))
    assert_close(noisy.weights, noisy.logits.topk(2).values.softmax(-1))


def test_noise_repeats_under_activation_checkpointing() -> None:
    router = make(NoisyTopK).double()
    grads = []
    for wrapped in (False, True):
        router.zero_grad()
        x = tokens(40)
        torch.manual_seed(2)

        def loss(x: Tensor) -> Tensor:
            routing = router.route(x)
            return routing.weights[:, 0].square().sum() + routing.aux_loss

        (checkpoint(loss, x, use_reentrant=False) if wrapped else loss(x)).backward()
        grads.append([p.grad.clone() for p in router.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_hash_depends_on_seed_and_layer_alone() -> None:
    def projection(seed: int, layer: int) -> Tensor:
        return HashRouter(HashRouterSpec(seed=seed), RouterContext(16, 4, layer)).projection

    torch.manual_seed(0)
    first = projection(0, 0)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(projection(0, 0), first)
    others = [projection(seed, layer) for seed in (0, 1, 2**32 - 1) for layer in (0, 1, 2)]
    for i, one in enumerate(others):
        assert not any(torch.equal(one, two) for two in others[i + 1 :])


def test_hash_learns_nothing_and_weighs_alike() -> None:
    router = make(HashRouter, num_memories=4, top_k=3, hidden_size=16)
    x = tokens(5000, 16, dtype=torch.float32)
    routing = router.route(x)
    assert not list(router.parameters())
    assert torch.equal(routing.weights, torch.full((5000, 3), 1 / 3))
    assert torch.equal(routing.memory_ids, (x @ router.projection.T).topk(3).indices)
    assert routing.aux_loss == 0
    assert torch.equal(router.bfloat16().route(x).memory_ids, routing.memory_ids)


def test_dense_takes_every_memory() -> None:
    router = make(Dense).double()
    routing = router.route(tokens(4))
    assert torch.equal(routing.memory_ids, torch.arange(5).expand(4, 5))
    assert_close(routing.weights, (tokens(4) @ router.weight.T).softmax(-1))
    assert routing.aux_loss == 0


def test_read_write_puts_writes_first_and_weighs_reads() -> None:
    router = make(ReadWrite, k_write=3, k_read=2).double()
    x = tokens(11)
    routing = router.route(x)
    assert router.slots == 5
    assert torch.equal(routing.writes, torch.tensor([True] * 3 + [False] * 2).expand(11, 5))
    assert (routing.weights[:, :3] == 0).all()
    write_logits, read_logits = x @ router.write_weight.T, x @ router.read_weight.T
    top, read_ids = read_logits.topk(2)
    assert torch.equal(routing.memory_ids, torch.cat([write_logits.topk(3).indices, read_ids], dim=1))
    assert_close(routing.weights[:, 3:], top.softmax(-1))
    assert_close(routing.logits, read_logits)
    both = [(write_logits, routing.memory_ids[:, :3]), (read_logits, read_ids)]
    assert_close(routing.aux_loss, sum(load_balance_loss(logits.softmax(-1), ids) for logits, ids in both))


@pytest.mark.parametrize("cls", BALANCED, ids=lambda cls: cls.name)
def test_auxiliary_loss_when_balanced_and_when_collapsed(cls: type[Router]) -> None:
    router = make(cls, num_memories=4, top_k=1, hidden_size=4).eval()
    choices = router.slots
    with torch.no_grad():
        for name, weight in router.named_parameters():
            if name != "noise_weight":
                weight.copy_(30 * torch.eye(4))
    corners = torch.eye(4).repeat(3, 1) * 2 - 1
    assert_close(router.route(corners).aux_loss, torch.tensor(float(choices)))
    assert_close(router.route(corners[:1]).aux_loss, torch.tensor(4.0 * choices))
