"""Rules that do legal but unusual things work as any other, on every backend and in a block."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from momkit import MoMSpec, scan
from momkit.block import is_decayed
from momkit.errors import InputError
from momkit.mechanisms.base import (
    AffineScan,
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    Projection,
    Sizes,
    State,
    Structure,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.registry import temporarily
from momkit.testing.tolerances import assert_as_good


class UnusualSpec(HeadSpec):
    kind: Literal["unusual"] = "unusual"
    length: int = 3

    def sizes(self, hidden_size: int) -> Sizes:
        return super().sizes(hidden_size) | {"n": self.length}


class Unusual(Mechanism):
    """A learned start, a state that a scan only passes on, an axis that no input has, and names that dicts use."""

    Spec = UnusualSpec
    spec: UnusualSpec

    def make_parameters(self) -> None:
        self.S0 = nn.Parameter(torch.randn(*self.state_spec()["S"]))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("items", (H, K), shared=True, conv=True),
            Projection("keys", (H, K), conv=True, l2=True),
            Projection("weight", (H, V), conv=True, conv_bias=True, bias=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v = take(projected, "items keys weight")
        return {"q": q, "k": k, "v": v}

    def inputs_domain(self) -> dict[str, Domain]:
        return {"q": Domain("T G K"), "k": Domain("T G K", unit_norm=True), "v": Domain("T H V")}

    def state_axes(self) -> dict[str, str]:
        return {"S": "H K V", "kept": "n H V"}

    def initial_state(self, n: int) -> State:
        kept = torch.ones(1, dtype=self.S0.dtype).expand(n, *self.state_spec()["kept"])
        return {"S": self.S0.expand(n, *self.S0.shape), "kept": kept}

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v = take(inputs, "q k v")
        S = state["S"] + outer(k, v)
        return {"kept": state["kept"], "S": S}, read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {name: where_frozen(inputs[name], where, 0.0) for name in ("k", "v")}

    def lower(self, inputs: Inputs):  # type: ignore[no-untyped-def]
        lowered = super().lower(inputs)
        return type(lowered)(q=lowered.q, k=lowered.k, v=lowered.v)

    def compose(self, inputs: Inputs, state: State, affine: AffineScan) -> tuple[Tensor, State]:
        output, S = affine(Structure(decay="none"), self.lower(inputs), state["S"])
        return output, {"S": S, "kept": state["kept"]}


@pytest.fixture(autouse=True)
def registered():
    with temporarily(Unusual):
        yield


def make():
    torch.manual_seed(0)
    return MoMSpec(hidden_size=12, mechanism="unusual").build().double()


def test_decoding_is_scanning_and_leaves_what_was_learned():
    block, x = make(), torch.randn(2, 7, 12, dtype=torch.float64)
    learned, state = block.mechanism.S0.detach().clone(), block.initial_state(2)
    decoded = torch.stack([block.step(x[:, t], state).hidden_states for t in range(7)], 1)
    torch.testing.assert_close(decoded, block(x).hidden_states)
    assert torch.equal(block.mechanism.S0, learned)


def test_a_new_state_shares_nothing_with_the_old():
    block = make()
    with torch.no_grad():
        state = block(torch.randn(1, 4, 12, dtype=torch.float64)).state
        for x in (torch.randn(1, 4, 12, dtype=torch.float64), torch.zeros(1, 0, 12, dtype=torch.float64)):
            after, before = block(x, state).state, state.clone()
            for tensor in (*after.recurrent.values(), *after.conv.values()):
                tensor.add_(1.0)
            assert all(torch.equal(state.recurrent[n], before.recurrent[n]) for n in before.recurrent)
            assert all(torch.equal(state.conv[n], before.conv[n]) for n in before.conv)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("length", [0, 5])
def test_states_come_in_their_order(backend, length):
    block = make()
    inputs = block.mechanism.sample(torch.Generator().manual_seed(0), block.mechanism.sizes | {"T": length})
    assert list(scan(block.mechanism, inputs, backend=backend).final_state) == ["S", "kept"]


def test_an_axis_of_the_module_alone():
    inputs = make().mechanism.sample(torch.Generator().manual_seed(0), {"T": 4, "H": 2, "G": 2, "K": 3, "V": 3})
    with pytest.raises(InputError, match="no input has axis n of state kept"):
        scan("unusual", inputs)


def test_names_of_projections_decide_no_decay():
    block = make()
    decayed = {n for n, p in block.named_parameters() if is_decayed(n, p)}
    assert "project.weight_bias" not in decayed and "project.weight_conv_bias" not in decayed
    assert {"project.keys_conv_weight", "project.items_conv_weight", "project.memory_weight"} <= decayed
    assert "mechanism.S0" not in decayed


def test_what_prepare_returns_is_checked():
    block = make()
    block.mechanism.prepare = lambda projected: {"q": projected["items"], "z": projected["items"]}
    with pytest.raises(InputError, match="unusual inputs: k, v missing"):
        block(torch.zeros(1, 3, 12, dtype=torch.float64))


def test_states_of_a_step_are_checked():
    block = make()
    block.mechanism.step = lambda state, inputs: ({"S": state["S"]}, inputs["v"])
    with pytest.raises(InputError, match="unusual: step returned states"):
        block.step(torch.zeros(1, 12, dtype=torch.float64), block.initial_state(1))


def test_a_decoded_state_has_no_graph():
    """What changes in place has no gradient; going on from it must not pretend to one."""
    block, x = make(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    state = block(x).state
    block.step(torch.randn(2, 12, dtype=torch.float64), state)
    assert not any(tensor.requires_grad for tensor in (*state.recurrent.values(), *state.conv.values()))
    state = block(x).state
    state.reorder(torch.tensor([1, 0]))
    assert not any(tensor.requires_grad for tensor in state.recurrent.values())


def test_projections_named_twice():
    block = make()
    twice = (*block.mechanism.projections(), Projection("keys", (1,)))
    with pytest.raises(InputError, match=r"projections \['keys'\] are named twice"):
        type(block.project)(twice, 12, 5, 4)


def test_a_structure_without_a_chunked_form_runs_on_its_step():
    class ErasingSpec(HeadSpec):
        kind: Literal["erasing"] = "erasing"

    class Erasing(Unusual):
        Spec = ErasingSpec
        structure = Structure(decay="value", erase="delta")
        compose = Mechanism.compose

    assert not Erasing(ErasingSpec()).has_chunked_form
    assert MoMSpec(hidden_size=12, mechanism="kda").build().mechanism.has_chunked_form


def test_constants_of_any_rank():
    """A constant gate of each key channel decays as the same gate of every token."""

    class ConstantSpec(HeadSpec):
        kind: Literal["constant_gla"] = "constant_gla"

    class ConstantGLA(Mechanism):
        Spec = ConstantSpec
        structure = Structure(decay="key")

        def inputs_domain(self) -> dict[str, Domain]:
            return {"q": Domain("T G K"), "k": Domain("T G K"), "v": Domain("T H V"), "gk": Domain("H K", high=0.0)}

        def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
            q, k, v, gk = take(inputs, "q k v gk")
            S = state["S"] * gk.exp().unsqueeze(-1) + outer(k, v)
            return {"S": S}, self.scale_for(q) * read(S, q)

    rule = ConstantGLA(ConstantSpec())
    for T in (2, 70):
        inputs = rule.sample(torch.Generator().manual_seed(0), {"T": T, "H": 2, "G": 2, "K": 2, "V": 3})
        outputs = [scan(rule, inputs, backend=backend).output for backend in ("reference", "chunked")]
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("sigma", [0.03, 0.01])
def test_full_writes_with_keys_alike(sigma):
    """beta = 1 and keys that hardly differ: a token takes off nearly all that the ones before it wrote."""
    g = torch.Generator().manual_seed(0)
    T, H, K = 512, 1, 16
    inputs = {
        "q": torch.randn(T, H, K, generator=g, dtype=torch.float64),
        "k": nn.functional.normalize(1 + sigma * torch.randn(T, H, K, generator=g, dtype=torch.float64), dim=-1),
        "v": torch.randn(T, H, K, generator=g, dtype=torch.float64),
        "beta": torch.full((T, H), 1.0, dtype=torch.float64),
    }
    single = {name: x.float() for name, x in inputs.items()}
    rounded = {name: x.double() for name, x in single.items()}
    truth = scan("deltanet", rounded, backend="reference").output
    eager, chunked = (scan("deltanet", single, backend=backend).output for backend in ("reference", "chunked"))
    assert_as_good(chunked, eager, truth, f"sigma {sigma}")
