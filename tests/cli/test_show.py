"""`momkit show` of a rule: the kernel that its step makes, and what its step says about its structure."""

import json
from dataclasses import asdict

import pytest

from momkit.mechanisms.base import Domain, Mechanism, Structure, outer, read, take
from momkit.mechanisms.generated_scan import kernel_source
from momkit.mechanisms.gla import GLA, GLASpec
from momkit.registry import temporarily


def made(step, declared: Structure | str | None = None, **domain: str) -> type[Mechanism]:
    """A rule named `made` of one matrix state with this step: S, inputs -> S, output."""

    class MadeSpec(GLASpec):
        kind: str = "made"

    class Made(Mechanism):
        Spec = MadeSpec
        structure = declared

        def inputs_domain(self):
            axes = {"q": "T G K", "k": "T G K", "v": "T H V", **domain}
            return {name: Domain(a, high=0.0 if name == "g" else float("inf")) for name, a in axes.items()}

        def step(self, state, inputs):
            S, output = step(state["S"], *take(inputs, " ".join(self.inputs_domain())))
            return {"S": S}, self.scale_for(inputs["q"]) * output

    return Made


def decayed(S, q, k, v, g):
    S = g.exp()[..., None, None] * S + outer(k, v)
    return S, read(S, q)


def saturated(S, q, k, v):
    S = (S + outer(k, v)).tanh()
    return S, read(S, q)


def summed(S, q, k, v):
    S = S + outer(k.cumsum(-1), v)
    return S, read(S, q)


def fading(S, q, k, v):
    S = 0.9 * S + outer(k, v)
    return S, read(S, q)


def along_value(S, q, k, v):
    S = S - outer(read(S.mT, v), v) + outer(k, v)
    return S, read(S, q)


def shown(momkit, rule: type[Mechanism]):
    with temporarily(rule):
        result, text = momkit("show", rule.name, "--json"), momkit("show", rule.name)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["step"]["verdict"] in text.stdout
    return document


def test_kernel_is_printed(momkit):
    source = kernel_source(GLA(GLASpec()), GLASpec().sizes(256))
    assert momkit("show", "gla", "--kernel").stdout == source
    assert json.loads(momkit("show", "gla", "--kernel", "--json").stdout) == {"kernel": source}
    compile(source, "generated", "exec")


def test_kernel_of_a_spec_file_has_its_sizes(momkit, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text("{hidden_size: 48, mechanism: {kind: gla, head_dim: 16, head_v_dim: 4}}")
    assert momkit("show", path, "--kernel").stdout == kernel_source(GLA(GLASpec()), {"G": 3, "H": 3, "K": 16, "V": 4})


@pytest.mark.parametrize("as_json", [False, True])
def test_a_step_without_kernel_is_refused(momkit, as_json):
    with temporarily(made(summed)):
        result = momkit("show", "made", "--kernel", *(["--json"] if as_json else []))
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for part in ("made: ", "cumsum", "test_show.py:", "outer(k.cumsum(-1), v)"):
        assert part in result.stderr


def test_only_rules_have_kernels(momkit):
    result = momkit("show", "dense", "--kernel")
    assert result.exit_code == 2 and "'dense' is a router" in result.stderr


def test_declared_and_found(momkit):
    document = json.loads(momkit("show", "gated_deltanet", "--json").stdout)
    structure = asdict(Structure("head", "delta"))
    assert document["structure"] == document["step"]["structure"] == structure
    assert document["step"]["affine"] and document["step"]["family"] == "delta"
    assert document["step"]["verdict"].endswith("declared, and found in its step; the delta kernels serve it")


def test_what_a_rule_could_gain(momkit):
    document = shown(momkit, made(decayed, g="T H"))
    assert document["structure"] is None and document["backend"]["backend"] == "reference"
    step = document["step"]
    assert (step["affine"], step["structure"], step["family"]) == (True, asdict(Structure("head")), "scalar")
    assert "Structure(decay='head'), not declared; structure = \"infer\"" in step["verdict"]
    assert "scalar kernels serve it" in step["verdict"]


def test_inferred(momkit):
    document = shown(momkit, made(decayed, "infer", g="T H"))
    assert document["structure"] == document["step"]["structure"] == asdict(Structure("head"))
    assert document["backend"]["backend"] == "chunked"
    assert "Structure(decay='head'), found in its step; the scalar" in document["step"]["verdict"]


def test_a_wrong_declaration_is_told(momkit):
    document = shown(momkit, made(decayed, Structure("none"), g="T H"))
    assert "Structure(decay='head'); yet the rule declares Structure(decay='none'" in document["step"]["verdict"]


VERDICTS = {
    "not affine in its states; the step itself runs": saturated,
    "affine in its states, but of no family": along_value,
    "gives its terms, the scalar kernels serve it: the rule's structure calls for 'g'": fading,
    "of unknown form": summed,
}


@pytest.mark.parametrize("words", VERDICTS)
def test_verdicts(momkit, words):
    document = shown(momkit, made(VERDICTS[words]))
    assert words in document["step"]["verdict"]


@pytest.mark.parametrize("name, words", [("gsa", "composes it of 2 affine scans"), ("mamba", "a kernel of its own")])
def test_rules_with_more_than_a_structure(momkit, name, words):
    assert words in json.loads(momkit("show", name, "--json").stdout)["step"]["verdict"]


def test_a_failed_inference_is_a_users_fault(momkit):
    with temporarily(made(saturated, "infer")):
        result = momkit("show", "made")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert "made: structure = 'infer', but the step is not affine" in result.stderr
