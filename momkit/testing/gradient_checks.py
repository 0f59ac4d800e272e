"""Checks of gradients on one backend, held to those of the rule's step in float64."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Inputs, State
from momkit.testing.drawing import Draw, drawn
from momkit.testing.oracle import gradients_of, step_by_step, weighted_sum
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
    leaves = {**inputs, **{f"initial_state[{name!r}]": x for name, x in state.items()}}
    return gradients_of(weighted_sum((output, *final.values()), case.seed + 11), leaves)


def oracle_gradients(case: ScanCase, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, state = leaves_of(case, dtype)
    return gradients(case, inputs, state, *step_by_step(case.rule, inputs, case.lengths, state, case.all_sizes, dtype))


# gradients by every input, gates among them, and by the initial state, from outputs and final states
@drawn()
def check_gradients_match_reference(subject: ScanSubject, draw: Draw) -> None:
    assert_true_gradients(subject, draw(scan_cases(subject, dtypes=subject.computes_in), "case"))


# the same with gates at their ends: finite, and right
@drawn(0.5)
def check_gradients_at_extreme_gates(subject: ScanSubject, draw: Draw) -> None:
    assert_true_gradients(
        subject, draw(scan_cases(subject, gates=("mixed", "constant"), dtypes=subject.computes_in), "case")
    )


def assert_true_gradients(subject: ScanSubject, case: ScanCase) -> None:
    inputs, state = leaves_of(case)
    out = subject.scan(inputs, case.cu_seqlens, initial_state=state)
    found = gradients(case, inputs, state, out.output, out.final_state)
    truth, eager = oracle_gradients(case, torch.float64), oracle_gradients(case, case.state_dtype)
    leaves = {**inputs, **{f"initial_state[{name!r}]": x for name, x in state.items()}}
    for name, tensor in truth.items():
        dtype = leaves[name].dtype
        assert found[name].dtype == dtype, f"{subject.id}: gradient of {name} is {found[name].dtype}"
        what = f"{subject.id}: gradient of {name}"
        assert_as_good(found[name], eager[name].to(dtype), tensor, what, subject.multiplied_in(case.dtype))


# asking for the gradient of one input alone gives what asking for all gives, with or without the final state
@drawn(0.5)
def check_gradient_of_one_input(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_tokens=40), "case")
    chosen = draw(st.sampled_from(sorted(case.inputs)), "input")
    found, truth, eager = (leaves_of(case, dtype)[0] for dtype in (None, torch.float64, case.state_dtype))
    outputs = [
        subject.scan(case.inputs | {chosen: found[chosen]}, case.cu_seqlens, initial_state=case.initial_state).output
    ]
    for inputs, dtype in ((truth, torch.float64), (eager, case.state_dtype)):
        outputs.append(step_by_step(case.rule, inputs, case.lengths, case.start(), case.all_sizes, dtype)[0])
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    grads = [
        gradients_of((output * weight).sum(), {chosen: inputs[chosen]})[chosen]
        for output, inputs in zip(outputs, (found, truth, eager), strict=True)
    ]
    assert_as_good(grads[0], grads[2], grads[1], f"{subject.id}: gradient of {chosen} alone")
