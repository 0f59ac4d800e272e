"""Checks of a rule on one backend: what `scan` returns, and what it may depend on."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Inputs, State
from momkit.scan import ScanOutput
from momkit.testing.drawing import Draw, drawn
from momkit.testing.oracle import gradients_of, step_by_step
from momkit.testing.poison import poisoned_empty
from momkit.testing.strategies import ScanCase, bounds, scan_cases
from momkit.testing.subjects import ScanSubject
from momkit.testing.tolerances import assert_as_good, assert_close, assert_equal


def run_case(
    subject: ScanSubject, case: ScanCase, inputs: Inputs | None = None, initial_state: State | None = None
) -> ScanOutput:
    """Scan a case on the subject's backend, with its own inputs and state unless others are given."""
    inputs = case.inputs if inputs is None else inputs
    state = case.initial_state if initial_state is None else initial_state
    return subject.scan(inputs, case.cu_seqlens, initial_state=state)


def assert_same(subject: ScanSubject, actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise where nothing else may matter, to rounding where a matmul may take other rows along."""
    (assert_equal if subject.exact else assert_close)(actual, expected, f"{subject.id}: {what}")


# outputs are [T, ...] in the values' dtype, states [N, ...] in fp32 or float64, in the order of the rule's states
@drawn()
def check_shapes_and_dtypes(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, dtypes=subject.dtypes), "case")
    out = run_case(subject, case)
    expected = (case.num_tokens, *(case.sizes[axis] for axis in case.rule.output_axes.split()))
    assert out.output.shape == expected, f"{subject.id}: output is {tuple(out.output.shape)}, expected {expected}"
    assert out.output.dtype == case.dtype, f"{subject.id}: output is {out.output.dtype} for {case.dtype} values"
    shapes = case.rule.state_spec(case.all_sizes)
    assert list(out.final_state) == list(shapes), f"{subject.id}: final_state has {list(out.final_state)}"
    for name, shape in shapes.items():
        state = out.final_state[name]
        assert state.shape == (len(case.lengths), *shape), f"{subject.id}: {name} is {tuple(state.shape)}"
        assert state.dtype == case.state_dtype, f"{subject.id}: {name} is {state.dtype}"


# outputs and final states are those of the rule's step in float64, as nearly as the same step gets in this dtype
@drawn()
def check_matches_reference(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, dtypes=subject.dtypes, gates=("sampled", "mixed")), "case")
    assert_true_to_step(subject, case)


# gates from 0 to minus infinity and write strengths of 0 and 1 give no NaN where the step has none, and no error
@drawn()
def check_extreme_gates(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, dtypes=subject.computes_in, gates=("mixed", "constant")), "case")
    assert_true_to_step(subject, case)


def assert_true_to_step(subject: ScanSubject, case: ScanCase, inputs: Inputs | None = None) -> None:
    """A case, with its own inputs or others, gives what the step gives."""
    inputs = case.inputs if inputs is None else inputs
    out = run_case(subject, case, inputs=inputs)
    start, sizes, dtype = case.start(), case.all_sizes, subject.multiplied_in(case.dtype)
    truth, true_state = step_by_step(case.rule, inputs, case.lengths, start, sizes, torch.float64)
    eager, eager_state = step_by_step(case.rule, inputs, case.lengths, start, sizes, case.state_dtype)
    assert_as_good(out.output, eager.to(case.dtype), truth, f"{subject.id}: output")
    for name, state in true_state.items():
        assert_as_good(out.final_state[name], eager_state[name], state, f"{subject.id}: final_state[{name!r}]", dtype)


# changing the future, or on the reference filling it with NaN, leaves the past as it was
@drawn()
def check_causal(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject), "case")
    n = draw(st.integers(0, len(case.lengths) - 1), "segment")
    cut = case.segment(n).start + draw(st.integers(0, case.lengths[n]), "first changed token")
    future = torch.arange(case.num_tokens) >= cut
    before = run_case(subject, case).output[:cut]
    after = run_case(subject, case, inputs=with_rows(case, future, case.with_seed(case.seed + 7).inputs))
    assert_same(subject, after.output[:cut], before, f"outputs before token {cut}, after a change from there on")
    if subject.exact:
        nan = {name: torch.full_like(x, torch.nan) for name, x in case.inputs.items()}
        poisoned = run_case(subject, case, inputs=with_rows(case, future, nan))
        assert_same(subject, poisoned.output[:cut], before, f"outputs before token {cut}, with NaN from there on")


def with_rows(case: ScanCase, where: Tensor, other: Inputs) -> Inputs:
    """The case's inputs with the token rows `where` `[T]` taken from others."""
    changed = dict(case.inputs)
    for name in case.token_inputs():
        x = case.inputs[name]
        changed[name] = torch.where(where.view(-1, *[1] * (x.ndim - 1)), other[name], x)
    return changed


# a segment sees nothing of another: not its tokens, not its state
@drawn()
def check_sequences_independent(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, min_segments=2, with_state=True), "case")
    n = draw(st.integers(0, len(case.lengths) - 1), "segment that changes")
    inside = torch.zeros(case.num_tokens, dtype=torch.bool)
    inside[case.segment(n)] = True
    before = run_case(subject, case)
    others = torch.arange(len(case.lengths)) != n
    for fill in (None, torch.nan) if subject.exact else (None,):
        new = case.with_seed(case.seed + 7)
        inputs, state = new.inputs, new.start()
        if fill is not None:
            inputs = {name: torch.full_like(x, fill) for name, x in inputs.items()}
            state = {name: torch.full_like(x, fill) for name, x in state.items()}
        state = {
            name: x.clone().index_copy(0, torch.tensor([n]), state[name][n : n + 1]) for name, x in case.start().items()
        }
        after = run_case(subject, case, inputs=with_rows(case, inside, inputs), initial_state=state)
        assert_same(subject, after.output[~inside], before.output[~inside], f"outputs beside segment {n}")
        for name, tensor in before.final_state.items():
            assert_same(subject, after.final_state[name][others], tensor[others], f"{name} beside segment {n}")


