"""The rules that only decay: each against its equation written out, its inputs, its freeze, and the others."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from momkit.errors import InputError
from momkit.mechanisms.base import Affine, Context, Inputs, Mechanism, MechanismSpec, Sizes, State, Structure
from momkit.mechanisms.gla import GLA, GLASpec
from momkit.mechanisms.hgrn2 import HGRN2, HGRN2Spec
from momkit.mechanisms.lightning_attention import LightningAttention, LightningAttentionSpec
from momkit.mechanisms.linear_attention import LinearAttention, LinearAttentionSpec
from momkit.mechanisms.mamba2 import Mamba2, Mamba2Spec
from momkit.mechanisms.reference import has_time, scan_reference
from momkit.mechanisms.retention import Retention, RetentionSpec
from momkit.mechanisms.rwkv6 import RWKV6, RWKV6Spec

SIZES: Sizes = {"T": 11, "H": 2, "G": 2, "K": 3, "V": 4}
CU_SEQLENS = torch.tensor([0, 4, 4, 5, 11])

RULES: dict[str, tuple[type[Mechanism], MechanismSpec]] = {
    "linear_attention": (LinearAttention, LinearAttentionSpec()),
    "linear_attention_normalized": (LinearAttention, LinearAttentionSpec(normalize=True)),
    "linear_attention_relu": (LinearAttention, LinearAttentionSpec(normalize=True, feature_map="relu")),
    "linear_attention_none": (LinearAttention, LinearAttentionSpec(feature_map="none")),
    "retention": (Retention, RetentionSpec()),
    "lightning_attention": (LightningAttention, LightningAttentionSpec()),
    "mamba2": (Mamba2, Mamba2Spec()),
    "gla": (GLA, GLASpec()),
    "hgrn2": (HGRN2, HGRN2Spec()),
    "rwkv6": (RWKV6, RWKV6Spec()),
}
every_rule = pytest.mark.parametrize("name", RULES)


def bare(name: str) -> Mechanism:
    """A rule that only scans."""
    cls, spec = RULES[name]
    return cls(spec)


def built(name: str, layer_index: int = 0, num_layers: int = 1, dtype: torch.dtype = torch.float32) -> Mechanism:
    """A rule of a layer, two heads of K = 3 and V = 4."""
    torch.manual_seed(0)
    cls, spec = RULES[name]
    sized = spec.model_copy(update={"num_heads": 2, "head_dim": 3, "head_v_dim": 4})
    return cls(sized, Context(hidden_size=10, layer_index=layer_index, num_layers=num_layers)).to(dtype)


def project(rule: Mechanism, dtype: torch.dtype, spread: float = 1.0) -> Inputs:
    """What a block might hand to `prepare`."""
    generator = torch.Generator().manual_seed(1)
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return {
        p.name: activations[p.activation](
            spread * torch.randn(SIZES["T"], *p.shape, generator=generator, dtype=torch.float64)
        ).to(dtype)
        for p in rule.projections()
    }


def sample(rule: Mechanism, seed: int = 0) -> Inputs:
    return rule.sample(torch.Generator().manual_seed(seed), SIZES)


def start(rule: Mechanism, n: int = len(CU_SEQLENS) - 1) -> State:
    """Initial states; positive, as the normaliser of linear attention is."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(n, *shape, generator=generator, dtype=torch.float64)
        for name, shape in rule.state_spec(SIZES).items()
    }


def scan(rule: Mechanism, inputs: Inputs, state: State | None = None) -> tuple[Tensor, State]:
    return scan_reference(rule, inputs, CU_SEQLENS, start(rule) if state is None else state, SIZES)


