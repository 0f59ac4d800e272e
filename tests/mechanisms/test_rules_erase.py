"""Rules that correct, select or learn what their memory holds: each against its equation, written out again."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from momkit.mechanisms.base import Affine, Context, Inputs, Mechanism, Sizes, State, Structure, take
from momkit.mechanisms.deltanet import DeltaNet, DeltaNetSpec
from momkit.mechanisms.gated_deltanet import GatedDeltaNet, GatedDeltaNetSpec
from momkit.mechanisms.gsa import GatedSlotAttention, GatedSlotAttentionSpec
from momkit.mechanisms.kda import KDA, KDASpec
from momkit.mechanisms.mamba import Mamba, MambaSpec
from momkit.mechanisms.reference import scan_reference
from momkit.mechanisms.rwkv7 import RWKV7, RWKV7Spec
from momkit.mechanisms.titans import Titans, TitansSpec
from momkit.mechanisms.ttt_linear import TTTLinear, TTTLinearSpec

SIZES = {"H": 4, "G": 2, "K": 5, "V": 3, "slots": 6, "channels": 7, "N": 3}
BUILDS: dict[str, Callable[[Context | None], Mechanism]] = {
    "deltanet": lambda context: DeltaNet(DeltaNetSpec(), context),
    "deltanet_neg": lambda context: DeltaNet(DeltaNetSpec(allow_neg_eigval=True), context),
    "kda": lambda context: KDA(KDASpec(head_dim=6, head_v_dim=4, gate_low_rank=3), context),
    "rwkv7": lambda context: RWKV7(RWKV7Spec(head_dim=6, head_v_dim=4), context),
    "gsa": lambda context: GatedSlotAttention(GatedSlotAttentionSpec(num_slots=5), context),
    "mamba": lambda context: Mamba(MambaSpec(state_dim=4), context),
    "ttt_linear": lambda context: TTTLinear(TTTLinearSpec(), context),
    "titans": lambda context: Titans(TitansSpec(), context),
}


def sample(mechanism: Mechanism, length: int, seed: int = 0, **sizes: int) -> tuple[Inputs, Sizes]:
    sizes = SIZES | {"T": length} | sizes
    return mechanism.sample(torch.Generator().manual_seed(seed), sizes), sizes


def random_state(mechanism: Mechanism, segments: int, sizes: Sizes) -> State:
    generator = torch.Generator().manual_seed(7)
    shapes = mechanism.state_spec(sizes)
    return {n: torch.randn((segments, *s), generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def zero_state(mechanism: Mechanism, segments: int, sizes: Sizes) -> State:
    return {n: torch.zeros((segments, *s), dtype=torch.float64) for n, s in mechanism.state_spec(sizes).items()}


def one_sequence(length: int) -> Tensor:
    return torch.tensor([0, length])


# one token of one head, from the equation: state and inputs in, state and output out


def delta(S: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    kept = torch.eye(len(k)).double() - beta * torch.outer(k, k)
    S["S"] = kept @ S["S"] + beta * torch.outer(k, v)
    return (q @ S["S"]) / math.sqrt(len(q))


def kda(S: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, gk: Tensor, beta: Tensor) -> Tensor:
    S["S"] = torch.diag(gk.exp()) @ S["S"]
    return delta(S, q, k, v, beta)


def rwkv7(S: dict[str, Tensor], q: Tensor, gk: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    S["S"] = (torch.diag(gk.exp()) + torch.outer(b, a)) @ S["S"] + torch.outer(k, v)
    return q @ S["S"]


def gsa(S: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, s: Tensor, gs: Tensor) -> Tensor:
    S["Kt"] = S["Kt"] @ torch.diag(gs.exp()) + torch.outer(k, s)
    S["Vt"] = torch.diag(gs.exp()) @ S["Vt"] + torch.outer(s, v)
    return torch.softmax((q @ S["Kt"]) / math.sqrt(len(q)), -1) @ S["Vt"]


def ttt_linear(
    S: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, ln_w: Tensor, ln_b: Tensor
) -> Tensor:
    def norm(z: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(z, z.shape, ln_w, ln_b, eps=1e-6)

    with torch.enable_grad():
        W, b = S["W"].detach().requires_grad_(), S["b"].detach().requires_grad_()
        loss = 0.5 * (norm(W.T @ k + b) - (v - k)).square().sum()
        dW, db = torch.autograd.grad(loss, (W, b))
    S["W"], S["b"] = S["W"] - eta * dW, S["b"] - eta * db
    return q + norm(S["W"].T @ q + S["b"])


def titans(
    S: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, theta: Tensor, alpha: Tensor, write: Tensor
) -> Tensor:
    with torch.enable_grad():
        memory = S["S"].detach().requires_grad_()
        (grad,) = torch.autograd.grad(0.5 * (k @ memory - v).square().sum(), memory)
    S["m"] = eta * S["m"] - theta * grad
    S["S"] = (1 - alpha) * S["S"] + write * S["m"]
    return (q @ S["S"]) / math.sqrt(len(q))


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "deltanet": delta,
    "deltanet_neg": delta,
    "kda": kda,
    "rwkv7": rwkv7,
    "gsa": gsa,
    "ttt_linear": ttt_linear,
    "titans": titans,
}


def by_heads(name: str, mechanism: Mechanism, inputs: Inputs, state: State, sizes: Sizes) -> tuple[Tensor, State]:
    """One sequence, token by token and head by head."""
    domain = mechanism.inputs_domain()
    outputs, finals = [], []
    for head in range(sizes["H"]):
        S = {n: x[0, head] for n, x in state.items()}
        row = []
        for t in range(sizes["T"]):
            token = {}
            for n, x in inputs.items():
                axes = domain[n].axes.split()
                x = x[t] if axes[0] == "T" else x
                token[n] = x[head * sizes["G"] // sizes["H"] if "G" in axes else head]
            row.append(EQUATIONS[name](S, **token))
        outputs.append(torch.stack(row))
        finals.append(S)
    return torch.stack(outputs, 1), {n: torch.stack([S[n] for S in finals])[None] for n in state}


def by_channels(inputs: Inputs, state: State) -> tuple[Tensor, State]:
    """Mamba's scan, one channel at a time."""
    x, dt, A, B, C, D = take(inputs, "x dt A B C D")
    output, final = torch.zeros_like(x), state["h"].clone()
    for c in range(x.shape[1]):
        h = state["h"][0, c]
        for t in range(len(x)):
            h = torch.diag((dt[t, c] * A[c]).exp()) @ h + dt[t, c] * B[t] * x[t, c]
            output[t, c] = C[t] @ h + D[c] * x[t, c]
        final[0, c] = h
    return output, {"h": final}


