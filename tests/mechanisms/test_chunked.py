"""The chunked scan against one affine step at a time in float64: outputs, states, gradients, edges."""

import itertools
from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import BackendError, InputError
from momkit.mechanisms.base import Affine, Domain, HeadSpec, Mechanism, State, Structure
from momkit.mechanisms.chunked import affine_scan, scan_chunked
from momkit.mechanisms.reference import scan_reference
from momkit.scan import as_mechanism, scan
from momkit.testing.affine import affine_step

DECAYS: tuple[Any, ...] = ("none", "constant", "head", "key", "value")
ERASES: tuple[Any, ...] = (
    ("none", "decayed"),
    ("delta", "decayed"),
    ("delta", "previous"),
    ("low_rank", "decayed"),
    ("low_rank", "previous"),
)
READS: tuple[Any, ...] = ("after", "before")
STRUCTURES = [
    Structure(decay, erase, sees, read)
    for decay, (erase, sees), read in itertools.product(DECAYS, ERASES, READS)
    if decay != "value" or erase == "none"
]
CASES = [
    (s, gates) for s in STRUCTURES for gates in ("mild", "extreme", "infinite") if s.decay != "none" or gates == "mild"
]
CU = [0, 0, 9, 10, 10, 31, 33, 33]  # empty, one token, more than two chunks of 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def affine_inputs(
    structure: Structure, T: int, seed: int = 0, *, H: int = 2, G: int = 2, K: int = 5, V: int = 3, gates: str = "mild"
) -> Affine:
    """Random float64 inputs of a rule whose erases contract."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(*shape: int) -> Tensor:
        g = -normal(*shape).exp() * 0.3
        if gates != "mild":
            kind = torch.randint(0, 6, shape, generator=generator)
            g = g.masked_fill(kind == 0, 0.0).masked_fill(kind == 1, -1e4).masked_fill(kind == 2, -90.0)
        if gates == "infinite":
            g = g.masked_fill(kind == 3, -torch.inf)
        return g

    k = torch.nn.functional.normalize(normal(T, G, K), dim=-1)
    x = Affine(q=normal(T, G, K), k=k, v=normal(T, H, V), scale=0.7)
    if structure.decay == "constant":
        x = replace(x, g=gate(H))
    elif structure.decay == "head":
        x = replace(x, g=gate(T, H))
    elif structure.decay == "key":
        x = replace(x, gk=gate(T, G, K))
    elif structure.decay == "value":
        x = replace(x, gv=gate(T, H, V))
    if structure.erase == "delta":
        x = replace(x, beta=torch.sigmoid(normal(T, H)))
    elif structure.erase == "low_rank":
        a = torch.nn.functional.normalize(normal(T, G, K), dim=-1)
        x = replace(x, a=a, b=-a * torch.sigmoid(normal(T, G, K)))
    if structure.read == "before":
        x = replace(x, u=normal(H, K))
    return x


def name(case: Structure | str) -> str:
    return case if isinstance(case, str) else "-".join((case.decay, case.erase, case.erase_sees, case.read))


def tensors(x: Affine) -> dict[str, Tensor]:
    return {f.name: t for f in fields(x) if isinstance(t := getattr(x, f.name), Tensor)}


def replaced(x: Affine, new: dict[str, Any]) -> Affine:
    return replace(x, **new)


def leaves(x: Affine, dtype: torch.dtype) -> Affine:
    return replaced(x, {name: t.detach().to(dtype).requires_grad_() for name, t in tensors(x).items()})


def loop(structure: Structure, x: Affine, cu_seqlens: list[int], S0: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: every segment alone, token after token."""
    H = S0.shape[1]
    rows = list(torch.zeros_like(x.v))
    finals = []
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        S = S0[n]
        for t in range(start, stop):
            token: dict[str, Any] = {}
            for name, tensor in tensors(x).items():
                at_t = tensor if (name == "u" and tensor.ndim == 2) or tensor.ndim == 1 else tensor[t]
                token[name] = at_t.repeat_interleave(H // at_t.shape[0], 0)
            S, rows[t] = affine_step(structure, S, replaced(x, token))
        finals.append(S)
    return torch.stack(rows) if rows else x.v * 0, torch.stack(finals)


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.isfinite().all(), f"{name} is not finite"
    error = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    assert error <= TOLERANCE[dtype] * size, f"{name}: error {error:.2e} at size {size:.2e}"


def check(
    structure: Structure, x: Affine, cu: list[int], dtype: torch.dtype = torch.float64, chunk_size: int = 8
) -> None:
    """Outputs, final states and the gradient of everything, through outputs and final states."""
    generator = torch.Generator().manual_seed(1)
    N, H, K, V = len(cu) - 1, x.v.shape[1], x.k.shape[-1], x.v.shape[-1]
    S0 = torch.randn(N, H, K, V, generator=generator, dtype=torch.float64)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (x.v.shape, S0.shape)]

    results: list[dict[str, Tensor]] = []
    for form in ("loop", "chunked"):
        kind = torch.float64 if form == "loop" else dtype
        xs, S = leaves(x, kind), S0.to(kind).requires_grad_()
        if form == "loop":
            output, final = loop(structure, xs, cu, S)
        else:
            output, final = affine_scan(structure, xs, torch.tensor(cu), S, chunk_size)
        sources = tensors(xs) | {"initial state": S}
        loss = (output * weights[0].to(kind)).sum() + (final * weights[1].to(kind)).sum()
        grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
        results.append(
            {"output": output, "final state": final} | {f"d {n}": g for n, g in zip(sources, grads, strict=True)}
        )

    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected.detach().nan_to_num(), dtype)
    assert not results[1]["output"][cu[-1] :].any()