def expected_token(
    name: str, x: dict[str, Tensor], S: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token of one head from the papers' equations, with matrices: q, k, gk, u `[K]`, v `[V]`, g scalar."""
    scale = 1.0 if name in ("mamba2", "rwkv6") else 1 / math.sqrt(SIZES["K"])
    q, v = x["q"], x["v"]
    if name.startswith("linear_attention"):
        S = S + torch.ger(x["k"], v)
        output = scale * (S.T @ q)
        if z is not None:
            z = z + x["k"]
            output = output / max(torch.dot(q, z).item(), 1e-6)
        return output, S, z
    if name in ("retention", "lightning_attention", "mamba2"):
        S = math.exp(x["g"].item()) * S + torch.ger(x["k"], v)
    elif name == "gla":
        S = torch.diag(x["gk"].exp()) @ S + torch.ger(x["k"], v)
    elif name == "hgrn2":
        forget = x["gk"].exp()
        S = torch.diag(forget) @ S + torch.ger(1 - forget, v)
    elif name == "rwkv6":
        write = torch.ger(x["k"], v)
        output = scale * (S + torch.diag(x["u"]) @ write).T @ q
        return output, torch.diag(x["gk"].exp()) @ S + write, z
    return scale * (S.T @ q), S, z


@every_rule
def test_step_is_the_equation(name: str) -> None:
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    output, final = scan(rule, inputs, state)
    domain = rule.inputs_domain()
    for n in range(len(CU_SEQLENS) - 1):
        for h in range(SIZES["H"]):
            S = state["S"][n, h]
            z = state["z"][n, h] if "z" in state else None
            for t in range(int(CU_SEQLENS[n]), int(CU_SEQLENS[n + 1])):
                x = {key: (i[t, h] if domain[key].axes[0] == "T" else i[h]) for key, i in inputs.items()}
                expected, S, z = expected_token(name, x, S, z)
                torch.testing.assert_close(output[t, h], expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(final["S"][n, h], S, rtol=1e-12, atol=1e-12)
            if z is not None:
                torch.testing.assert_close(final["z"][n, h], z, rtol=1e-12, atol=1e-12)


@every_rule
def test_gradients(name: str) -> None:
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    names, states = list(inputs), list(state)
    tensors = [t.requires_grad_() for t in (*inputs.values(), *state.values())]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        parts = dict(zip(names, values, strict=False))
        initial = dict(zip(states, values[len(names) :], strict=True))
        output, final = scan(rule, parts, initial)
        return (output, *final.values())

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prepare_gives_the_inputs_of_the_domain(name: str, dtype: torch.dtype) -> None:
    for layer_index, num_layers in ((0, 1), (0, 3), (2, 3)):
        rule = built(name, layer_index, num_layers, dtype)
        projected = project(rule, dtype)
        before = {key: x.clone() for key, x in projected.items()}
        inputs = rule.prepare(projected)
        assert all(torch.equal(projected[key], x) for key, x in before.items()) and set(before) == set(projected)
        domain = rule.inputs_domain()
        assert set(inputs) == set(domain)
        gate = torch.float64 if dtype == torch.float64 else torch.float32
        for key, x in inputs.items():
            assert tuple(x.shape) == tuple(SIZES[axis] for axis in domain[key].axes.split()), key
            assert x.isfinite().all(), key
            assert x.dtype == (gate if domain[key].is_gate or key == "u" else dtype), key
            assert (x >= domain[key].low).all() and (x <= domain[key].high).all(), key
        output, _ = scan(rule, inputs)
        finished = rule.finish(output, inputs, projected)
        assert finished.shape == output.shape and finished.dtype == dtype and finished.isfinite().all()


@every_rule
@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_gates_of_large_logits_stay_finite_and_not_above_zero(name: str, spread: float) -> None:
    for dtype in (torch.float32, torch.float64):
        for layer_index in range(3):
            rule = built(name, layer_index, 3, dtype)
            inputs = rule.prepare(project(rule, dtype, spread))
            for key, domain in rule.inputs_domain().items():
                if domain.is_gate:
                    assert inputs[key].isfinite().all() and (inputs[key] <= 0).all()


@every_rule
def test_gates_under_autocast_keep_their_precision(name: str) -> None:
    rule = built(name)
    projected = project(rule, torch.float32)
    plain = rule.prepare(projected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = rule.prepare(projected)
    for key, domain in rule.inputs_domain().items():
        if domain.is_gate:
            assert torch.equal(inputs[key], plain[key])


@pytest.mark.parametrize("name", ["mamba2", "gla", "rwkv6"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    rule = built(name, 1, 2)
    projected = project(rule, torch.float32)
    inputs = rule.prepare(projected)
    output, _ = scan(rule, inputs)
    loss = rule.finish(output, inputs, projected).square().sum()
    gradients = torch.autograd.grad(loss, list(rule.parameters()))
    assert gradients and all(x.isfinite().all() and x.abs().sum() > 0 for x in gradients)


@every_rule
def test_freeze_keeps_the_state_and_still_reads(name: str) -> None:
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    frozen = rule.freeze(inputs, torch.ones(SIZES["T"], dtype=torch.bool))
    output, final = scan(rule, frozen, state)
    assert all(torch.equal(final[key], state[key]) for key in state)
    assert (output != 0).all()

    where = torch.arange(SIZES["T"]) % 2 == 1
    mixed = rule.freeze(inputs, where)
    again = rule.freeze(mixed, where)
    domain = rule.inputs_domain()
    current = {key: x[0] for key, x in state.items()}
    for t in range(SIZES["T"]):
        token = {key: x[t] if has_time(domain[key].axes, x) else x for key, x in mixed.items()}
        after, _ = rule.step(current, token)
        unchanged = all(torch.equal(after[key], current[key]) for key in current)
        assert unchanged == bool(where[t])
        current = after
    assert all(torch.equal(mixed[key], again[key]) for key in mixed)
    assert all(torch.equal(mixed[key][~where], inputs[key][~where]) for key in ("v", "q"))


@every_rule
def test_freeze_lets_no_nan_into_the_state(name: str) -> None:
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    where = torch.zeros(SIZES["T"], dtype=torch.bool)
    where[-1] = True
    for key, domain in rule.inputs_domain().items():
        if domain.axes[0] == "T":
            inputs[key][-1] = math.nan
    _, final = scan(rule, rule.freeze(inputs, where), state)
    assert all(x.isfinite().all() for x in final.values())


@every_rule
def test_a_reset_gate_forgets_everything(name: str) -> None:
    rule = bare(name)
    gates = [key for key, domain in rule.inputs_domain().items() if domain.is_gate]
    if not gates:
        assert rule.structure == Structure(decay="none")
        return
    inputs = sample(rule)
    inputs[gates[0]] = torch.full_like(inputs[gates[0]], -math.inf)
    _, final = scan(rule, inputs)
    k = inputs.get("k", torch.ones_like(inputs["q"]))
    assert torch.equal(final["S"][-1], k[-1].unsqueeze(-1) * inputs["v"][-1].unsqueeze(-2))


@every_rule
def test_sample_is_finite_and_scans_finite(name: str) -> None:
    rule = bare(name)
    inputs = rule.sample(torch.Generator().manual_seed(3), SIZES | {"T": 200})
    assert all(x.isfinite().all() for x in inputs.values())
    output, final = scan_reference(rule, inputs, torch.tensor([0, 200]), start(rule, 1), SIZES)
    assert output.isfinite().all() and all(x.isfinite().all() for x in final.values())


@every_rule
def test_key_heads_are_shared_by_groups_of_heads(name: str) -> None:
    rule = bare(name)
    grouped = rule.sample(torch.Generator().manual_seed(4), SIZES | {"G": 1})
    wide = {
        key: x.expand(-1, SIZES["H"], -1) if "G" in rule.inputs_domain()[key].axes else x for key, x in grouped.items()
    }
    output, _ = scan_reference(rule, grouped, CU_SEQLENS, start(rule), SIZES | {"G": 1})
    expected, _ = scan(rule, wide)
    assert torch.equal(output, expected)


@every_rule
def test_compose_with_a_plain_affine_scan_is_the_step(name: str) -> None:
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    output, final = scan(rule, inputs, state)

    def affine(structure: Structure, x: Affine, S: Tensor) -> tuple[Tensor, Tensor]:
        decay = {"none": torch.zeros(()), "head": x.g, "constant": x.g, "key": x.gk}[structure.decay]
        assert decay is not None
        rows, finals = [], []
        for n in range(len(S)):
            M = S[n]
            for t in range(int(CU_SEQLENS[n]), int(CU_SEQLENS[n + 1])):
                gate = decay[t] if structure.decay in ("head", "key") else decay
                gate = gate.unsqueeze(-1) if structure.decay == "key" else gate[..., None, None]
                write = torch.einsum("hk,hv->hkv", x.k[t], x.v[t])
                seen = M + x.u.unsqueeze(-1) * write if x.u is not None else M * gate.exp() + write
                M = M * gate.exp() + write
                rows.append(x.scale * torch.einsum("hk,hkv->hv", x.q[t], seen))
            finals.append(M)
        return torch.stack(rows), torch.stack(finals)

    composed, composed_final = rule.compose(inputs, state, affine)
    torch.testing.assert_close(composed, output, rtol=1e-12, atol=1e-12)
    assert list(composed_final) == list(final)
    for key, x in final.items():
        torch.testing.assert_close(composed_final[key], x, rtol=1e-12, atol=1e-12)


@every_rule
def test_chunked_form_is_the_step(name: str) -> None:
    chunked = pytest.importorskip("momkit.mechanisms.chunked")
    rule = bare(name)
    inputs, state = sample(rule), start(rule)
    output, final = scan(rule, inputs, state)
    got, got_final = chunked.scan_chunked(rule, inputs, CU_SEQLENS, state, SIZES)
    torch.testing.assert_close(got, output, rtol=1e-10, atol=1e-10)
    for key, x in final.items():
        torch.testing.assert_close(got_final[key], x, rtol=1e-10, atol=1e-10)


def test_identities_between_rules() -> None:
    mamba2, gla = Mamba2(Mamba2Spec(scale=0.5)), GLA(GLASpec(scale=0.5))
    inputs = sample(mamba2)
    q, k, v, g = (inputs[key] for key in "qkvg")
    keys = {"q": q, "k": k, "v": v}
    state = start(mamba2)
    channels = g.unsqueeze(-1).expand_as(k)

    def agree(a: tuple[Tensor, State], b: tuple[Tensor, State]) -> None:
        torch.testing.assert_close(a[0], b[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(a[1]["S"], b[1]["S"], rtol=1e-13, atol=1e-13)

    agree(scan(mamba2, inputs, state), scan(gla, keys | {"gk": channels}, state))
    linear = LinearAttention(LinearAttentionSpec(scale=0.5))
    agree(scan(mamba2, keys | {"g": torch.zeros_like(g)}, state), scan(linear, keys, state))
    retention = Retention(RetentionSpec(scale=0.5))
    lightning = LightningAttention(LightningAttentionSpec(scale=0.5))
    agree(scan(mamba2, keys | {"g": g[:1].expand_as(g)}, state), scan(retention, keys | {"g": g[0]}, state))
    agree(scan(lightning, keys | {"g": g[0]}, state), scan(retention, keys | {"g": g[0]}, state))
    hgrn2 = HGRN2(HGRN2Spec(scale=0.5))
    tied = {"q": q, "v": v, "gk": channels}
    agree(scan(hgrn2, tied, state), scan(gla, tied | {"k": 1 - channels.exp()}, state))
    rwkv6 = RWKV6(RWKV6Spec(scale=0.5))
    finch = keys | {"gk": channels, "u": torch.ones(SIZES["H"], SIZES["K"], dtype=torch.float64)}
    no_decay = keys | {"gk": torch.zeros_like(k), "u": finch["u"]}
    agree(scan(rwkv6, no_decay, state), scan(linear, keys, state))
    torch.testing.assert_close(scan(rwkv6, finch, state)[1], scan(gla, keys | {"gk": channels}, state)[1])


def test_normalised_reads_are_averages_of_values() -> None:
    rule = LinearAttention(LinearAttentionSpec(normalize=True, scale=1.0))
    inputs = sample(rule) | {"v": torch.ones(SIZES["T"], SIZES["H"], SIZES["V"], dtype=torch.float64)}
    output, _ = scan(rule, inputs, {key: torch.zeros_like(x) for key, x in start(rule).items()})
    torch.testing.assert_close(output, torch.ones_like(output))
    nothing = inputs | {"q": torch.zeros_like(inputs["q"])}
    assert torch.equal(scan(rule, nothing)[0], torch.zeros_like(output))


def test_normalize_refuses_features_that_can_be_negative() -> None:
    with pytest.raises(ValidationError, match=r"feature_map = 'silu'.*elu, relu"):
        LinearAttentionSpec(normalize=True, feature_map="silu")
    with pytest.raises(ValidationError, match="eps"):
        LinearAttentionSpec(eps=0.0)


def test_constant_decays_are_the_papers() -> None:
    dtype = torch.float64
    g = built("retention", dtype=dtype).prepare(project(built("retention"), dtype))["g"]
    torch.testing.assert_close(g.exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=dtype), rtol=1e-15, atol=0)
    slopes = torch.tensor([1 / 16, 1 / 256], dtype=dtype)
    for layer_index, num_layers, share in ((0, 1, 1.0), (0, 5, 1.0), (1, 5, 0.75), (4, 5, 0.0)):
        rule = built("lightning_attention", layer_index, num_layers, dtype)
        g = rule.prepare(project(rule, dtype))["g"]
        torch.testing.assert_close(g, -slopes * (share + 1e-5), rtol=1e-12, atol=0)


def test_constants_are_not_rounded_by_a_cast_of_the_module() -> None:
    for name in ("retention", "lightning_attention"):
        rule = built(name, dtype=torch.bfloat16)
        once = rule.prepare(project(rule, torch.bfloat16))["g"]
        assert torch.equal(once, rule.float().prepare(project(rule, torch.float32))["g"])


def test_hgrn2_gates_keep_to_their_lower_bound() -> None:
    for layer_index, num_layers, lower in ((0, 1, 0.0), (0, 4, 0.0), (1, 4, 0.25), (3, 4, 0.75)):
        rule = built("hgrn2", layer_index, num_layers, torch.float64)
        projected = project(rule, torch.float64)
        gk = rule.prepare(projected)["gk"]
        torch.testing.assert_close(gk.exp(), lower + (1 - lower) * projected["f"].sigmoid())
        far = rule.prepare(projected | {"f": torch.full_like(projected["f"], -1e4)})["gk"]
        torch.testing.assert_close(far.exp(), torch.full_like(far, lower))


def test_mamba2_steps_and_skip() -> None:
    rule = built("mamba2", dtype=torch.float64)
    assert isinstance(rule, Mamba2)
    with torch.no_grad():
        rule.D.copy_(torch.tensor([2.0, -1.0]))
    projected = project(rule, torch.float64)
    inputs = rule.prepare(projected)
    dt = torch.log1p(torch.exp(projected["dt"] + rule.dt_bias))
    torch.testing.assert_close(inputs["v"], dt[..., None] * projected["x"])
    torch.testing.assert_close(inputs["g"], -torch.exp(rule.A_log) * dt)
    output, _ = scan(rule, inputs)
    skip = torch.stack([2.0 * projected["x"][:, 0], -projected["x"][:, 1]], dim=1)
    torch.testing.assert_close(rule.finish(output, inputs, projected), output + skip)


def test_low_rank_gates() -> None:
    gla = built("gla", dtype=torch.float64)
    assert isinstance(gla, GLA)
    projected = project(gla, torch.float64)
    logits = torch.einsum("tr,hkr->thk", projected["gk"], gla.gate_weight.view(2, 3, -1)) + gla.gate_bias
    torch.testing.assert_close(gla.prepare(projected)["gk"], torch.log(torch.sigmoid(logits)) / 16)
    rwkv6 = built("rwkv6", dtype=torch.float64)
    assert isinstance(rwkv6, RWKV6)
    projected = project(rwkv6, torch.float64)
    lora = torch.einsum("tr,hkr->thk", projected["gk"], rwkv6.decay_weight.view(2, 3, -1))
    inputs = rwkv6.prepare(projected)
    torch.testing.assert_close(inputs["gk"], -torch.exp(rwkv6.w0 + lora))
    assert torch.equal(inputs["u"], rwkv6.u)


@pytest.mark.parametrize("name", ["lightning_attention", "hgrn2", "rwkv6"])
def test_a_layer_outside_the_model_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="layer_index = 3; allowed: 0 to 2"):
        built(name, layer_index=3, num_layers=3)


@every_rule
def test_smallest_sizes(name: str) -> None:
    cls, spec = RULES[name]
    one = spec.model_copy(update={"num_heads": 1, "head_dim": 1})
    rule = cls(one, Context(hidden_size=1))
    assert rule.output_spec() == (1, 1)
    assert all(x.isfinite().all() for x in rule.state_dict().values())
    assert rule.name == spec.kind
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("name", ["mamba2", "rwkv6", "gla", "retention"])
def test_scale(name: str) -> None:
    cls, spec = RULES[name]
    q = torch.zeros(1, 1, 16)
    assert bare(name).scale_for(q) == (1.0 if name in ("mamba2", "rwkv6") else 0.25)
    assert cls(spec.model_copy(update={"scale": 0.3})).scale_for(q) == 0.3