@pytest.mark.parametrize("name", BUILDS)
def test_step_is_the_equation(name: str) -> None:
    mechanism = BUILDS[name](None)
    inputs, sizes = sample(mechanism, 9)
    state = random_state(mechanism, 1, sizes)
    output, final = scan_reference(mechanism, inputs, one_sequence(9), state, sizes)
    if name == "mamba":
        expected, expected_final = by_channels(inputs, state)
    else:
        expected, expected_final = by_heads(name, mechanism, inputs, state, sizes)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    for n in final:
        torch.testing.assert_close(final[n], expected_final[n], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_ttt_inner_gradient_is_autograd(dim: int) -> None:
    z, target, ln_w, ln_b = torch.randn((4, 3, dim), generator=torch.Generator().manual_seed(1)).double()
    z.requires_grad_()
    y = torch.nn.functional.layer_norm(z, (dim,), eps=1e-6) * ln_w + ln_b
    (expected,) = torch.autograd.grad(0.5 * (y - target).square().sum(), z)
    actual = TTTLinear(TTTLinearSpec()).inner_gradient(z, target, ln_w, ln_b)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_ttt_step_is_differentiable() -> None:
    mechanism = TTTLinear(TTTLinearSpec())
    inputs, sizes = sample(mechanism, 3, H=1, G=1, K=3)
    state = random_state(mechanism, 1, sizes)
    leaves = [x.requires_grad_() for x in (*inputs.values(), *state.values())]

    def scan(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=False))
        initial = dict(zip(state, tensors[len(inputs) :], strict=True))
        output, final = scan_reference(mechanism, given, one_sequence(3), initial, sizes)
        return output, *final.values()

    assert torch.autograd.gradcheck(scan, leaves)


def project(mechanism: Mechanism, length: int, dtype: torch.dtype) -> Inputs:
    """What a block would hand to `prepare`, up to its weights."""
    generator = torch.Generator().manual_seed(3)
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "none": torch.clone,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    projected = {}
    for p in mechanism.projections():
        x = activations[p.activation](torch.randn((length, *p.shape), generator=generator))
        projected[p.name] = (torch.nn.functional.normalize(x, dim=-1) if p.l2 else x).to(dtype)
    return projected


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDS)
def test_prepare_gives_what_the_domain_says(name: str, dtype: torch.dtype, length: int) -> None:
    mechanism = BUILDS[name](Context(hidden_size=24, layer_index=1, num_layers=3)).to(dtype)
    projected = project(mechanism, length, dtype)
    before = {n: x.clone() for n, x in projected.items()}
    inputs = mechanism.prepare(projected)
    domain = mechanism.inputs_domain()
    assert list(inputs) == list(domain)
    for n, x in inputs.items():
        assert x.shape == tuple((mechanism.sizes | {"T": length})[a] for a in domain[n].axes.split()), n
        gate = domain[n].is_gate or n in ("dt", "A", "s", "eta", "theta", "alpha")
        assert x.dtype == (torch.float32 if gate and dtype == torch.bfloat16 else dtype) or n == "write", n
        assert ((x >= domain[n].low) & (x <= domain[n].high)).all(), n
        if domain[n].unit_norm:
            torch.testing.assert_close(x.float().norm(dim=-1), torch.ones(x.shape[:-1]), rtol=1e-2, atol=1e-2)
    assert all(torch.equal(before[n], projected[n]) for n in projected)


