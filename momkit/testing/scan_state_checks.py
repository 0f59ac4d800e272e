"""Checks of a rule on one backend: states passed on, picked and kept, and tokens that leave no trace in them."""

import torch
from hypothesis import strategies as st

from momkit.testing.drawing import Draw, applies_if, drawn
from momkit.testing.poison import poisoned_empty
from momkit.testing.scan_checks import assert_same, assert_true_to_step, run_case
from momkit.testing.strategies import bounds, cuts, scan_cases, seeds
from momkit.testing.subjects import ScanSubject
from momkit.testing.tolerances import assert_close, assert_equal


# any cut of a sequence, with the state carried over, gives what the whole gives
@drawn()
def check_state_passing(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_segments=1), "case")
    pieces = draw(cuts(case.num_tokens), "lengths of the pieces")
    whole = run_case(subject, case)
    state, outputs, start = case.initial_state, [], 0
    for length in pieces:
        part = {n: x[start : start + length] if n in case.token_inputs() else x for n, x in case.inputs.items()}
        out = subject.scan(part, initial_state=state)
        outputs.append(out.output)
        state, start = out.final_state, start + length
    assert_close(torch.cat(outputs), whole.output, f"{subject.id}: outputs of the pieces {pieces}")
    assert state is not None
    for name, tensor in whole.final_state.items():
        assert_close(state[name], tensor, f"{subject.id}: {name} after the pieces {pieces}")


# decoding one token at a time by the rule's step, heads and all, is the scan of the whole
@drawn()
def check_step_matches_scan(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_tokens=24, max_segments=1), "case")
    whole = run_case(subject, case)
    state = case.start()
    for t in range(case.num_tokens):
        token = {n: x[t : t + 1] if n in case.token_inputs() else x for n, x in case.inputs.items()}
        out = subject.scan(token, initial_state=state)
        assert_close(out.output[0], whole.output[t], f"{subject.id}: token {t} by itself")
        state = out.final_state
    for name, tensor in whole.final_state.items():
        assert_close(state[name], tensor, f"{subject.id}: {name} after single tokens")


# empty segments keep their state bitwise and change nothing else; no token at all, or no segment, is legal
@drawn()
def check_empty_segments(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_tokens=40, min_segments=0, max_segments=3, with_state=True), "case")
    filled = [n for n in range(len(case.lengths)) if case.lengths[n]]
    place = draw(st.integers(0, len(case.lengths)), "place of an empty segment")
    lengths = (*case.lengths[:place], 0, *case.lengths[place:])
    extra = case.random_state(case.seed + 3, 1)
    state = {n: torch.cat([x[:place], extra[n], x[place:]]) for n, x in case.start().items()}
    plain = run_case(subject, case)
    out = subject.scan(case.inputs, bounds(lengths), initial_state=state)
    assert_same(subject, out.output, plain.output, f"outputs beside an empty segment at {place}")
    for name, tensor in out.final_state.items():
        assert_equal(tensor[place], extra[name][0], f"{subject.id}: {name} of an empty segment")
        for n in range(len(case.lengths)):
            row = tensor[n + (n >= place)]
            if n in filled:
                assert_same(subject, row, plain.final_state[name][n], f"{name} beside an empty segment")
            else:
                assert_equal(row, case.start()[name][n], f"{subject.id}: {name} of an empty segment")


# rows that no segment covers come out as zeros, and give no gradient
@drawn()
def check_uncovered_tail(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject), "case")
    covered = draw(st.integers(0, len(case.lengths)), "covered segments")
    cu_seqlens = case.cu_seqlens[: covered + 1]
    end = int(cu_seqlens[-1])
    inputs = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
    state = {name: x[:covered] for name, x in case.start().items()}
    with poisoned_empty():
        out = subject.run(inputs, cu_seqlens, initial_state=state)
        total = out.output.sum() + sum(s.sum() for s in out.final_state.values())
        if total.requires_grad:
            total.backward()
    alone = {n: x[:end] if n in case.token_inputs() else x for n, x in case.inputs.items()}
    expected = subject.run(alone, cu_seqlens, initial_state=state)
    assert_same(subject, out.output[:end], expected.output, "covered rows")
    assert_equal(out.output[end:], torch.zeros_like(out.output[end:]), f"{subject.id}: rows in no segment")
    for name in case.token_inputs():
        grad = inputs[name].grad
        tail = torch.zeros_like(inputs[name]) if grad is None else grad
        assert_equal(tail[end:], torch.zeros_like(tail[end:]), f"{subject.id}: gradient of {name} in no segment")


# state_index picks rows of a larger pool, repeats allowed, and leaves the pool as it is
@drawn()
def check_state_index(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject, max_tokens=48, max_segments=4), "case")
    rows = draw(st.integers(1, 6), "rows of the pool")
    n = len(case.lengths)
    index = torch.tensor(draw(st.lists(st.integers(0, rows - 1), min_size=n, max_size=n), "state_index"))
    pool = case.random_state(case.seed + 3, rows)
    before = {name: tensor.clone() for name, tensor in pool.items()}
    picked = run_case(subject, case, initial_state={name: tensor[index] for name, tensor in pool.items()})
    state_index = index.int() if case.seed % 2 else index
    out = subject.scan(case.inputs, case.cu_seqlens, initial_state=pool, state_index=state_index)
    assert_same(subject, out.output, picked.output, f"outputs from rows {index.tolist()} of a pool")
    for name, tensor in picked.final_state.items():
        assert_same(subject, out.final_state[name], tensor, f"{name} from rows {index.tolist()} of a pool")
        assert_equal(pool[name], before[name], f"{subject.id}: the pool of {name}")


def has_constants(subject: ScanSubject) -> bool:
    return any(domain.axes.split()[0] != "T" for domain in subject.rule.inputs_domain().values())


# a constant input may be given a row for each token, as `freeze` does
@applies_if(has_constants)
@drawn(0.5)
def check_constants_may_vary(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject), "case")
    constants = set(case.inputs) - set(case.token_inputs())
    wide = {n: x.expand(case.num_tokens, *x.shape) if n in constants else x for n, x in case.inputs.items()}
    expected, out = run_case(subject, case), run_case(subject, case, inputs=wide)
    assert_close(out.output, expected.output, f"{subject.id}: output with constants given to each token")
    for name, tensor in expected.final_state.items():
        assert_close(out.final_state[name], tensor, f"{subject.id}: {name} with constants given to each token")


# slots that only read leave no trace in outputs beside them or in the state, on every backend
@drawn()
def check_frozen_tokens_leave_no_trace(subject: ScanSubject, draw: Draw) -> None:
    case = draw(scan_cases(subject), "case")
    generator = torch.Generator().manual_seed(draw(seeds, "frozen tokens"))
    where = torch.rand(case.num_tokens, generator=generator) < 0.3
    assert_true_to_step(subject, case, case.rule.freeze(case.inputs, where))
