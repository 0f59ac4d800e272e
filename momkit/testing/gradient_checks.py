"""Checks of gradients on one backend, held to those of the rule's step in float64."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Inputs, State
from momkit.scan import scan
from momkit.testing.drawing import Draw, drawn
from momkit.testing.oracle import gradients_of, step_by_step
from momkit.testing.strategies import ScanCase, scan_cases
from momkit.testing.subjects import ScanSubject
from momkit.testing.tolerances import assert_as_good


def leaves_of(case: ScanCase, dtype: torch.dtype | None = None) -> tuple[Inputs, State]:
    """Fresh copies of inputs and initial state that ask for a gradient."""
    inputs = {name: x.to(dtype or x.dtype).clone().requires_grad_() for name, x in case.inputs.items()}
    state = {name: x.to(dtype or x.dtype).clone().requires_grad_() for name, x in case.start().items()}
    return inputs, state


def gradients(case: ScanCase, inputs: Inputs, state: State, output: Tensor, final: State) -> dict[str, Tensor]:
    """Gradients by every input and initial state of a random weighting of outputs and final states."""
    generator = torch.Generator().manual_seed(case.seed + 11)
    total = output.new_zeros((), dtype=torch.float64)
    for tensor in (output, *final.values()):
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        total = total + (tensor.double() * weight).sum()
    leaves = {**inputs, **{f"initial_state[{name!r}]": x for name, x in state.items()}}
    return gradients_of(total, leaves)


def oracle_gradients(case: ScanCase, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, state = leaves_of(case, dtype)
    return gradients(case, inputs, state, *step_by_step(case.rule, inputs, case.lengths, state, case.all_sizes, dtype))


# gradients by every input, gates among them, and by the initial state, from outputs and final states
@drawn()
def check_gradients_match_reference(subject: ScanSubject, draw: Draw) -> None:
    dtypes = (torch.float32, torch.float64)
    assert_true_gradients(subject, draw(scan_cases(subject, dtypes=dtypes), "case"))


# the same with gates at their ends: finite, and right
@drawn(0.5)
def check_gradients_at_extreme_gates(subject: ScanSubject, draw: Draw) -> None:
    assert_true_gradients(subject, draw(scan_cases(subject, gates=("mixed", "constant")), "case"))


def assert_true_gradients(subject: ScanSubject, case: ScanCase) -> None:
    inputs, state = leaves_of(case)
    out = scan(case.rule, inputs, case.cu_seqlens, initial_state=state, backend=subject.backend)
    found = gradients(case, inputs, state, out.output, out.final_state)
    truth, eager = oracle_gradients(case, torch.float64), oracle_gradients(case, case.state_dtype)
    for name, tensor in truth.items():
        assert found[name].dtype == case.state_dtype, f"{subject.id}: gradient of {name} is {found[name].dtype}"
        assert_as_good(found[name], eager[name], tensor, f"{subject.id}: gradient of {name}")


# asking for the gradient of one input alone gives what asking for all gives, with or without the final state
@drawn(0.5)
def check_gradient_of_one_input(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_tokens=40), "case")
    chosen = draw(st.sampled_from(sorted(case.inputs)), "input")
    truth, state = leaves_of(case)
    expected, _ = step_by_step(case.rule, truth, case.lengths, state, case.all_sizes, torch.float64)
    leaf = case.inputs[chosen].clone().requires_grad_()
    inputs = case.inputs | {chosen: leaf}
    out = scan(case.rule, inputs, case.cu_seqlens, initial_state=case.initial_state, backend=subject.backend)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    wanted = gradients_of((expected * weight).sum(), {chosen: truth[chosen]})[chosen]
    found = gradients_of((out.output * weight).sum(), {chosen: leaf})[chosen]
    assert_as_good(found, wanted, wanted, f"{subject.id}: gradient of {chosen} alone")
