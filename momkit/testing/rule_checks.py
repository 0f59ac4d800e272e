"""Checks of a rule by itself: its spec, its docstring, what it declares, prepares and freezes."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Domain, Inputs
from momkit.testing.drawing import Draw, applies_if, drawn
from momkit.testing.oracle import affine_steps, is_token_input, step_by_step, wide_heads
from momkit.testing.spec_assertions import assert_documented, assert_round_trips
from momkit.testing.strategies import ScanCase, scan_cases, seeds
from momkit.testing.subjects import RuleSubject, registered
from momkit.testing.tolerances import assert_close, assert_equal


# a spec is the same after a trip through JSON or YAML, alone or inside a block's, and takes no unknown field
def check_spec_round_trips(subject: RuleSubject) -> None:
    with registered(subject.cls):
        for spec in (subject.spec, subject.small_spec()):
            assert_round_trips(spec, {"mechanism": spec})


# the docstring has three paragraphs: one sentence, the equation, the paper
def check_documented(subject: RuleSubject) -> None:
    assert_documented(subject.cls)


# the rule's name, states, sizes and output agree with each other, in a module as in its inputs
def check_declares_itself(subject: RuleSubject) -> None:
    domain = subject.rule.inputs_domain()
    assert subject.spec.kind == subject.cls.name, f"{subject.name}: kind = {subject.spec.kind!r}"
    assert subject.rule.value_input in domain, f"{subject.name}: value_input = {subject.rule.value_input!r}"
    module = subject.module(seed=0)
    needed = subject.axes() | set(module.output_axes.split())
    assert needed <= set(module.sizes), f"{subject.name}: spec.sizes lacks {sorted(needed - set(module.sizes))}"
    state = module.initial_state(3)
    assert list(state) == list(module.state_axes()), f"{subject.name}: initial_state has {list(state)}"
    for name, shape in module.state_spec().items():
        assert state[name].shape == (3, *shape), (
            f"{subject.name}: initial_state[{name!r}] is {tuple(state[name].shape)}"
        )
        assert state[name].dtype == torch.float32, f"{subject.name}: initial_state[{name!r}] is {state[name].dtype}"
    assert all(
        t.dtype == torch.float64 for t in module.double().initial_state(1).values() if len(list(module.parameters()))
    )


def assert_in_domain(name: str, x: Tensor, domain: Domain, slack: float) -> None:
    assert not x.isnan().any(), f"{name} holds NaN"
    if x.numel() == 0:
        return
    assert float(x.min()) >= domain.low - slack, f"{name} is {float(x.min())}, below {domain.low}"
    assert float(x.max()) <= domain.high + slack, f"{name} is {float(x.max())}, above {domain.high}"
    if domain.unit_norm:
        norm = x.double().norm(dim=-1)
        assert float(norm.max()) <= 1 + 1e-4 + slack, f"{name} has norm {float(norm.max())}, its domain says 1"


# what `sample` draws is legal, and a state fed with it stays bounded
@drawn()
def check_sample_is_legal(subject: RuleSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_segments=1, with_state=False), "case")
    for name, domain in subject.rule.inputs_domain().items():
        x = case.inputs[name]
        assert x.shape == tuple(case.all_sizes[axis] for axis in domain.axes.split()), f"{name} is {tuple(x.shape)}"
        assert_in_domain(name, x, domain, slack=1e-9)
    output, state = step_by_step(case.rule, case.inputs, case.lengths, case.start(), case.all_sizes, torch.float64)
    for name, tensor in {"output": output, **state}.items():
        size = float(tensor.abs().max()) if tensor.numel() else 0.0
        assert size < 1e4, f"{name} grows to {size:.3g} within {case.num_tokens} sampled tokens"


# `prepare` makes what `inputs_domain` declares, gates in fp32 or better, and leaves its argument alone
@drawn()
def check_prepare_matches_domain(subject: RuleSubject, draw: Draw) -> None:
    num_tokens = draw(st.sampled_from((5, 1, 0)), "num_tokens")
    dtype = draw(st.sampled_from((torch.float32, torch.float64)), "dtype")
    seed = draw(seeds, "seed")
    num_layers = draw(st.sampled_from((1, 3)), "num_layers")
    size = draw(st.sampled_from((1.0, 30.0)), "size of the projections")
    module = subject.module(seed, num_layers=num_layers).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    projected: Inputs = {}
    for p in module.projections():
        x = torch.randn(num_tokens, *p.shape, generator=generator, dtype=dtype) * size
        activate = {"none": lambda x: x, "silu": torch.nn.functional.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
        x = activate[p.activation](x)
        projected[p.name] = torch.nn.functional.normalize(x, dim=-1) if p.l2 else x
    before = {name: tensor.clone() for name, tensor in projected.items()}
    inputs = module.prepare(projected)
    assert list(projected) == list(before), f"{subject.name}: prepare changes the names of what it is given"
    for name, tensor in before.items():
        assert_equal(projected[name], tensor, f"{subject.name}: prepare changes {name}")
    domain = module.inputs_domain()
    assert set(inputs) == set(domain), (
        f"{subject.name}: prepare returns {sorted(inputs)}, the domain is {sorted(domain)}"
    )
    sizes = module.sizes | {"T": num_tokens}
    for name, entry in domain.items():
        x = inputs[name]
        axes = entry.axes.split()
        if is_token_input(entry.axes, x) and axes[0] != "T":
            axes = ["T", *axes]
        assert x.shape == tuple(sizes[axis] for axis in axes), f"{subject.name}: prepare's {name} is {tuple(x.shape)}"
        assert_in_domain(name, x.detach(), entry, slack=1e-5)
        if entry.is_gate:
            assert x.dtype == dtype, f"{subject.name}: the gate {name} is {x.dtype} in a {dtype} module"
    half = subject.module(seed, num_layers=num_layers).bfloat16().prepare({n: x.bfloat16() for n, x in before.items()})
    for name, entry in domain.items():
        if entry.is_gate:
            assert half[name].dtype == torch.float32, f"{subject.name}: the gate {name} is {half[name].dtype} in bf16"


# `finish` keeps the shape of the output, and is a function of each slot alone
@drawn(0.3)
def check_finish_keeps_shape(subject: RuleSubject, draw: Draw) -> None:
    module = subject.module(draw(seeds, "seed")).double()
    projected = {p.name: torch.rand(4, *p.shape, dtype=torch.float64) for p in module.projections()}
    inputs = module.prepare(projected)
    output = torch.randn(4, *(module.sizes[a] for a in module.output_axes.split()), dtype=torch.float64)
    finished = module.finish(output, inputs, projected)
    assert finished.shape == output.shape, f"{subject.name}: finish returns {tuple(finished.shape)}"
    assert finished.dtype == output.dtype, f"{subject.name}: finish returns {finished.dtype}"


def frozen_case(subject: RuleSubject, draw: Draw) -> tuple[ScanCase, Tensor]:
    case = draw(scan_cases(subject, gates=("mixed", "sampled"), max_tokens=16, max_segments=1), "case")
    generator = torch.Generator().manual_seed(case.seed)
    return case, torch.rand(case.num_tokens, generator=generator) < 0.5


# a frozen token leaves the state bitwise as it was, whatever its gates, and its inputs are not changed in place
@drawn()
def check_freeze_keeps_state(subject: RuleSubject, draw: Draw) -> None:
    case, where = frozen_case(subject, draw)
    before = {name: tensor.clone() for name, tensor in case.inputs.items()}
    frozen = subject.rule.freeze(case.inputs, where)
    for name, tensor in before.items():
        assert_equal(case.inputs[name], tensor, f"{subject.name}: freeze changes {name} in place")
    assert set(frozen) == set(before), f"{subject.name}: freeze returns {sorted(frozen)}"
    domain = subject.rule.inputs_domain()
    wide = {name: wide_heads(domain[name].axes, x, case.all_sizes) for name, x in frozen.items()}
    state = {name: tensor[0] for name, tensor in case.start().items()}
    for t in range(case.num_tokens):
        inputs = {name: x[t] if is_token_input(domain[name].axes, frozen[name]) else x for name, x in wide.items()}
        new, output = subject.rule.step(state, inputs)
        assert output.isfinite().all(), f"{subject.name}: token {t} reads {output}"
        if where[t]:
            for name, tensor in new.items():
                assert_equal(tensor, state[name], f"{subject.name}: frozen token {t} changes {name}")
        state = new


# freezing touches only the tokens it is told, and a frozen token still reads the state
@drawn()
def check_freeze_still_reads(subject: RuleSubject, draw: Draw) -> None:
    case, where = frozen_case(subject, draw)
    frozen = subject.rule.freeze(case.inputs, where)
    untouched = subject.rule.freeze(case.inputs, torch.zeros_like(where))
    state, sizes = case.random_state(case.seed + 1, 1), case.all_sizes
    plain, _ = step_by_step(case.rule, case.inputs, case.lengths, state, sizes, torch.float64)
    same, _ = step_by_step(case.rule, untouched, case.lengths, state, sizes, torch.float64)
    assert_equal(same, plain, f"{subject.name}: freezing no token")
    output, final = step_by_step(case.rule, frozen, case.lengths, state, sizes, torch.float64)
    kept = {n: x[~where] if is_token_input(subject.rule.inputs_domain()[n].axes, x) else x for n, x in frozen.items()}
    alone, alone_final = step_by_step(case.rule, kept, (int((~where).sum()),), state, sizes, torch.float64)
    assert_close(output[~where], alone, f"{subject.name}: outputs beside frozen tokens")
    for name in final:
        assert_close(final[name], alone_final[name], f"{subject.name}: {name} beside frozen tokens")
    if case.num_tokens and where[0]:
        # where the token would have seen the state, had it not been frozen
        other = case.random_state(case.seed + 2, 1)
        plain_other, _ = step_by_step(case.rule, case.inputs, case.lengths, other, sizes, torch.float64)
        frozen_other, _ = step_by_step(case.rule, frozen, case.lengths, other, sizes, torch.float64)
        blind = torch.equal(output[0], frozen_other[0]) and not torch.equal(plain[0], plain_other[0])
        assert not blind, f"{subject.name}: a frozen token does not see the state"


def has_chunked_form(subject: RuleSubject) -> bool:
    return subject.rule.has_chunked_form


# the affine scans that a rule lowers or composes to are the rule's own step, when run by the generic affine step
@applies_if(has_chunked_form)
@drawn()
def check_structure_is_the_step(subject: RuleSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, gates=("sampled", "mixed"), max_tokens=20, max_segments=1), "case")
    state, sizes = case.start(), case.all_sizes
    truth, true_final = step_by_step(case.rule, case.inputs, case.lengths, state, sizes, torch.float64)
    output, final = subject.rule.compose(case.inputs, state, affine_steps)
    assert list(final) == list(state), f"{subject.name}: compose returns the states {list(final)}"
    assert_close(output, truth, f"{subject.name}: the output that its structure describes")
    for name, tensor in true_final.items():
        assert_close(final[name], tensor, f"{subject.name}: the state {name} that its structure describes")
