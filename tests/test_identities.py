"""Rules that are special cases of each other give the same outputs and states, at equal scale."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from momkit import scan
from momkit.mechanisms.base import Inputs, Mechanism, State
from momkit.registry import find_mechanism
from momkit.testing.strategies import ScanCase, bounds
from momkit.testing.targets import backends_for
from momkit.testing.tolerances import assert_close

SIZES = {"H": 2, "G": 2, "K": 4, "V": 4}
LENGTHS = (37, 0, 1, 20, 5)


def scaled(name: str, **fields) -> Mechanism:
    """A rule whose reads are scaled by one half, whatever it does by default."""
    cls = find_mechanism(name)
    return cls(cls.Spec(scale=0.5, **fields))


def sampled(rule: Mechanism) -> ScanCase:
    return ScanCase(rule, SIZES, LENGTHS, seed=5)


def channels(g: Tensor) -> Tensor:
    """A decay a head as a decay a key channel."""
    return g[..., None].expand(*g.shape, SIZES["K"])


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: x for name, x in inputs.items() if name not in names}


def without_momentum(state: State) -> State:
    """A delta rule's state as Titans'."""
    return {"S": state["S"], "m": torch.zeros_like(state["S"])}


@dataclass(frozen=True)
class Identity:
    """`general`, with inputs and state made from those of `special`, gives what `special` gives."""

    special: str
    general: str
    inputs: Callable[[Inputs], Inputs]
    state: Callable[[State], State] = lambda state: state

    @property
    def id(self) -> str:
        return f"{self.general}-{self.special}"


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def per_head(inputs: Inputs) -> Tensor:
    """Zeros `[T, H]`."""
    return zeros(inputs["v"][..., 0])


IDENTITIES = [
    Identity("mamba2", "gla", lambda i: without(i, "g") | {"gk": channels(i["g"])}),
    Identity("linear_attention", "mamba2", lambda i: i | {"g": per_head(i)}),
    Identity("linear_attention", "gla", lambda i: i | {"gk": zeros(i["k"])}),
    Identity("linear_attention", "retention", lambda i: i | {"g": per_head(i)[0]}),
    Identity("retention", "mamba2", lambda i: i | {"g": i["g"].expand(len(i["v"]), -1)}),
    Identity("lightning_attention", "mamba2", lambda i: i | {"g": i["g"].expand(len(i["v"]), -1)}),
    Identity("lightning_attention", "retention", lambda i: i),
    Identity("deltanet", "gated_deltanet", lambda i: i | {"g": per_head(i)}),
    Identity("gated_deltanet", "kda", lambda i: without(i, "g") | {"gk": channels(i["g"])}),
    Identity("deltanet", "kda", lambda i: i | {"gk": zeros(i["k"])}),
    Identity("hgrn2", "gla", lambda i: i | {"k": -torch.expm1(i["gk"])}),
    Identity("gla", "rwkv7", lambda i: i | {"a": zeros(i["k"]), "b": zeros(i["k"])}),
    Identity("mamba2", "rwkv7", lambda i: without(i, "g") | {"gk": channels(i["g"]), "a": i["k"], "b": zeros(i["k"])}),
    Identity(
        "deltanet",
        "rwkv7",
        lambda i: (
            without(i, "beta")
            | {
                "gk": zeros(i["k"]),
                "a": -i["k"],
                "b": i["beta"][..., None] * i["k"],
                "k": i["beta"][..., None] * i["k"],
            }
        ),
    ),
    Identity(
        "gated_deltanet",
        "rwkv7",
        # rwkv7 erases what it held before the decay
        lambda i: (
            without(i, "beta", "g")
            | {
                "gk": channels(i["g"]),
                "a": -i["g"].exp()[..., None] * i["k"],
                "b": i["beta"][..., None] * i["k"],
                "k": i["beta"][..., None] * i["k"],
            }
        ),
    ),
    Identity(
        "deltanet",
        "titans",
        lambda i: (
            without(i, "beta")
            | {
                "eta": zeros(i["beta"]),
                "theta": i["beta"],
                "alpha": zeros(i["beta"]),
                "write": torch.ones_like(i["beta"]),
            }
        ),
        state=without_momentum,
    ),
]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.id)
def test_identity(identity, backend):
    special, general = scaled(identity.special), scaled(identity.general)
    case = sampled(special)
    expected = scan(special, case.inputs, case.cu_seqlens, initial_state=case.start(), backend="reference")
    if backend not in backends_for(general):
        backend = "reference"
    inputs, state = identity.inputs(case.inputs), identity.state(case.start())
    out = scan(general, inputs, case.cu_seqlens, initial_state=state, backend=backend)
    assert_close(out.output, expected.output, f"output of {identity.id}")
    assert_close(out.final_state["S"], expected.final_state["S"], f"state of {identity.id}")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_rwkv6_is_gla_read_one_token_late_plus_its_bonus(backend):
    rule = scaled("rwkv6")
    case = ScanCase(rule, SIZES, (40,), seed=6)
    i, start = case.inputs, case.start()
    out = scan(rule, i, initial_state=start, backend=backend)
    next_q = torch.cat([i["q"][1:], zeros(i["q"][:1])])
    gla = scan(scaled("gla"), without(i, "u") | {"q": next_q}, initial_state=start, backend=backend)
    first = 0.5 * torch.einsum("hk,hkv->hv", i["q"][0], start["S"][0])
    bonus = 0.5 * (i["q"] * i["u"] * i["k"]).sum(-1, keepdim=True) * i["v"]
    assert_close(out.output, torch.cat([first[None], gla.output[:-1]]) + bonus, "rwkv6 against gla")
    assert_close(out.final_state["S"], gla.final_state["S"], "their states")


def test_normalised_linear_attention_is_linear_attention_over_its_weights():
    rule = scaled("linear_attention", normalize=True)
    case = ScanCase(rule, SIZES, (30,), seed=7, with_state=False)
    positive = case.inputs | {"q": case.inputs["q"].abs() + 0.1, "k": case.inputs["k"].abs() + 0.1}
    normalised = scan(rule, positive).output
    plain = scan(scaled("linear_attention"), positive).output
    ones = scan(scaled("linear_attention"), positive | {"v": torch.ones_like(positive["v"])}).output
    assert_close(normalised, plain / ones * 0.5, "a mean over values")


def test_gated_slot_attention_with_open_gates_is_softmax_over_slots():
    # with gs = 0 and each token written to a slot of its own, a read is softmax attention over the tokens so far
    cls = find_mechanism("gsa")
    rule = cls(cls.Spec(scale=0.5))
    T, H, K, V = 6, 2, 4, 5
    generator = torch.Generator().manual_seed(8)
    q, k = (torch.randn(T, H, K, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(T, H, V, generator=generator, dtype=torch.float64)
    s = torch.eye(T, dtype=torch.float64)[:, None].expand(T, H, T)
    inputs = {"q": q, "k": k, "v": v, "s": s, "gs": torch.zeros_like(s)}
    scores = 0.5 * torch.einsum("thk,shk->hts", q, k).tril()
    expected = torch.einsum("hts,shv->thv", scores.softmax(-1).tril(), v)
    for backend in backends_for(rule):
        assert_close(scan(rule, inputs, backend=backend).output, expected, f"softmax attention on {backend}")


@pytest.mark.parametrize("cut", [0, 1, 36, 37])
def test_mamba_with_one_state_is_mamba2_a_channel(cut):
    # N = 1: a channel of mamba is a head of mamba2 with K = V = 1
    mamba, mamba2 = find_mechanism("mamba"), find_mechanism("mamba2")
    rule = mamba(mamba.Spec())
    case = ScanCase(rule, {"channels": 4, "N": 1}, (cut, 37 - cut), seed=9, with_state=False)
    i = case.inputs
    other = {
        "q": i["C"][:, None].expand(-1, 4, 1),
        "k": i["B"][:, None].expand(-1, 4, 1),
        "v": (i["dt"] * i["x"])[..., None],
        "g": i["dt"] * i["A"][:, 0],
    }
    out = scan(mamba2(mamba2.Spec(scale=1.0)), other, bounds(case.lengths))
    expected = scan(rule, i, case.cu_seqlens).output
    assert_close(out.output[..., 0] + i["D"] * i["x"], expected, "mamba")