@pytest.mark.parametrize("name", ["kda", "rwkv7", "mamba", "ttt_linear", "titans"])
def test_every_parameter_learns(name: str) -> None:
    mechanism = BUILDS[name](Context(hidden_size=24)).double()
    projected = project(mechanism, 6, torch.float64)
    inputs = mechanism.prepare(projected)
    sizes = mechanism.sizes | {"T": 6}
    output, _ = scan_reference(mechanism, inputs, one_sequence(6), mechanism.initial_state(1), sizes)
    finished = mechanism.finish(output, inputs, projected)
    assert finished.shape == output.shape
    finished.square().sum().backward()
    for parameter_name, parameter in mechanism.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", BUILDS)
def test_freeze_keeps_every_state_and_reads(name: str) -> None:
    mechanism = BUILDS[name](None)
    inputs, sizes = sample(mechanism, 12)
    state = random_state(mechanism, 3, sizes)
    cu_seqlens = torch.tensor([0, 5, 5, 12])
    frozen = mechanism.freeze(inputs, torch.ones(12, dtype=torch.bool))
    assert list(frozen) == list(inputs)
    output, final = scan_reference(mechanism, frozen, cu_seqlens, state, sizes)
    assert all(torch.equal(final[n], state[n]) for n in state)

    assert output.abs().sum() > 0


@pytest.mark.parametrize("name", BUILDS)
def test_a_frozen_token_reads_what_others_wrote(name: str) -> None:
    mechanism = BUILDS[name](None)
    inputs, sizes = sample(mechanism, 12)
    state = random_state(mechanism, 1, sizes)
    mixed = mechanism.freeze(inputs, torch.arange(12) == 3)
    output, _ = scan_reference(mechanism, mixed, one_sequence(12), state, sizes)

    _, written = scan_reference(mechanism, inputs, one_sequence(3), state, sizes)
    frozen = mechanism.freeze(inputs, torch.ones(12, dtype=torch.bool))
    reads, _ = scan_reference(mechanism, frozen, one_sequence(12), written, sizes)
    assert torch.equal(output[3], reads[3])


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("seed", range(3))
def test_samples_stay_bounded(name: str, seed: int) -> None:
    mechanism = BUILDS[name](None)
    inputs, sizes = sample(mechanism, 256, seed)
    domain = mechanism.inputs_domain()
    assert all(((x >= domain[n].low) & (x <= domain[n].high)).all() for n, x in inputs.items())
    state = zero_state(mechanism, 1, sizes)
    output, _ = scan_reference(mechanism, inputs, one_sequence(256), state, sizes)
    assert output.abs().max() < 1e3

    single = {n: x.float() for n, x in inputs.items()}
    rounded, _ = scan_reference(mechanism, single, one_sequence(256), state_to(state, torch.float32), sizes)
    torch.testing.assert_close(rounded.double(), output, rtol=1e-3, atol=1e-3)


def state_to(state: State, dtype: torch.dtype) -> State:
    return {n: x.to(dtype) for n, x in state.items()}


