"""What the strategies draw is legal, and reaches the corners they are there for."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from momkit.errors import InputError
from momkit.mechanisms.base import Domain
from momkit.registry import registry
from momkit.testing.profiles import PROFILES, current_profile, seed_for
from momkit.testing.strategies import (
    EXTREME_GATES,
    bounds,
    cuts,
    masks,
    pushed,
    ragged,
    routings,
    rule_sizes,
    scan_cases,
)
from momkit.testing.subjects import RuleSubject

MANY = hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)


def examples(strategy, count=150):
    """Values that a strategy draws."""
    found = []

    @hypothesis.seed(1)
    @hypothesis.settings(MANY, max_examples=count)
    @hypothesis.given(strategy)
    def collect(value):
        found.append(value)

    collect()
    return found


def subject(name):
    cls = registry().find("mechanism", name)
    return RuleSubject(name, cls, cls.Spec())


def test_ragged_lengths_reach_every_corner():
    drawn = examples(ragged(96))
    assert all(1 <= len(lengths) <= 5 and sum(lengths) <= 96 for lengths in drawn)
    lengths = {length for case in drawn for length in case}
    assert {0, 1, 2, 3} <= lengths
    assert any(length > 64 for length in lengths)
    assert any(0 in case and max(case) > 0 for case in drawn)


def test_ragged_may_be_no_segment_at_all():
    assert () in examples(ragged(96, 0))


def test_bounds_are_cu_seqlens():
    assert bounds((2, 0, 3)).tolist() == [0, 2, 2, 5]
    assert bounds(()).tolist() == [0]
    assert bounds((1,), torch.int32).dtype == torch.int32


@hypothesis.given(st.integers(0, 30).flatmap(lambda n: st.tuples(st.just(n), cuts(n))))
@MANY
def test_cuts_make_up_the_whole(drawn):
    length, pieces = drawn
    assert sum(pieces) == length
    assert min(pieces) >= 0


def test_cuts_may_be_at_the_ends():
    drawn = examples(cuts(9))
    assert (9,) in drawn
    assert any(len(pieces) > 1 and pieces[0] == 0 for pieces in drawn)
    assert any(len(pieces) > 1 and pieces[-1] == 0 for pieces in drawn)


@pytest.mark.parametrize("name", registry().names("mechanism"))
def test_sizes_are_small_and_legal(name):
    for sizes in examples(rule_sizes(subject(name)), 30):
        assert set(subject(name).axes()) <= set(sizes)
        assert all(1 <= size <= 8 for size in sizes.values())
        assert sizes.get("H", 1) % sizes.get("G", 1) == 0


def test_sizes_tell_keys_from_values_and_heads_from_key_heads():
    drawn = examples(rule_sizes(subject("gated_deltanet")))
    assert any(sizes["K"] != sizes["V"] for sizes in drawn)
    assert any(1 < sizes["G"] < sizes["H"] for sizes in drawn)


def test_a_profile_caps_what_is_drawn(monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", "interpret")
    for case in examples(scan_cases(subject("gated_deltanet"), max_tokens=96), 60):
        assert case.sizes["H"] <= 2
        assert case.num_tokens <= 70


@pytest.mark.parametrize("name", ["gated_deltanet", "gsa", "ttt_linear", "mamba"])
def test_a_profile_may_fix_shapes(monkeypatch, name):
    monkeypatch.setenv("MOMKIT_PROFILE", "cuda")
    axes = subject(name).axes()
    allowed = [{axis: size for axis, size in shape.items() if axis in axes} for shape in PROFILES["cuda"].shapes]
    drawn = examples(rule_sizes(subject(name)), 40)
    found = [{axis: sizes[axis] for axis in "HGKV" if axis in axes} for sizes in drawn]
    assert all(sizes in allowed for sizes in found)
    assert all(shape in found for shape in allowed)
    assert all(axes <= set(sizes) for sizes in drawn)


def test_sizes_that_a_spec_fixes_stay():
    cls = registry().find("mechanism", "gated_deltanet")
    fixed = RuleSubject("gated_deltanet", cls, cls.Spec(num_heads=3, head_dim=7))
    assert all(sizes["H"] == 3 and sizes["K"] == 7 for sizes in examples(rule_sizes(fixed), 20))


@pytest.mark.parametrize("mode", ["mixed", "constant"])
def test_gates_are_pushed_to_every_extreme(mode):
    gate, seen = Domain("T H", high=0.0), set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = pushed(gate, gate.sample(generator, {"T": 5, "H": 2}), mode, generator)
        assert bool((x <= 0).all())
        seen |= set(x.flatten().tolist())
    assert set(EXTREME_GATES) <= seen


def test_unbounded_inputs_are_never_pushed():
    x = torch.randn(4)
    assert pushed(Domain("T"), x, "mixed", torch.Generator()) is x


def test_write_strengths_are_pushed_to_zero_and_one():
    x = pushed(Domain("T H", low=0.0, high=1.0), torch.full((50, 2), 0.5), "mixed", torch.Generator().manual_seed(0))
    assert set(x.flatten().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("name", registry().names("mechanism"))
def test_a_case_is_made_of_its_seed(name):
    for case in examples(
        scan_cases(subject(name), gates=("sampled", "mixed"), dtypes=(torch.float32, torch.float64)), 10
    ):
        again = case.with_seed(case.seed)
        for key, x in case.inputs.items():
            assert torch.equal(again.inputs[key], x)
        for x in case.start().values():
            assert x.dtype == case.state_dtype
            assert len(x) == len(case.lengths)


def test_routings_are_legal_and_reach_every_pattern():
    drawn = examples(routings(7, 4))
    assert {case.pattern for case in drawn} == {"random", "collapsed", "in turn"}
    assert {case.reads is None for case in drawn} == {True, False}
    for case in drawn:
        routing = case.routing
        for t in range(7):
            for part in (routing.memory_ids[t, : case.choices], routing.memory_ids[t, case.choices :]):
                assert len(set(part.tolist())) == len(part)
        assert bool(((routing.memory_ids >= 0) & (routing.memory_ids < 4)).all())
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(7, dtype=torch.float64))


def test_masks_reach_both_sides():
    drawn = examples(masks(2, 6))
    rows = {tuple(row) for mask in drawn for row in mask.tolist()}
    assert (True, True, False, False, False, False) in rows
    assert (False, False, False, False, True, True) in rows
    assert any(mask.all() for mask in drawn)
    assert (False,) * 6 in rows


def test_profiles_are_chosen_by_environment(monkeypatch):
    for name in ("MOMKIT_PROFILE", "HYPOTHESIS_PROFILE", "MOMKIT_SEED"):
        monkeypatch.delenv(name, raising=False)
    assert current_profile() is PROFILES["dev"]
    assert seed_for(PROFILES["ci"], "a") == seed_for(PROFILES["ci"], "a") != seed_for(PROFILES["ci"], "b")
    assert seed_for(PROFILES["dev"], "a") != seed_for(PROFILES["dev"], "a")
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "full")
    assert current_profile() is PROFILES["full"]
    monkeypatch.setenv("MOMKIT_PROFILE", "ci")
    assert current_profile() is PROFILES["ci"]
    monkeypatch.setenv("MOMKIT_SEED", "12")
    assert seed_for(PROFILES["dev"], "a") == 12
    monkeypatch.setenv("MOMKIT_SEED", "x")
    with pytest.raises(InputError, match="MOMKIT_SEED"):
        seed_for(PROFILES["dev"], "a")
    monkeypatch.setenv("MOMKIT_PROFILE", "fast")
    with pytest.raises(InputError, match="MOMKIT_PROFILE"):
        current_profile()
