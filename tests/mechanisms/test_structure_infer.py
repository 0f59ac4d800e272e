"""Rules that say `structure = "infer"`: what they get, when it is looked for, and what is refused."""

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from momkit import MoMSpec, scan
from momkit.errors import InputError
from momkit.mechanisms import structure_infer
from momkit.mechanisms.base import Affine, Domain, Mechanism, Projection, Structure, outer, read, take
from momkit.mechanisms.gla import GLASpec
from momkit.registry import find_mechanism, registry, temporarily
from momkit.scan import choose_backend
from momkit.testing.tolerances import assert_as_good

SIZES = {"T": 40, "H": 4, "G": 2, "K": 5, "V": 3, "R": 2}


class Inferring(Mechanism):
    """A rule of one matrix state that leaves its structure to its step."""

    Spec = GLASpec
    structure = "infer"
    gates: ClassVar = {"g": "T H"}

    def inputs_domain(self):
        axes = {"q": "T G K", "k": "T G K", "v": "T H V", **self.gates}
        return {name: Domain(a, high=0.0 if name == "g" else torch.inf) for name, a in axes.items()}

    def step(self, state, inputs):
        q, k, v, g = take(inputs, "q k v g")
        S = g.exp()[..., None, None] * state["S"] + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)


@pytest.fixture
def nothing_found(monkeypatch):
    monkeypatch.setattr(structure_infer, "found", {})


def inputs_of(rule: Mechanism) -> dict[str, torch.Tensor]:
    return rule.sample(torch.Generator().manual_seed(0), SIZES)


def test_it_gets_the_chunked_form():
    rule = Inferring(GLASpec())
    assert rule.structures() == (Structure("head"),)
    assert choose_backend(rule, device=torch.device("cpu")).backend == "chunked"
    inputs, cu_seqlens = inputs_of(rule), torch.tensor([0, 33, 33, 40])
    truth, eager = (
        scan(rule, {n: x.to(dtype) for n, x in inputs.items()}, cu_seqlens, backend="reference")
        for dtype in (torch.float64, torch.float32)
    )
    chunked = scan(rule, {n: x.float() for n, x in inputs.items()}, cu_seqlens, backend="chunked")
    assert_as_good(chunked.output, eager.output, truth.output, "output")
    assert_as_good(chunked.final_state["S"], eager.final_state["S"], truth.final_state["S"], "S")


@pytest.mark.parametrize("name", [n for n in sorted(registry().classes["mechanism"]) if find_mechanism(n).structure])
def test_what_built_in_rules_declare_could_be_left_out(name):
    cls = find_mechanism(name)
    again = type(cls.__name__, (cls,), {"structure": "infer", "compose": Mechanism.compose})
    assert again(cls.Spec()).structures() == (cls.structure,)


def test_it_is_looked_for_once_a_class_and_spec(nothing_found, monkeypatch):
    looked = []
    monkeypatch.setattr(
        structure_infer, "look", lambda rule, look=structure_infer.look: looked.append(rule) or look(rule)
    )
    for spec in (GLASpec(), GLASpec(), GLASpec(scale=2.0), GLASpec(scale=2.0)):
        Inferring(spec).structures()
    assert [rule.spec.scale for rule in looked] == [None, 2.0]


class InferringBlock(Inferring):
    """The same, for a block."""

    class Spec(GLASpec):
        kind: str = "inferring_block"

    def projections(self):
        H, K, V = (self.sizes[a] for a in "HKV")
        return (Projection("q", (H, K)), Projection("k", (H, K)), Projection("v", (H, V)))

    def prepare(self, projected):
        return projected | {"g": -projected["v"].mean(-1).abs()}


def test_a_block_takes_it():
    with temporarily(InferringBlock):
        block = MoMSpec(hidden_size=8, mechanism="inferring_block").build()
        assert block.backend_report()["scan"].backend == "chunked"
        assert block(torch.randn(2, 5, 8)).hidden_states.isfinite().all()


def test_what_the_caller_is_in_does_not_matter(nothing_found):
    rule = Inferring(GLASpec())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), FakeTensorMode():
        assert rule.structures() == (Structure("head"),)
    assert len(structure_infer.found) == 1


def test_to_a_compiler_it_is_a_constant(nothing_found):
    rule = Inferring(GLASpec())

    def double_if_affine(x):
        return 2 * x if rule.structures()[0].decay == "head" and rule.has_chunked_form else x

    compiled = torch.compile(double_if_affine, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2


def test_nothing_is_traced_at_import():
    code = (
        "import sys, momkit\nfrom momkit.registry import registry\nregistry()\n"
        "print([m for m in sys.modules if m.endswith(('structure_infer', 'mechanisms.trace', 'generated.traced'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


class Saturating(Inferring):
    def step(self, state, inputs):
        S = (state["S"] + outer(inputs["k"], inputs["v"])).tanh()
        return {"S": S}, read(S, inputs["q"])


class AlongValue(Inferring):
    def step(self, state, inputs):
        q, k, v = take(inputs, "q k v")
        S = state["S"] - outer(read(state["S"].mT, v), v) + outer(k, v)
        return {"S": S}, read(S, q)


class Untraceable(Inferring):
    def step(self, state, inputs):
        q, k, v = take(inputs, "q k v")
        S = state["S"] + outer(k.cumsum(-1), v)
        return {"S": S}, read(S, q)


class Unscaled(Inferring):
    def step(self, state, inputs):
        new, output = super().step(state, inputs)
        return new, 3 * output


class Nameless(Inferring):
    gates: ClassVar = {"decay": "T H"}

    def step(self, state, inputs):
        return super().step(state, inputs | {"g": -inputs["decay"].square()})


class Forgetful(Nameless):
    def lower(self, inputs):
        return Affine(*take(inputs, "q k v"), g=inputs["g"])


class WithAnotherAxis(Inferring):
    gates: ClassVar = {"mix": "T H R"}

    class Spec(GLASpec):
        def sizes(self, hidden_size):
            return super().sizes(hidden_size) | {"R": 2}

    def step(self, state, inputs):
        q, k, v, mix = take(inputs, "q k v mix")
        S = state["S"] * mix.sum(-1)[..., None, None] + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)


REFUSED = {
    Saturating: "structure = 'infer', but the step is not affine in its states; allowed: the Structure it has, or None",
    AlongValue: "affine in its states, but of no family: one state S",
    Untraceable: "of unknown form .*cumsum",
    Unscaled: r"the step is affine in its states, Structure\(decay='head'\), but .* is not what the step does",
    Nameless: "calls for 'g', and lower.inputs. left it out; allowed: a lower.inputs. that gives its terms",
    Forgetful: "asks for an input 'g'",
    WithAnotherAxis: "of no family",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_what_can_not_be_is_refused(cls):
    rule = cls(cls.Spec())
    with pytest.raises(InputError, match=REFUSED[cls]):
        rule.structures()
    with pytest.raises(InputError, match="gla: structure = 'infer'"):
        scan(rule, inputs_of(rule))
    assert scan(rule, inputs_of(rule), backend="reference").output.isfinite().all()


class Lowered(Nameless):
    def lower(self, inputs):
        q, k, v, decay = take(inputs, "q k v decay")
        return Affine(q, k, v, g=-decay.square(), scale=self.scale_for(q))


def test_a_lower_of_its_own_gives_the_terms():
    assert Lowered(GLASpec()).structures() == (Structure("head"),)


def test_another_word_is_refused():
    with pytest.raises(InputError, match="Misspelt: structure = 'inferred'; allowed: a Structure, 'infer' or None"):
        type("Misspelt", (Inferring,), {"structure": "inferred"})
