"""What is found by looking into a step: the structure of a rule, what may be split, and what its kernels say."""

import pytest
import torch

from momkit.errors import BackendError
from momkit.mechanisms.base import Domain, Mechanism, Structure, outer, read, take
from momkit.mechanisms.gated_deltanet import GatedDeltaNet
from momkit.mechanisms.generated_scan import kernel_source
from momkit.mechanisms.gla import GLASpec
from momkit.mechanisms.step_program import check_split, generate, plain_program
from momkit.mechanisms.trace import infer_structure
from momkit.registry import find_mechanism, registry

SIZES = {"H": 2, "G": 1, "K": 3, "V": 5, "slots": 3, "channels": 4, "N": 2}


def made(step, **domain: str) -> Mechanism:
    """A rule of one matrix state with this step: S, inputs -> S, output. Inputs are q, k, v and those given by axes."""

    class Made(Mechanism):
        Spec = GLASpec

        def inputs_domain(self):
            axes = {"q": "T G K", "k": "T G K", "v": "T H V", **domain}
            gates = {name for name in axes if name.startswith("g")}
            return {name: Domain(a, high=0.0 if name in gates else torch.inf) for name, a in axes.items()}

        def step(self, state, inputs):
            S, output = step(state["S"], *take(inputs, " ".join(self.inputs_domain())))
            return {"S": S}, output

    return Made(GLASpec())


@pytest.mark.parametrize("name", sorted(registry().classes["mechanism"]))
def test_declared_structures_are_found(name):
    cls = find_mechanism(name)
    rule = cls(cls.Spec())
    assert infer_structure(rule) == rule.structure


def decayed(g, S, q, k, v):
    S = S * g + outer(k, v)
    return S, read(S, q)


def delta(S, decay, seen, q, k, v, beta):
    S = S * decay + outer(k, beta[..., None] * (v - read(seen, k)))
    return S, read(S, q)


FOUND = {
    "value": (
        lambda S, q, k, v, gv: decayed(gv.exp().unsqueeze(-2), S, q, k, v),
        {"gv": "T H V"},
        Structure("value"),
    ),
    "constant by key": (
        lambda S, q, k, v, gk: decayed(gk.exp()[..., None], S, q, k, v),
        {"gk": "H K"},
        Structure("key"),
    ),
    "number": (lambda S, q, k, v: decayed(0.9, S, q, k, v), {}, Structure("constant")),
    "delta that sees the previous state": (
        lambda S, q, k, v, g, beta: delta(S, g.exp()[..., None, None], S, q, k, v, beta),
        {"g": "T H", "beta": "T H"},
        Structure("head", "delta", "previous"),
    ),
    "keys of any length": (
        lambda S, q, k, v, beta: delta(S, 1.0, S, q, k, v, beta),
        {"beta": "T H"},
        Structure("none", "delta"),
    ),
    "read before": (
        lambda S, q, k, v: (S * 0.5 + outer(k, v), read(S, q)),
        {},
        Structure("constant", read="before"),
    ),
    "low rank of the decayed state": (
        lambda S, q, k, v, gk, a, b: low_rank(S * gk.exp()[..., None], q, k, v, a, b),
        {"gk": "T G K", "a": "T G K", "b": "T G K"},
        Structure("key", "low_rank", "decayed"),
    ),
}


def low_rank(S, q, k, v, a, b):
    S = S + outer(b, read(S, a)) + outer(k, v)
    return S, read(S, q)


@pytest.mark.parametrize("name", FOUND)
def test_structures_are_found_without_being_declared(name):
    step, domain, structure = FOUND[name]
    assert infer_structure(made(step, **domain)) == structure


NONE = {
    "not affine": lambda S, q, k, v: (S + outer(k, v.tanh() * read(S, k).tanh()), read(S, q)),
    "nearly affine": lambda S, q, k, v: (S + 1e-12 * S.square() + outer(k, v), read(S, q)),
    "erases along the value": lambda S, q, k, v: (S - outer(read(S.mT, v), v) + outer(k, v), read(S, q)),
    "erases twice": lambda S, q, k, v: (S - outer(k, read(S, k)) - outer(q, read(S, q)) + outer(k, v), read(S, q)),
    "writes twice": lambda S, q, k, v: (S + outer(k, v) + outer(q, v.square()), read(S, q)),
    "reads a square": lambda S, q, k, v: (S + outer(k, v), read(S, q).square()),
    "mixes heads": lambda S, q, k, v: (S + outer(k, v) + S.mean(-3, keepdim=True), read(S, q)),
    "can't be lowered": lambda S, q, k, v: (S + outer(k.cumsum(-1), v), read(S, q)),
}


@pytest.mark.parametrize("name", NONE)
def test_other_steps_have_no_structure(name):
    assert infer_structure(made(NONE[name])) is None


def program_of(rule: Mechanism) -> str:
    return next(line for line in kernel_source(rule, SIZES).splitlines() if line.startswith("PROGRAM"))


@pytest.mark.parametrize(
    "name, head, column",
    [("gla", "H", "V"), ("gsa", "H", "V"), ("titans", "H", "V"), ("mamba", "", "channels"), ("ttt_linear", "H", "")],
)
def test_what_is_split(name, head, column):
    cls = find_mechanism(name)
    assert f"head={head!r}, column={column!r})" in program_of(cls(cls.Spec()))


def test_what_mixes_is_not_split():
    heads = made(lambda S, q, k, v: (S + outer(k, v) + S.mean(-3, keepdim=True), read(S, q)))
    assert "head='', column='V')" in program_of(heads)
    columns = made(lambda S, q, k, v: (S + outer(k, v.softmax(-1)), read(S, q)))
    assert "head='H', column='')" in program_of(columns)


def test_a_split_is_checked_by_example():
    rule = made(lambda S, q, k, v: (S + outer(k, v.softmax(-1)), read(S, q)))
    program = plain_program(rule, SIZES)
    check_split(rule, program, "H")
    with pytest.raises(BackendError, match=r"S mixes elements along V"):
        check_split(rule, program, "V")


def test_source_is_what_it_was():
    rule = GatedDeltaNet(GatedDeltaNet.Spec())
    assert generate(rule, SIZES) == kernel_source(rule, SIZES)
    assert kernel_source(rule, SIZES | {"T": 7}) == kernel_source(rule, SIZES)
    compile(kernel_source(rule, SIZES), "generated", "exec")