def affine_steps(structure: Structure, x: Affine, S: Tensor) -> tuple[Tensor, Tensor]:
    """An affine scan of one segment, token by token, from what a structure says."""
    r = x.v.shape[1] // x.q.shape[1]
    q, k = (y.repeat_interleave(r, 1) for y in (x.q, x.k))
    outputs = []
    for t in range(len(x.v)):
        erase = torch.zeros_like(S)
        kept, write = S, torch.einsum("hk,hv->hkv", k[t], x.v[t])
        if structure.decay == "head":
            assert x.g is not None
            kept = S * x.g[t, :, None, None].exp()
        if structure.decay == "key":
            assert x.gk is not None
            kept = S * x.gk[t].repeat_interleave(x.v.shape[1] // x.gk.shape[1], 0)[:, :, None].exp()
        if structure.decay == "value":
            assert x.gv is not None
            kept = S * x.gv[t, :, None, :].exp()
        seen = kept if structure.erase_sees == "decayed" else S
        if structure.erase == "delta":
            assert x.beta is not None
            write = write * x.beta[t, :, None, None]
            erase = -torch.einsum("hk,hj,nhjv,h->nhkv", k[t], k[t], seen, x.beta[t])
        if structure.erase == "low_rank":
            assert x.a is not None and x.b is not None
            a, b = (y[t].repeat_interleave(r, 0) for y in (x.a, x.b))
            erase = torch.einsum("hk,hj,nhjv->nhkv", b, a, seen)
        S = kept + erase + write
        outputs.append(x.scale * torch.einsum("hk,nhkv->hv", q[t], S))
    return torch.stack(outputs), S


AFFINE = [name for name, build in BUILDS.items() if build(None).has_chunked_form]


@pytest.mark.parametrize("name", AFFINE)
def test_affine_form_is_the_step(name: str) -> None:
    mechanism = BUILDS[name](None)
    inputs, sizes = sample(mechanism, 9)
    state = random_state(mechanism, 1, sizes)
    expected, expected_final = scan_reference(mechanism, inputs, one_sequence(9), state, sizes)
    output, final = mechanism.compose(inputs, state, affine_steps)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final, expected_final, rtol=1e-11, atol=1e-12)


def test_gated_deltanet_without_decay_is_deltanet() -> None:
    plain, gated = DeltaNet(DeltaNetSpec()), GatedDeltaNet(GatedDeltaNetSpec())
    inputs, sizes = sample(gated, 11)
    inputs["g"] = torch.zeros_like(inputs["g"])
    state = random_state(gated, 1, sizes)
    output, final = scan_reference(gated, inputs, one_sequence(11), state, sizes)
    del inputs["g"]
    expected, expected_final = scan_reference(plain, inputs, one_sequence(11), state, sizes)
    assert torch.equal(output, expected) and torch.equal(final["S"], expected_final["S"])


def test_kda_with_equal_channels_is_gated_deltanet() -> None:
    gated, channels = GatedDeltaNet(GatedDeltaNetSpec()), KDA(KDASpec())
    inputs, sizes = sample(gated, 11, G=4)
    state = random_state(gated, 1, sizes)
    expected, expected_final = scan_reference(gated, inputs, one_sequence(11), state, sizes)
    inputs["gk"] = inputs.pop("g")[..., None].expand(-1, -1, sizes["K"])
    output, final = scan_reference(channels, inputs, one_sequence(11), state, sizes)
    assert torch.equal(output, expected) and torch.equal(final["S"], expected_final["S"])


def test_rwkv7_with_tied_vectors_is_kda_without_decay() -> None:
    low_rank, channels = RWKV7(RWKV7Spec(scale=0.5)), KDA(KDASpec(scale=0.5))
    inputs, sizes = sample(channels, 11, G=4)
    inputs["gk"] = torch.zeros_like(inputs["gk"])
    state = random_state(channels, 1, sizes)
    expected, _ = scan_reference(channels, inputs, one_sequence(11), state, sizes)
    q, k, v, gk, beta = take(inputs, "q k v gk beta")
    tied = {"q": q, "gk": gk, "k": beta[..., None] * k, "v": v, "a": -k, "b": beta[..., None] * k}
    output, _ = scan_reference(low_rank, tied, one_sequence(11), state, sizes)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_ttt_starts_from_its_learned_state() -> None:
    mechanism = TTTLinear(TTTLinearSpec(num_heads=2), Context(hidden_size=12))
    state = mechanism.initial_state(3)
    assert {n: x.shape for n, x in state.items()} == {"W": (3, 2, 6, 6), "b": (3, 2, 6)}
    assert torch.equal(state["W"][2], mechanism.W0) and state["W"].requires_grad


def test_ttt_refuses_values_of_another_dim() -> None:
    with pytest.raises(ValidationError, match="head_v_dim = 8 must equal head_dim = 4"):
        TTTLinearSpec(head_dim=4, head_v_dim=8)
    assert TTTLinearSpec(head_dim=4, head_v_dim=4).sizes(16)["V"] == 4


@pytest.mark.parametrize("num_layers", [1, 4])
def test_rwkv7_decays_stay_in_range_at_every_depth(num_layers: int) -> None:
    for layer_index in range(num_layers):
        mechanism = RWKV7(RWKV7Spec(num_heads=1, head_dim=1), Context(8, layer_index, num_layers))
        gk = mechanism.prepare(project(mechanism, 4, torch.float32))["gk"]
        assert torch.isfinite(gk).all() and (gk < 0).all() and (gk >= -0.6066).all()