# putting segments in another order puts their results in that order
@drawn()
def check_sequence_order_equivariant(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, min_segments=2, with_state=True), "case")
    order = draw(st.permutations(range(len(case.lengths))), "order")
    rows = torch.cat([torch.arange(case.num_tokens)[case.segment(n)] for n in order])
    inputs = {name: x[rows] if name in case.token_inputs() else x for name, x in case.inputs.items()}
    state = {name: x[list(order)] for name, x in case.start().items()}
    cu_seqlens = bounds(tuple(case.lengths[n] for n in order))
    out = run_case(subject, case)
    moved = subject.scan(inputs, cu_seqlens, initial_state=state)
    assert_same(subject, moved.output, out.output[rows], "outputs of segments in another order")
    for name, tensor in out.final_state.items():
        assert_same(subject, moved.final_state[name], tensor[list(order)], f"{name} of segments in another order")


# every element of every result is written: memory that comes uninitialised never shows
@drawn(0.5)
def check_writes_every_output(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, dtypes=subject.computes_in), "case")
    clean = results(subject, case)
    with poisoned_empty():
        poisoned = results(subject, case)
    for name, tensor in clean.items():
        assert_equal(poisoned[name], tensor, f"{subject.id}: {name} from poisoned memory")


# the same call gives the same bits
@drawn(0.5)
def check_repeatable(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, dtypes=subject.dtypes), "case")
    first, second = results(subject, case), results(subject, case)
    for name, tensor in first.items():
        assert_equal(second[name], tensor, f"{subject.id}: {name} of a second run")


def results(subject: ScanSubject, case: ScanCase) -> dict[str, Tensor]:
    """Outputs, final states and gradients of a scan, by name."""
    inputs = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
    state = {name: x.clone().requires_grad_() for name, x in case.start().items()}
    out = run_case(subject, case, inputs=inputs, initial_state=state)
    total = out.output.double().square().sum() + sum(s.double().square().sum() for s in out.final_state.values())
    leaves = {**inputs, **{f"initial_state[{name!r}]": x for name, x in state.items()}}
    grads = {f"gradient of {name}": g for name, g in gradients_of(total, leaves).items()}
    finals = {f"final_state[{name!r}]": s.detach() for name, s in out.final_state.items()}
    return {"output": out.output.detach(), **finals, **grads}


# a scan changes neither inputs nor state, and does not care how they lie in memory
@drawn(0.5)
def check_leaves_arguments_alone(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, with_state=True), "case")
    plain = run_case(subject, case)
    inputs = {name: strided(x.to(subject.device)) for name, x in case.inputs.items()}
    state = {name: strided(x.to(subject.device)) for name, x in case.start().items()}
    cu_seqlens = strided(case.cu_seqlens.to(subject.device))
    out = subject.scan(inputs, cu_seqlens, initial_state=state)
    assert_close(out.output, plain.output, f"{subject.id}: output of strided inputs")
    for name, tensor in plain.final_state.items():
        assert_close(out.final_state[name], tensor, f"{subject.id}: {name} of strided inputs")
        assert_equal(
            state[name].cpu(), case.with_seed(case.seed).start()[name], f"{subject.id}: initial_state[{name!r}]"
        )
    for name, tensor in case.with_seed(case.seed).inputs.items():
        assert_equal(inputs[name].cpu(), tensor, f"{subject.id}: {name} after the scan")


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([x, x + 1], -1)[..., 0]
