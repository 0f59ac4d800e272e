"""Generated kernels under Triton's interpreter, held to the step in float64: `TRITON_INTERPRET=1 pytest`."""

import re
import sys
from dataclasses import replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from momkit.kernels.available import interpreting
from momkit.mechanisms import generated_scan
from momkit.mechanisms.base import Domain, HeadSpec, Mechanism, outer, read, take
from momkit.mechanisms.generated_scan import (
    decode_generated,
    kernel_source,
    module_key,
    scan_generated,
    why_not_generated,
)
from momkit.registry import find_mechanism
from momkit.testing.oracle import gradients_of, step_by_step, weighted_sum
from momkit.testing.poison import poisoned_empty
from momkit.testing.strategies import ScanCase
from momkit.testing.tolerances import assert_all_as_good, assert_close, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels.generated import cache as modules
from momkit.kernels.generated import ops
from momkit.kernels.generated import settings as launching

SIZES = {"H": 2, "G": 1, "K": 3, "V": 5, "slots": 3, "channels": 5, "N": 3}
EXAMPLE = Path(__file__).parents[2] / "plugins_example/src/momkit_example/decayed_oja.py"
RULES = [
    "linear_attention", "normalized", "retention", "lightning_attention", "mamba2", "gla", "hgrn2", "rwkv6", "deltanet",
    "gated_deltanet", "kda", "rwkv7", "gsa", "mamba", "ttt_linear", "titans", "decayed_oja",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOMKIT_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.fixture(autouse=True)
def pieces_of_two_tokens(monkeypatch):
    monkeypatch.setattr(launching, "LENGTHS", (2, 128))


@cache
def example() -> type[Mechanism]:
    """The rule of the example plugin, which need not be installed."""
    spec = spec_from_file_location("example_rule", EXAMPLE)
    module = module_from_spec(spec)
    sys.modules["example_rule"] = module
    spec.loader.exec_module(module)
    return module.DecayedOja


def rule_named(name: str) -> Mechanism:
    if name == "decayed_oja":
        return example()(example().Spec())
    cls = find_mechanism("linear_attention" if name == "normalized" else name)
    return cls(cls.Spec(normalize=True) if name == "normalized" else cls.Spec())


def case_of(rule: Mechanism | str, lengths=(3, 0, 1, 4), sizes=None, **options) -> ScanCase:
    rule = rule_named(rule) if isinstance(rule, str) else rule
    return ScanCase(rule, sizes or SIZES, lengths, options.pop("seed", 3), **{"dtype": torch.float32, **options})


def results(case: ScanCase, dtype: torch.dtype | None, tail: int = 0, asked: str = "") -> dict[str, torch.Tensor]:
    """Output, final states and all gradients: of generated kernels, or, in `dtype`, of the step itself.

    tail: tokens that no segment covers. asked: the only input whose gradient is wanted.
    """
    leaves = {name: x.to(dtype or x.dtype).clone() for name, x in case.inputs.items()}
    state = {f"initial {name}": x.to(dtype or x.dtype).clone() for name, x in case.start().items()}
    every = {**leaves, **state} if case.with_state else leaves
    for name, x in every.items():
        x.requires_grad_(asked in ("", name))
    start = {name: state[f"initial {name}"] for name in case.rule.state_axes()}
    if dtype:
        output, final = step_by_step(case.rule, leaves, case.lengths, start, case.all_sizes, dtype)
    else:
        tokens = case.token_inputs()
        padded = {n: torch.cat([x, x.new_ones(tail, *x.shape[1:])]) if n in tokens else x for n, x in leaves.items()}
        output, final = scan_generated(
            case.rule, padded, case.cu_seqlens, start if case.with_state else None, case.all_sizes
        )
        assert not output[case.num_tokens :].any()
        output = output[: case.num_tokens]
    found = {"output": output, **{f"final {name}": x for name, x in final.items()}}
    wanted = {name: x for name, x in every.items() if x.requires_grad}
    gradients = gradients_of(weighted_sum(found.values(), case.seed), wanted)
    return {**found, **{f"gradient of {name}": x for name, x in gradients.items()}}


def assert_right(case: ScanCase, tail: int = 0, asked: str = "") -> None:
    """As good as the step in the same dtype."""
    truth, eager = (results(case, dtype, asked=asked) for dtype in (torch.float64, torch.float32))
    assert_all_as_good(results(case, None, tail, asked), eager, truth, case.dtype)


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name):
    assert why_not_generated(rule_named(name), torch.device("cpu"), torch.float32, SIZES) is None
    with poisoned_empty():
        assert_right(case_of(name), tail=2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("gates", ["mixed", "constant"])
def test_gates_at_their_ends(name, gates):
    for seed in range(2):
        assert_right(case_of(name, (4,), sizes=SIZES | {"H": 1}, gates=gates, seed=seed))


@pytest.mark.parametrize("name", ["normalized", "rwkv6", "gated_deltanet", "gsa", "mamba"])
def test_tiles_of_columns(name, monkeypatch):
    monkeypatch.setattr(launching, "LEAST_BLOCK", 2)
    case = case_of(name, (3, 0, 2))
    with poisoned_empty():
        assert_right(case, tail=1)
    program = modules.module(module_key(case.rule, case.inputs, SIZES)).PROGRAM
    assert program.column == ("channels" if name == "mamba" else "V")


def test_pieces_of_many_tokens(monkeypatch):
    monkeypatch.setattr(launching, "LENGTHS", (16, 128))
    with poisoned_empty():
        assert_right(case_of("gated_deltanet", (17, 0, 3), sizes=SIZES | {"H": 1}))


def test_programs_that_take_several_segments(monkeypatch):
    monkeypatch.setattr(launching, "MOST_WORKERS", 1)
    assert_right(case_of("gla", (3, 2, 0, 5), sizes=SIZES | {"H": 4, "G": 2}), tail=2)


@pytest.mark.parametrize("name", ["gated_deltanet", "ttt_linear", "gsa", "mamba"])
@pytest.mark.parametrize("size", [1, 4])
def test_sizes_of_one_and_of_powers_of_two(name, size):
    assert_right(case_of(name, (3, 2), sizes=dict.fromkeys(SIZES, size)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits(dtype):
    assert_right(case_of("kda", (5, 0, 2), dtype=dtype))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_without_tokens(lengths):
    assert_right(case_of("mamba", lengths), tail=2)


def test_without_initial_state():
    assert_right(case_of("titans", with_state=False))


@pytest.mark.parametrize("asked", ["q", "g", "initial S"])
def test_one_gradient_alone(asked):
    assert_right(case_of("gated_deltanet"), asked=asked)


def test_a_constant_given_for_each_token():
    case = case_of("retention")
    varied = case.inputs["g"] * torch.rand(case.num_tokens, 1, generator=torch.Generator().manual_seed(0))
    frozen = replace(case)
    frozen.__dict__["inputs"] = case.inputs | {"g": varied}
    assert_right(frozen)


def test_runs_agree_by_every_bit(monkeypatch):
    monkeypatch.setattr(launching, "LEAST_BLOCK", 2)
    once, again = (results(case_of("gla", (3, 2)), None) for _ in range(2))
    for name, x in once.items():
        assert_equal(again[name], x, name)


@pytest.mark.parametrize("name", ["gated_deltanet", "gsa", "mamba", "ttt_linear"])
def test_decoding_in_place(name):
    case = case_of(name, (1, 1, 1))
    pool, index = case.random_state(5, 4), torch.tensor([2, -1, 0])
    before = {state: x.clone() for state, x in pool.items()}
    output = decode_generated(case.rule, case.inputs, pool, index, case.all_sizes)
    start = {state: x[index.clamp_min(0)] for state, x in before.items()}
    expected, final = step_by_step(case.rule, case.inputs, case.lengths, start, case.all_sizes, torch.float64)
    expected[1] = 0
    assert_close(output, expected, "output")
    for state, x in pool.items():
        moved = before[state].double()
        moved[2], moved[0] = final[state][0], final[state][2]
        assert_close(x, moved, state)
        assert_equal(x[[1, 3]], before[state][[1, 3]], f"{state} of others")


def test_ops_keep_pytorchs_rules():
    case = case_of("gated_deltanet", (2,), sizes=SIZES | {"H": 1})
    key = module_key(case.rule, case.inputs, case.sizes)
    inputs = [x.clone().requires_grad_() for x in case.inputs.values()]
    states = [x.clone().requires_grad_() for x in case.start().values()]
    torch.library.opcheck(ops.forward, (key, inputs, states, case.cu_seqlens, 2, True))
    output, final, saved = (x.detach() for x in ops.forward(key, inputs, states, case.cu_seqlens, 2, True))
    plain = [x.detach() for x in inputs]
    asked = [True] * len(inputs)
    torch.library.opcheck(ops.backward, (key, plain, [saved], case.cu_seqlens, output, [final], asked, True))
    rows = [x[:2] for x in plain]
    torch.library.opcheck(ops.decode, (key, rows, [torch.randn(4, *final.shape[1:])], torch.tensor([2, -1]), 2))


@pytest.mark.parametrize("name", ["gla", "titans"])
def test_compiled_whole(name):
    case = case_of(name, (3, 0, 2))

    def run(inputs, cu_seqlens, state):
        output, final = scan_generated(case.rule, inputs, cu_seqlens, state, case.sizes)
        total = output.square().sum() + sum(x.square().sum() for x in final.values())
        return output, total

    found = []
    for door in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
        output, total = door(inputs, case.cu_seqlens, case.start())
        found.append([output, *torch.autograd.grad(total, list(inputs.values()))])
    for eager, compiled in zip(*found, strict=True):
        assert_equal(compiled, eager, name)


def test_a_compiler_tells_rules_apart_by_their_settings():
    case, counter = case_of("gla", (2,)), CompileCounterWithBackend("eager")
    spec = type(case.rule.spec)

    def run(rule, inputs, cu_seqlens):
        return scan_generated(rule, inputs, cu_seqlens, None, case.sizes)[0]

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    specs = spec(scale=1.0), spec(scale=0.5)
    rules = [type(case.rule)(specs[n]) for n in (0, 1, 0)]
    one, half, again = (compiled(rule, case.inputs, case.cu_seqlens) for rule in rules)
    assert_equal(one, 2 * half, "output")
    assert_equal(one, again, "output")
    assert counter.frame_count == 2


FAULTS = [
    ("gated_deltanet", "beta * ", "1.0 * "),  # the step's own arithmetic
    ("gated_deltanet", "+ i // LENGTH", "+ 0"),  # where states are saved
    ("gated_deltanet", "first + length - 1 - i", "first + i"),  # which token a gradient belongs to
    ("gated_deltanet", "length - 2 - i", "length - 1 - i"),  # the state before a token
    ("gated_deltanet", "tl.minimum(begin + i + 1, end - 1)", "begin"),  # the token loaded ahead
    ("gated_deltanet", "at_H // 2", "at_H % 1"),  # the keys of a head
    ("gated_deltanet", "if d_S_end is not None", "if d_S_end is None"),  # the gradient of final states
    ("gated_deltanet", "at_V, 0.0", "at_V, 1.0"),  # tokens that no segment covers
    ("ttt_linear", "(tl.arange(0, 4) < 3)", "(tl.arange(0, 4) < 4)"),  # what lies past the last column
    ("ttt_linear", "sum_ln_w += d_ln_w", "sum_ln_w = d_ln_w"),  # gradients of constants
]


@pytest.mark.parametrize("name, right, wrong", FAULTS, ids=[f"{name}: {right}" for name, right, _ in FAULTS])
def test_faults_are_caught(name, right, wrong, monkeypatch):
    case = case_of(name, (4, 2), sizes=SIZES | {"H": 4, "G": 2})
    source = kernel_source(case.rule, case.sizes)
    assert right in source
    monkeypatch.setattr(generated_scan, "module_key", lambda *_: modules.keep("faulty", source.replace(right, wrong)))
    with pytest.raises((AssertionError, IndexError)), poisoned_empty():
        assert_right(case, tail=2)


class RecipeSpec(HeadSpec):
    kind: Literal["recipe"] = "recipe"
    recipe: tuple[tuple[int, int, int], ...] = ()


def squashed(x):
    return x / (1 + x.abs())


BY_ELEMENT = [
    torch.tanh,
    torch.sigmoid,
    torch.nn.functional.silu,
    torch.nn.functional.softplus,
    torch.nn.functional.logsigmoid,
    torch.nn.functional.gelu,
    torch.nn.functional.elu,
    torch.relu,
    torch.sin,
    lambda x: torch.exp(-x.abs()),
    lambda x: torch.log1p(x.square()),
    lambda x: torch.log(1 + x**2),
    lambda x: torch.expm1(-x.abs()),
    lambda x: (x.square() + 0.1).sqrt(),
    lambda x: (x**2 + 0.5).rsqrt(),
    lambda x: 1 / (1 + x**4),
    lambda x: (x**2 + 1) ** -0.7,
    lambda x: x.clamp(-0.5, 0.7),
    lambda x: x.clamp_min(0.1),
    lambda x: x.masked_fill(x > 0.2, 0.3),
    lambda x: torch.where((x > 0) & (x < 1), x, -x),
    lambda x: x.sign() * (x - 0.1),
    lambda x: 1 - 2 * x,
]
OVER_AN_AXIS = [
    lambda x: x.softmax(-1),
    lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    lambda x: torch.nn.functional.normalize(x, dim=-1),
    lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(),
    lambda x: x - x.amax(-1, keepdim=True),
    lambda x: x / (1 + x.abs().sum(-1, keepdim=True)),
    lambda x: x - x.logsumexp(-1, keepdim=True),
    lambda x: x + x.var(-1, unbiased=False, keepdim=True),
]
OF_TWO = [
    torch.add,
    torch.sub,
    lambda a, b: squashed(a * b),
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(a > b, a, 0.5 * b),
    lambda a, b: a / (1 + b.square()),
    lambda a, b: a * (a * b).sum(-1, keepdim=True).tanh(),
    lambda a, b: torch.einsum("...i,...i->...", a, b)[..., None] * 0.3 + a,
    lambda a, b: torch.lerp(a, b, 0.25),
]
OF_MATRIX = [
    lambda S, k, v: (S, k, squashed(read(S, k))),
    lambda S, k, v: (S, squashed(torch.einsum("...kv,...v->...k", S, v)), v),
    lambda S, k, v: (S, squashed(read(S.mT, v)), v),
    lambda S, k, v: (S, k, v + S.mean(-2)),
    lambda S, k, v: (S, k + S.amax(-1), v),
    lambda S, k, v: (squashed(S + outer(k, v)), k, v),
    lambda S, k, v: (S * k.sigmoid()[..., None], k, v),
    lambda S, k, v: (S * v.tanh().unsqueeze(-2), k, v),
    lambda S, k, v: (squashed(S) - 0.1 * outer(v, k).mT, k, v),
    lambda S, k, v: (S, k, v * torch.einsum("...kv,...k,...v->...", S, k, v).tanh()[..., None]),
    lambda S, k, v: (torch.tanh(S), k, v),
    lambda S, k, v: (S.softmax(-2), k, v),
]


class Recipe(Mechanism):
    """A step made of random operations: each line of the recipe is a kind, an operation, and what it is done to."""

    Spec = RecipeSpec

    def state_axes(self):
        return {"S": "H K V", "z": "H K"}

    def inputs_domain(self):
        domain = {"k": Domain("T G K"), "v": Domain("T H V"), "g": Domain("T H", high=0.0), "c": Domain("H K")}
        return domain | {"w": Domain("H V"), "s": Domain("T H")}

    def step(self, state, inputs):
        S, z = take(state, "S z")
        k, v, g, c, w, s = take(inputs, "k v g c w s")
        keys, values, M = [k, c, z], [v, w, v * s[..., None]], S
        for kind, which, at in self.spec.recipe:
            pool = (keys, values)[at % 2]
            x, y = pool[-1 - at // 2 % len(pool)], pool[-1 - at // 4 % len(pool)]
            if kind == 0:
                pool.append(BY_ELEMENT[which % len(BY_ELEMENT)](x))
            elif kind == 1:
                pool.append(OVER_AN_AXIS[which % len(OVER_AN_AXIS)](x))
            elif kind == 2:
                pool.append(OF_TWO[which % len(OF_TWO)](x, y))
            else:
                M, more_k, more_v = OF_MATRIX[which % len(OF_MATRIX)](M, keys[-1], values[-1])
                keys.append(more_k)
                values.append(more_v)
        decay = g.exp()[..., None]
        S = decay[..., None] * S + squashed(M) + outer(keys[-1].tanh(), squashed(values[-1]))
        z = decay * z + squashed(keys[-1] + keys[-2])
        return {"S": S, "z": z}, squashed(values[-1]) + read(squashed(S), keys[0]) + (z * keys[-1]).sum(
            -1, keepdim=True
        ).tanh()


LINES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 22), st.integers(0, 15)), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(LINES, st.sampled_from([(2, 3), (3, 5), (4, 4), (1, 3), (3, 1)]), st.sampled_from([(2, 1), (1, 1)]))
def test_random_steps(lines, shape, heads):
    rule = Recipe(RecipeSpec(recipe=tuple(lines)))
    sizes = {"K": shape[0], "V": shape[1], "H": heads[0], "G": heads[1]}
    assert_right(case_of(rule, (2, 1), sizes))


class OddNames(Mechanism):
    """Linear attention whose names are those that generated source has too."""

    Spec = RecipeSpec

    def state_axes(self):
        return {"tile": "H K V"}

    def inputs_domain(self):
        return {
            "tile": Domain("T G K"),
            "lambda": Domain("T G K"),
            "v": Domain("T H V"),
            "x1": Domain("H"),
            "d_v": Domain("T H"),
        }

    def step(self, state, inputs):
        q, k, v, scale, shift = take(inputs, "tile lambda v x1 d_v")
        S = state["tile"] + outer(k, v)
        return {"tile": S}, scale[..., None] * read(S, q) + shift[..., None]


def test_names_that_the_source_has_too():
    assert_right(case_of(OddNames(RecipeSpec()), (2, 1)))


# steps that no kernel can be generated for, and what the refusal says
STEPS = {
    "cumsum": (lambda S, k, v: S + outer(k.cumsum(-1), v), r"cumsum.*state that sums over tokens"),
    "sort": (lambda S, k, v: S + outer(k.sort(-1)[0], v), "sort"),
    "slice": (lambda S, k, v: S + outer(k, torch.cat([v[..., 1:], v[..., :1]], -1)), "slice|cat"),
    "value": (lambda S, k, v: S + outer(k, v) if k.sum() > 0 else S, "can't be traced"),
}


@pytest.mark.parametrize("name", STEPS)
def test_refusals_name_operation_and_line(name):
    class Refused(Mechanism):
        Spec = RecipeSpec

        def inputs_domain(self):
            return {"q": Domain("T G K"), "k": Domain("T G K"), "v": Domain("T H V")}

        def step(self, state, inputs):
            q, k, v = take(inputs, "q k v")
            S = STEPS[name][0](state["S"], k, v)
            return {"S": S}, read(S, q)

    reason = why_not_generated(Refused(RecipeSpec()), torch.device("cpu"), torch.float32, SIZES)
    assert reason is not None
    assert re.search(STEPS[name][1], reason), reason
    if name != "value":
        assert f"{Path(__file__).name}:" in reason, reason
