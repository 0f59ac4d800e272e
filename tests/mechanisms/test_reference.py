"""The lift of one step to packed segments, against a loop over segments and tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Inputs, Mechanism, Sizes, State
from momkit.mechanisms.reference import Lanes, has_time, repeat_key_heads, scan_reference, scan_state_dtype
from momkit.registry import registry
from momkit.scan import as_mechanism

every_rule = pytest.mark.parametrize("name", registry().names("mechanism"))


def sizes_of(rule: Mechanism, num_tokens: int, key_heads: int = 2) -> Sizes:
    entries = [domain.axes for domain in rule.inputs_domain().values()] + list(rule.state_axes().values())
    known = {"H": 2, "G": key_heads, "K": 4, "V": 4, "T": num_tokens}
    return {axis: known.get(axis, 3) for axes in entries for axis in axes.split()} | known


def naive(rule: Mechanism, inputs: Inputs, lengths: list[int], state: State, sizes: Sizes) -> tuple[Tensor, State]:
    """One segment after the other, one token after the other, without any leading dimension."""
    domain = rule.inputs_domain()
    rows, finals, t = [], [], 0
    for n, length in enumerate(lengths):
        mine = {name: s[n] for name, s in state.items()}
        for _ in range(length):
            one = {}
            for name, x in inputs.items():
                axes = domain[name].axes.split()
                x = x[t] if axes[0] == "T" else x
                if "G" in axes:
                    axis = axes.index("G") - len(axes)
                    x = x.repeat_interleave(sizes["H"] // sizes["G"], dim=axis)
                one[name] = x
            mine, output = rule.step(mine, one)
            rows.append(output)
            t += 1
        finals.append(mine)
    shape = [sizes[axis] for axis in rule.output_axes.split()]
    value = inputs[rule.value_input]
    rows += [torch.zeros(shape, dtype=value.dtype)] * (len(value) - t)
    output = torch.stack(rows) if rows else value.new_zeros(0, *shape)
    return output, {n: torch.stack([f[n] for f in finals]) if finals else s for n, s in state.items()}


def case(
    rule: Mechanism, lengths: list[int], tail: int = 0, seed: int = 0, key_heads: int = 2
) -> tuple[Inputs, Tensor, State, Sizes]:
    sizes = sizes_of(rule, sum(lengths) + tail, key_heads)
    generator = torch.Generator().manual_seed(seed)
    inputs = rule.sample(generator, sizes)
    shapes = rule.state_spec(sizes)
    state = {n: torch.randn(len(lengths), *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return inputs, torch.tensor([0, *lengths]).cumsum(0), state, sizes


@every_rule
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    tail=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
    key_heads=st.sampled_from([2, 1]),
)
def test_it_is_a_loop_over_segments(name: str, lengths: list[int], tail: int, seed: int, key_heads: int) -> None:
    rule = as_mechanism(name)
    inputs, cu_seqlens, state, sizes = case(rule, lengths, tail, seed, key_heads)
    actual = scan_reference(rule, inputs, cu_seqlens, state, sizes)
    torch.testing.assert_close(actual, naive(rule, inputs, lengths, state, sizes), rtol=1e-11, atol=1e-11)
    assert (actual[0][sum(lengths) :] == 0).all()
    for n, length in enumerate(lengths):
        if not length:
            assert all(torch.equal(actual[1][key][n], state[key][n]) for key in state)


@every_rule
def test_gradients_are_the_loops(name: str) -> None:
    """To every input and initial state, from every output and final state."""
    rule, lengths = as_mechanism(name), [3, 0, 1, 4]
    inputs, cu_seqlens, state, sizes = case(rule, lengths, tail=2)
    leaves = {n: x.requires_grad_() for n, x in (inputs | {f"initial {n}": s for n, s in state.items()}).items()}
    generator = torch.Generator().manual_seed(5)
    both = []
    for output, final in (
        scan_reference(rule, inputs, cu_seqlens, state, sizes),
        naive(rule, inputs, lengths, state, sizes),
    ):
        generator.manual_seed(5)
        total = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (output, *final.values())
        )
        both.append(torch.autograd.grad(total, list(leaves.values())))
    for n, actual, expected in zip(leaves, *both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


@every_rule
def test_nan_stays_in_its_future_and_its_segment(name: str) -> None:
    rule = as_mechanism(name)
    inputs, cu_seqlens, state, sizes = case(rule, [4, 2, 5])
    output, final = scan_reference(rule, inputs, cu_seqlens, state, sizes)
    domain = rule.inputs_domain()
    dirty = {n: x.clone() for n, x in inputs.items()}
    for n, x in dirty.items():
        if domain[n].axes.split()[0] == "T":
            x[2:4] = torch.nan
    reached = (torch.arange(11) >= 2) & (torch.arange(11) < 4)
    other, last = scan_reference(rule, dirty, cu_seqlens, state, sizes)
    assert torch.equal(other[~reached], output[~reached])
    assert other[reached].isnan().any()
    assert all(torch.equal(last[n][1:], final[n][1:]) for n in final)


def test_lanes_are_time_major_and_the_longest_first() -> None:
    lanes = Lanes.of(torch.tensor([0, 2, 2, 5, 6, 9]))
    # lengths 2 0 3 1 3; equal ones in their order
    assert lanes.segments.tolist() == [2, 4, 0, 3, 1]
    assert lanes.counts == [4, 3, 2]
    assert lanes.order.tolist() == [2, 6, 0, 5, 3, 7, 1, 4, 8]


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_lanes_of_nothing(bounds: list[int]) -> None:
    lanes = Lanes.of(torch.tensor(bounds, dtype=torch.int32))
    assert lanes.counts == []
    assert len(lanes.order) == 0
    assert lanes.segments.tolist() == list(range(len(bounds) - 1))


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_lanes_hold_every_covered_row_once(lengths: list[int], tail: int) -> None:
    lanes = Lanes.of(torch.tensor([0, *lengths]).cumsum(0))
    assert sorted(lanes.order.tolist()) == list(range(sum(lengths)))
    assert lanes.counts == sorted(lanes.counts, reverse=True)
    assert len(lanes.counts) == max(lengths, default=0)
    assert sorted(lanes.segments.tolist()) == list(range(len(lengths)))


def test_states_are_float32_or_float64() -> None:
    """Float64 with any float64 input of the tokens; a constant does not decide."""
    half, single, double = (torch.zeros(1, 1, 1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    rule = as_mechanism("retention")
    constant = {"g": double[0, 0]}
    assert scan_state_dtype(rule, {"q": half, "k": half} | constant) == torch.float32
    assert scan_state_dtype(rule, {"q": half, "k": single} | constant) == torch.float32
    assert scan_state_dtype(rule, {"q": half, "k": double} | constant) == torch.float64


def test_has_time() -> None:
    assert has_time("T H K", torch.zeros(5, 2, 3))
    assert not has_time("H K", torch.zeros(2, 3))
    assert has_time("H K", torch.zeros(5, 2, 3))


def test_repeat_key_heads() -> None:
    sizes = {"G": 2, "H": 4}
    k = torch.arange(6.0).view(1, 2, 3)
    assert repeat_key_heads("T G K", k, sizes)[0, :, 0].tolist() == [0, 0, 3, 3]
    assert repeat_key_heads("T G", torch.tensor([[1.0, 2.0]]), sizes).tolist() == [[1, 1, 2, 2]]
    # a constant, also when given for each token
    assert repeat_key_heads("G K", k[0], sizes).shape == (4, 3)
    assert repeat_key_heads("G K", k, sizes).shape == (1, 4, 3)
    assert repeat_key_heads("T H V", k, sizes) is k
    assert repeat_key_heads("T G K", k, {"G": 2, "H": 2}) is k


def test_a_step_that_returns_its_state_returns_a_copy() -> None:
    """Final states are safe to write to."""
    rule = as_mechanism("gated_deltanet")
    inputs, cu_seqlens, state, sizes = case(rule, [0, 0])
    kept = state["S"].clone()
    _, final = scan_reference(rule, inputs, cu_seqlens, state, sizes)
    final["S"].zero_()
    assert torch.equal(state["S"], kept)