@pytest.mark.parametrize(("structure", "gates"), CASES, ids=name)
def test_every_structure_is_its_step(structure: Structure, gates: str) -> None:
    check(structure, affine_inputs(structure, CU[-1] + 3, gates=gates), CU)


@pytest.mark.parametrize("structure", STRUCTURES, ids=name)
def test_float32_and_fewer_key_heads(structure: Structure) -> None:
    check(structure, affine_inputs(structure, CU[-1], gates="extreme", H=4, G=2), CU, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    structure=st.sampled_from(STRUCTURES),
    lengths=st.lists(st.integers(0, 19), min_size=1, max_size=5),
    tail=st.integers(0, 3),
    chunk_size=st.sampled_from([1, 2, 4, 16, 64]),
    sizes=st.tuples(st.sampled_from([(1, 1), (2, 1), (3, 3)]), st.integers(1, 4), st.integers(1, 4)),
    gates=st.sampled_from(["mild", "extreme", "infinite"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    structure: Structure,
    lengths: list[int],
    tail: int,
    chunk_size: int,
    sizes: tuple[tuple[int, int], int, int],
    gates: str,
    seed: int,
) -> None:
    (H, G), K, V = sizes
    cu = [0, *itertools.accumulate(lengths)]
    x = affine_inputs(structure, cu[-1] + tail, seed, H=H, G=G, K=K, V=V, gates=gates)
    check(structure, x, cu, chunk_size=chunk_size)


@pytest.mark.parametrize("decay", ["head", "key", "value"])
@pytest.mark.parametrize("g", [0.0, -1e-3, -50.0, -1e4, -torch.inf])
def test_gates_of_one_size(decay: Literal["head", "key", "value"], g: float) -> None:
    structure = Structure(decay, "none" if decay == "value" else "delta")
    x = affine_inputs(structure, 40)
    gates = {n: torch.full_like(t, g) for n, t in tensors(x).items() if n in ("g", "gk", "gv")}
    check(structure, replaced(x, gates), [0, 40])


@pytest.mark.parametrize("erase", ["none", "delta", "low_rank"])
def test_float32_over_many_chunks(erase: Literal["none", "delta", "low_rank"]) -> None:
    structure = Structure("head", erase)
    check(structure, affine_inputs(structure, 300, K=16, V=16), [0, 250, 300], torch.float32, 64)


def test_constants_may_vary_over_time() -> None:
    structure = Structure("constant", read="before")
    x = affine_inputs(structure, CU[-1])
    assert x.g is not None and x.u is not None
    g = x.g.expand(CU[-1], -1).masked_fill(torch.arange(CU[-1])[:, None] % 3 == 0, 0.0)
    check(structure, replace(x, g=g, u=x.u.expand(CU[-1], -1, -1) * torch.rand(CU[-1], 1, 1).double()), CU)


def test_many_groups_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momkit.mechanisms.chunked.GROUP", 1)
    monkeypatch.setattr("momkit.mechanisms.chunked.DELTA_GROUP", 1)
    for structure in (Structure("head", "delta"), Structure("key", "delta"), Structure("value")):
        check(structure, affine_inputs(structure, CU[-1]), CU)
        check(structure, affine_inputs(structure, 48), [0, 24, 48])
        check(structure, affine_inputs(structure, 50), [0, 24, 48])


@pytest.mark.parametrize("length", [8, 9])
def test_outputs_and_final_states_may_be_changed_in_place(length: int) -> None:
    for structure in (Structure("head"), Structure("head", "delta")):
        x = leaves(affine_inputs(structure, length), torch.float64)
        output, final = affine_scan(structure, x, torch.tensor([0, length]), torch.zeros(1, 2, 5, 3).double(), 8)
        assert x.v.grad is None
        (output.mul_(2.0).sum() + final.mul_(2.0).sum()).backward()
        assert x.v.grad is not None


def test_nothing_to_scan() -> None:
    structure = Structure("head", "delta")
    S0 = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    for T in (0, 4):
        output, final = affine_scan(structure, affine_inputs(structure, T), torch.tensor([0, 0, 0]), S0)
        assert output.shape == (T, 2, 3) and not output.any()
        assert torch.equal(final, S0)


def test_rows_that_no_segment_covers_are_never_read() -> None:
    structure = Structure("key", "low_rank", "previous")
    x = affine_inputs(structure, 12)
    poisoned = {n: torch.cat([t[:9], torch.full_like(t[9:], torch.nan)]) for n, t in tensors(x).items()}
    xs = leaves(replaced(x, poisoned), torch.float64)
    output, final = affine_scan(structure, xs, torch.tensor([0, 9]), torch.zeros(1, 2, 5, 3).double())
    grads = torch.autograd.grad(output.sum() + final.sum(), list(tensors(xs).values()))
    assert not output[9:].any() and not any(g[9:].any() for g in grads)
    assert output.isfinite().all() and all(g.isfinite().all() for g in grads)


class RuleSpec(HeadSpec):
    kind: Literal["rule"] = "rule"


class Rule(Mechanism):
    """A gated delta rule with fewer key heads than heads, and a constant that may vary.

    S = e^g S, then delta.

    No paper.
    """

    Spec = RuleSpec
    structure: Structure | None = Structure("constant", "delta")

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K", unit_norm=True),
            "v": Domain("T H V"),
            "g": Domain("H", high=0.0),
            "beta": Domain("T H", low=0.0, high=1.0),
        }

    def step(self, state: State, inputs: dict[str, Tensor]) -> tuple[State, Tensor]:
        assert self.structure is not None
        S, output = affine_step(self.structure, state["S"], self.lower(inputs))
        return {"S": S}, output


class StepOnly(Rule):
    structure: Structure | None = None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mechanism_with_fewer_key_heads(dtype: torch.dtype) -> None:
    sizes = {"H": 4, "G": 2, "K": 5, "V": 3}
    rule = Rule(RuleSpec())
    inputs = rule.sample(torch.Generator().manual_seed(0), sizes | {"T": CU[-1] + 2})
    inputs = {n: t.to(dtype if n in "qkv" or dtype == torch.float64 else torch.float32) for n, t in inputs.items()}
    state = {"S": torch.randn(len(CU) - 1, 4, 5, 3)}
    cu = torch.tensor(CU, dtype=torch.int32)
    output, final = scan_chunked(rule, inputs, cu, state, sizes)
    expected, expected_final = scan_reference(rule, inputs, cu, state, sizes)
    assert output.dtype == dtype and final["S"].dtype == expected_final["S"].dtype
    torch.testing.assert_close(final, expected_final)
    torch.testing.assert_close(output, expected)


def test_what_has_no_chunked_form_is_refused() -> None:
    with pytest.raises(BackendError, match="rule"):
        scan_chunked(StepOnly(RuleSpec()), {}, torch.tensor([0]), {}, {})
    structure = Structure("value", "delta")
    x, S0 = affine_inputs(structure, 4), torch.zeros(1, 2, 5, 3)
    with pytest.raises(BackendError, match="value"):
        affine_scan(structure, x, torch.tensor([0, 4]), S0)
    with pytest.raises(InputError, match="chunk_size = 48"):
        affine_scan(Structure("none"), x, torch.tensor([0, 4]), S0, chunk_size=48)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_a_gradient_taken_under_autocast_is_no_coarser(name):
    rule = as_mechanism(name)
    sizes = {"T": 70, "H": 2, "G": 2, "K": 4, "V": 4}
    inputs = {n: x.float().requires_grad_() for n, x in rule.sample(torch.Generator().manual_seed(0), sizes).items()}
    plain = torch.autograd.grad(scan(rule, inputs, backend="chunked").output.sum(), list(inputs.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = scan(rule, inputs, backend="chunked").output.sum()
        under = torch.autograd.grad(total, list(inputs.values()))
    for x, y in zip(under, plain, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["gated_deltanet", "gla"])
def test_a_second_derivative_is_refused(name):
    rule = as_mechanism(name)
    sizes = {"T": 40, "H": 2, "G": 2, "K": 4, "V": 4}
    inputs = {n: x.requires_grad_() for n, x in rule.sample(torch.Generator().manual_seed(0), sizes).items()}
    total = scan(rule, inputs, backend="chunked").output.square().sum()
    with pytest.raises(RuntimeError, match="can be differentiated once; 'reference' any number of times"):
        torch.autograd.grad(total, list(inputs.values()), create_graph=True)
