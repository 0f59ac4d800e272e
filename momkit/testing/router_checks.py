"""Checks of a router by itself: its spec, its docstring, and the routing it returns."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.routing.balance import memory_load
from momkit.routing.base import Router, Routing
from momkit.testing.drawing import Draw, drawn
from momkit.testing.spec_assertions import assert_documented, assert_round_trips
from momkit.testing.strategies import seeds
from momkit.testing.subjects import HIDDEN_SIZE, RouterSubject, registered
from momkit.testing.tolerances import assert_close, assert_equal


@dataclass(frozen=True)
class RouterCase:
    """A router and the tokens it routes; `size` scales them, and with them the logits."""

    num_memories: int
    num_tokens: int
    seed: int
    size: float = 1.0
    training: bool = False
    dtype: torch.dtype = torch.float64

    def router(self, subject: RouterSubject) -> Router:
        return subject.module(self.seed, self.num_memories).to(self.dtype).train(self.training)

    @property
    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.num_tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
        return (x * self.size).to(self.dtype)


@st.composite
def router_cases(
    draw: st.DrawFn,
    subject: RouterSubject,
    *,
    training: bool | None = None,
    sizes: tuple[float, ...] = (1.0, 0.0, 1e4),
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> RouterCase:
    """Tokens, some of them so large that probabilities underflow, or all the same."""
    return RouterCase(
        num_memories=draw(st.sampled_from(subject.legal_memories())),
        num_tokens=draw(st.sampled_from((5, 1, 2, 17, 40))),
        seed=draw(seeds),
        size=draw(st.sampled_from(sizes)),
        training=draw(st.booleans()) if training is None else training,
        dtype=draw(st.sampled_from(dtypes)),
    )


def reading(routing: Routing) -> Tensor:
    """`[T, slots]` which slots read: all but those that only write, before the ones that only read."""
    if routing.writes is None:
        return torch.ones_like(routing.memory_ids, dtype=torch.bool)
    return ~routing.writes | (routing.weights != 0)


# a spec is the same after a trip through JSON or YAML, alone or inside a block's, and takes no unknown field
def check_spec_round_trips(subject: RouterSubject) -> None:
    with registered(subject.cls):
        assert_round_trips(subject.spec, {"num_memories": max(subject.legal_memories()), "router": subject.spec})


# the docstring has three paragraphs: one sentence, the equation, the paper
def check_documented(subject: RouterSubject) -> None:
    assert_documented(subject.cls)


# weights [T, slots] in fp32 or float64, ids in int64, logits [T, M], a scalar loss; also for no token, and in bf16
@drawn()
def check_shapes_and_dtypes(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject, dtypes=(torch.float32, torch.float64, torch.bfloat16)), "case")
    router = case.router(subject)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    for x in (case.x, case.x[:0]):
        routing = router.route(x)
        shape = (len(x), router.slots)
        for name, dtype in (("weights", wide), ("memory_ids", torch.int64), ("writes", torch.bool)):
            tensor: Tensor | None = getattr(routing, name)
            if tensor is None:
                continue
            assert tensor.shape == shape, f"{subject.name}: {name} is {tuple(tensor.shape)}, expected {shape}"
            assert tensor.dtype == dtype, f"{subject.name}: {name} is {tensor.dtype} for {case.dtype} tokens"
        assert routing.logits.shape == (len(x), case.num_memories), f"{subject.name}: {tuple(routing.logits.shape)}"
        assert routing.logits.dtype == wide, f"{subject.name}: logits are {routing.logits.dtype}"
        assert routing.aux_loss.shape == () and routing.aux_loss.dtype == wide, f"{subject.name}: {routing.aux_loss}"
        assert routing.aux_loss.isfinite(), f"{subject.name}: aux_loss is {routing.aux_loss} for {len(x)} tokens"


# weights are at least zero and sum to one for every token, however large its logits
@drawn()
def check_weights_normalised(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject), "case")
    routing = case.router(subject).route(case.x)
    assert (routing.weights >= 0).all(), f"{subject.name}: a weight of {float(routing.weights.min())}"
    assert_close(routing.weights.sum(-1), torch.ones(case.num_tokens, dtype=torch.float64), f"{subject.name}: sums")


# a token's ids are memories that exist, no two alike among its writes or among its reads, writes before reads
@drawn()
def check_ids_distinct_and_in_range(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject), "case")
    routing = case.router(subject).route(case.x)
    ids = routing.memory_ids
    assert ((ids >= 0) & (ids < case.num_memories)).all(), f"{subject.name}: ids from {ids.min()} to {ids.max()}"
    writes = torch.ones_like(ids, dtype=torch.bool) if routing.writes is None else routing.writes
    assert not (~writes[:, :-1] & writes[:, 1:]).any(), f"{subject.name}: a write slot stands behind a read slot"
    for what, which in (("writes", writes), ("reads", reading(routing))):
        for t in range(case.num_tokens):
            chosen = ids[t][which[t]].tolist()
            assert len(set(chosen)) == len(chosen), f"{subject.name}: token {t} {what} {chosen}"


# a token's choice depends on that token alone
@drawn()
def check_causal(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject, training=False, sizes=(1.0,)), "case")
    t = draw(st.integers(0, case.num_tokens - 1), "token that stays")
    router = case.router(subject)
    other = RouterCase(case.num_memories, case.num_tokens, case.seed + 9).x
    other[t] = case.x[t]
    whole, changed, alone = router.route(case.x), router.route(other), router.route(case.x[t : t + 1])
    for what, routing, row in (("other tokens", changed, t), ("no other token", alone, 0)):
        assert_close(routing.logits[row], whole.logits[t], f"{subject.name}: logits beside {what}")
        assert_equal(routing.memory_ids[row], whole.memory_ids[t], f"{subject.name}: ids beside {what}")
        assert_close(routing.weights[row], whole.weights[t], f"{subject.name}: weights beside {what}")


# the loss sees the unmasked tokens and no other, and is zero or a number where there is none
@drawn()
def check_aux_loss_is_masked(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject, training=False, sizes=(1.0,)), "case")
    router = case.router(subject)
    mask = torch.rand(case.num_tokens, generator=torch.Generator().manual_seed(case.seed)) < 0.5
    expected = router.route(case.x[mask]).aux_loss
    assert_close(router.route(case.x, mask).aux_loss, expected, f"{subject.name}: aux_loss of a masked batch")
    nothing = router.route(case.x, torch.zeros_like(mask)).aux_loss
    assert nothing.isfinite(), f"{subject.name}: aux_loss is {nothing} where every token is masked"


# every parameter learns from weights and loss, and no gradient is NaN, however large the logits
@drawn(0.5)
def check_gradients(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject, training=True, sizes=(1.0, 1e4)), "case")
    router, x = case.router(subject), case.x.requires_grad_()
    routing = router.route(x)
    total = (routing.weights * torch.arange(1.0, router.slots + 1)).sum() + routing.aux_loss
    if total.requires_grad:
        total.backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, f"{subject.name}: {name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"{subject.name}: {name} gets a gradient that is not finite"


# routing is repeatable in evaluation and changes nothing that the router keeps, in training either
@drawn(0.5)
def check_route_changes_nothing(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject), "case")
    router = case.router(subject)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    first, second = router.route(case.x), router.route(case.x)
    for name, tensor in before.items():
        assert_equal(router.state_dict()[name], tensor, f"{subject.name}: {name} after route")
    if not case.training:
        assert_equal(second.weights, first.weights, f"{subject.name}: weights of a second call")
        assert_equal(second.memory_ids, first.memory_ids, f"{subject.name}: ids of a second call")


# `update` never makes an overloaded memory more popular, and leaves parameters to the optimizer
@drawn(0.5)
def check_update(subject: RouterSubject, draw: Draw) -> None:
    case = draw(router_cases(subject, training=False, sizes=(1.0,)), "case")
    router = case.router(subject)
    parameters = {name: p.detach().clone() for name, p in router.named_parameters()}
    before = memory_load(router.route(case.x).memory_ids, case.num_memories)
    crowded = int(before.argmax())
    load = torch.zeros(case.num_memories, dtype=torch.int64)
    load[crowded] = case.num_tokens
    for _ in range(draw(st.integers(1, 50), "updates")):
        router.update(load)
    after = memory_load(router.route(case.x).memory_ids, case.num_memories)
    assert after[crowded] <= before[crowded], f"{subject.name}: {before.tolist()} became {after.tolist()}"
    for name, tensor in parameters.items():
        assert_equal(dict(router.named_parameters())[name].detach(), tensor, f"{subject.name}: {name} after update")
