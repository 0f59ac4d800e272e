"""The contract: what a rule states, what it gets for that, and that its step alone is enough."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from momkit import MoMSpec, scan
from momkit.mechanisms.base import (
    Context,
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    MechanismSpec,
    Projection,
    Sizes,
    State,
    Structure,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.registry import find_mechanism, registry, temporarily

NAMES = registry().names("mechanism")
every_rule = pytest.mark.parametrize("name", NAMES)


class RunningMeanSpec(HeadSpec):
    kind: Literal["running_mean"] = "running_mean"


class RunningMean(Mechanism):
    """Remember the mean of all values, by counting them.

    n_t = n_{t-1} + 1;  M_t = M_{t-1} + (v_t - M_{t-1}) / n_t      o_t = M_t

    Nobody's.
    """

    Spec = RunningMeanSpec

    def projections(self) -> tuple[Projection, ...]:
        return (Projection("v", (self.sizes["H"], self.sizes["V"])),)

    def state_axes(self) -> dict[str, str]:
        return {"M": "H V", "n": "H"}

    def inputs_domain(self) -> dict[str, Domain]:
        return {"v": Domain("T H V")}

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        n = state["n"] + 1
        M = state["M"] + (inputs["v"] - state["M"]) / n[..., None]
        return {"M": M, "n": n}, M


def test_a_step_is_enough_to_scan():
    v = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    with temporarily(RunningMean):
        out = scan("running_mean", {"v": v}, cu_seqlens)
    for a, b in ((0, 3), (3, 7)):
        expected = v[a:b].cumsum(0) / torch.arange(1, b - a + 1)[:, None, None]
        torch.testing.assert_close(out.output[a:b], expected)
    assert out.final_state["n"][:, 0].tolist() == [3, 0, 4]
    out.final_state["M"][2].sum().backward()
    torch.testing.assert_close(v.grad[3:], torch.full((4, 2, 3), 0.25, dtype=torch.float64))
    assert (v.grad[:3] == 0).all()


def test_a_step_is_enough_for_a_block():
    """Training, states, decoding."""
    with temporarily(RunningMean):
        block = MoMSpec(hidden_size=8, mechanism="running_mean").build().double()
        x = torch.randn(2, 9, 8, dtype=torch.float64)
        whole = block(x)
        whole.hidden_states.sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        first = block(x[:, :4])
        second = block(x[:, 4:], first.state)
        torch.testing.assert_close(torch.cat([first.hidden_states, second.hidden_states], 1), whole.hidden_states)
        state = block.initial_state(2)
        for t in range(9):
            torch.testing.assert_close(block.step(x[:, t], state).hidden_states, whole.hidden_states[:, t])
        assert block.backend_report()["scan"].backend == "reference"


def test_what_is_missing_is_named():
    class Empty(Mechanism):
        Spec = RunningMeanSpec

    rule = Empty(RunningMeanSpec(), Context(8))
    v = torch.zeros(1, 4, 2)
    for call, name in (
        (rule.projections, "projections"),
        (rule.inputs_domain, "inputs_domain"),
        (lambda: rule.step({}, {"v": v}), "step"),
        (lambda: rule.freeze({"v": v}, torch.ones(1, dtype=torch.bool)), "freeze"),
    ):
        with pytest.raises(NotImplementedError, match=rf"Empty must define {name}\("):
            call()
    with pytest.raises(NotImplementedError, match=r"MechanismSpec must define sizes\(hidden_size\)"):
        MechanismSpec().sizes(8)


def test_a_router_that_reads_apart_needs_freeze():
    with temporarily(RunningMean):
        block = MoMSpec(hidden_size=8, mechanism="running_mean", router="read_write").build()
        with pytest.raises(NotImplementedError, match="RunningMean must define freeze"):
            block(torch.randn(1, 3, 8))


def test_another_rules_spec_is_refused():
    with pytest.raises(TypeError, match="RunningMean takes a RunningMeanSpec, got GatedDeltaNetSpec"):
        RunningMean(find_mechanism("gated_deltanet").Spec())


def test_name_comes_from_the_spec():
    assert RunningMean.name == "running_mean"

    class Louder(RunningMean):
        """The same under the same name, since it has no spec of its own."""

    assert Louder.name == "running_mean"


@every_rule
def test_without_a_context_a_rule_has_no_parameters(name):
    rule = find_mechanism(name)(find_mechanism(name).Spec())
    assert list(rule.parameters()) == []
    assert rule.sizes == {}
    assert rule.name == name


@every_rule
@pytest.mark.parametrize("hidden_size", [1, 3, 20])
def test_what_a_rule_states_fits_together(name, hidden_size):
    rule = find_mechanism(name)(find_mechanism(name).Spec(), Context(hidden_size))
    assert all(isinstance(size, int) and size >= 1 for size in rule.sizes.values())
    projections = rule.projections()
    assert len({p.name for p in projections}) == len(projections)
    for p in projections:
        assert p.width == math.prod(p.shape) >= 1
        assert p.activation in ("none", "silu", "tanh", "sigmoid")
    for key, shape in rule.state_spec().items():
        state = rule.initial_state(3)[key]
        assert state.shape == (3, *shape)
        assert state.dtype == torch.float32
    heads, dim = rule.output_spec()
    assert heads * dim == math.prod(rule.sizes[axis] for axis in rule.output_axes.split())
    assert rule.value_input in rule.inputs_domain()
    assert all(domain.low <= domain.high for domain in rule.inputs_domain().values())
    assert name in repr(rule)


@every_rule
def test_states_follow_the_precision_of_the_module(name):
    """float64 for a float64 module, float32 for everything else: a memory is never kept in half precision."""
    rule = find_mechanism(name)(find_mechanism(name).Spec(), Context(8))
    if list(rule.parameters()):
        assert {s.dtype for s in rule.double().initial_state(2).values()} == {torch.float64}
    block = MoMSpec(hidden_size=8, mechanism=name).build()
    assert {s.dtype for s in block.initial_state(2).recurrent.values()} == {torch.float32}
    assert {s.dtype for s in block.bfloat16().initial_state(2).recurrent.values()} == {torch.float32}
    assert {s.dtype for s in block.double().initial_state(2).recurrent.values()} == {torch.float64}


@every_rule
def test_prepare_and_finish_leave_their_inputs_alone(name):
    rule = find_mechanism(name)(find_mechanism(name).Spec(), Context(8))
    projected = {p.name: torch.randn(5, *p.shape) for p in rule.projections()}
    kept = {n: x.clone() for n, x in projected.items()}
    inputs = rule.prepare(projected)
    assert set(inputs) == set(rule.inputs_domain())
    copies = {n: x.clone() for n, x in inputs.items()}
    frozen = rule.freeze(inputs, torch.tensor([True, False, False, True, False]))
    assert set(frozen) == set(inputs)
    heads, dim = rule.output_spec()
    output = torch.randn(5, *(rule.sizes[axis] for axis in rule.output_axes.split()))
    finished = rule.finish(output, inputs, projected)
    assert finished.numel() == 5 * heads * dim
    for now, before in ((projected, kept), (inputs, copies)):
        assert now.keys() == before.keys()
        assert all(torch.equal(now[n], before[n]) for n in before)


def test_sizes_of_another_module_may_be_asked():
    rule = RunningMean(RunningMeanSpec())
    sizes: Sizes = {"H": 5, "V": 7}
    assert rule.state_spec(sizes) == {"M": (5, 7), "n": (5,)}


def test_output_spec_of_one_axis_is_one_head():
    class Flat(RunningMean):
        output_axes = "V"

    assert RunningMean(RunningMeanSpec(num_heads=2, head_dim=3), Context(8)).output_spec() == (2, 3)
    assert Flat(RunningMeanSpec(num_heads=2, head_dim=3), Context(8)).output_spec() == (1, 3)


def test_scale():
    q = torch.zeros(3, 2, 16)
    for scale, expected in ((None, 0.25), (0.5, 0.5), (0.0, 0.0), (-1.0, -1.0)):
        assert RunningMean(RunningMeanSpec(scale=scale)).scale_for(q) == expected
    with pytest.raises(ValueError, match="finite"):
        RunningMeanSpec(scale=math.inf)


def test_chunked_form_needs_structure_or_compose():
    class Affine(RunningMean):
        structure = Structure(decay="head")

    class Composite(RunningMean):
        def compose(self, inputs, state, affine):
            return affine(self.structure, self.lower(inputs), state["S"])

    assert not RunningMean(RunningMeanSpec()).has_chunked_form
    assert Affine(RunningMeanSpec()).has_chunked_form
    assert Composite(RunningMeanSpec()).has_chunked_form


def test_lower_takes_the_letters_that_are_there():
    rule = RunningMean(RunningMeanSpec())
    inputs = {n: torch.zeros(3, 2, 4) for n in ("q", "k", "v", "gk", "u")} | {"eta": torch.zeros(3, 2)}
    affine = rule.lower(inputs)
    assert affine.gk is inputs["gk"]
    assert affine.u is inputs["u"]
    assert (affine.g, affine.beta, affine.a, affine.b, affine.gv) == (None,) * 5
    assert affine.scale == 0.5


@pytest.mark.parametrize(
    ("domain", "gate"),
    [
        (Domain("T H", high=0.0), True),
        (Domain("H", high=0.0), True),
        (Domain("T H", low=-1.0, high=0.0), False),
        (Domain("T H", low=0.0, high=1.0), False),
        (Domain("T H"), False),
    ],
)
def test_gates_are_log_decays(domain, gate):
    assert domain.is_gate is gate


@pytest.mark.parametrize(
    ("low", "high"), [(-math.inf, 0.0), (0.0, 1.0), (-2.0, 2.0), (0.5, math.inf), (-math.inf, math.inf)]
)
def test_samples_keep_to_their_domain(low, high):
    sizes = {"T": 50, "H": 3, "K": 4}
    x = Domain("T H K", low=low, high=high).sample(torch.Generator().manual_seed(0), sizes)
    assert x.shape == (50, 3, 4)
    assert x.dtype == torch.float64
    assert ((x >= low) & (x <= high) & x.isfinite()).all()
    assert x.std() > 0.01
    again = Domain("T H K", low=low, high=high).sample(torch.Generator().manual_seed(0), sizes)
    assert torch.equal(x, again)


def test_samples_of_unit_norm():
    x = Domain("T G K", unit_norm=True).sample(torch.Generator().manual_seed(0), {"T": 5, "G": 2, "K": 3})
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(5, 2, dtype=torch.float64))


def test_outer_and_read():
    k, v, q = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    S = outer(k, v)
    assert torch.equal(S, torch.einsum("nhk,nhv->nhkv", k, v))
    torch.testing.assert_close(read(S, q), torch.einsum("nhkv,nhk->nhv", S, q))


def test_take():
    tensors = {"a": torch.zeros(1), "b": torch.ones(1)}
    b, a = take(tensors, "b a")
    assert a is tensors["a"]
    assert b is tensors["b"]
    with pytest.raises(KeyError, match="c"):
        take(tensors, "a c")


def test_where_frozen_selects():
    x = torch.tensor([[1.0, math.nan], [math.nan, 4.0]])
    assert where_frozen(x, torch.tensor([False, True]), 0.0)[1].tolist() == [0, 0]
    assert torch.equal(where_frozen(x, torch.tensor([True, True]), 1.0), torch.ones(2, 2))
    assert where_frozen(torch.zeros(2), torch.tensor([True, False]), 7.0).tolist() == [7, 0]


def test_gate_dtype():
    given = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [gate_dtype(torch.zeros(1, dtype=d)).dtype for d in given] == [torch.float64] + [torch.float32] * 3


def test_contracts_are_modules():
    """Parameters of a rule are found by optimizers and checkpoints like any others."""
    rule = find_mechanism("gated_deltanet")(find_mechanism("gated_deltanet").Spec(), Context(8))
    assert isinstance(rule, nn.Module)
    assert set(rule.state_dict()) == {"A_log", "dt_bias"}
