"""The one rule of closeness, the oracle it is held to, and the poison."""

import pytest
import torch

from momkit import scan
from momkit.mechanisms.base import Affine, Structure
from momkit.registry import find_mechanism
from momkit.testing.oracle import affine_steps, gradients_of, step_by_step
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import FLOOR, assert_as_good, assert_close, assert_equal, error


def test_error_is_relative_above_one():
    assert error(torch.tensor([101.0]), torch.tensor([100.0])) == pytest.approx(0.01)
    assert error(torch.tensor([0.2]), torch.tensor([0.1])) == pytest.approx(0.1)
    assert error(torch.zeros(0), torch.zeros(0)) == 0


def test_nan_is_no_small_error():
    assert error(torch.tensor([torch.nan]), torch.tensor([1.0])) == torch.inf
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([torch.nan]), torch.tensor([torch.nan]), "nan")


def test_twice_the_eager_error_and_no_more():
    truth = torch.zeros(1, dtype=torch.float64)
    eager = torch.tensor([1e-3])
    assert_as_good(torch.tensor([2e-3]), eager, truth, "x")
    with pytest.raises(AssertionError, match=r"x: error 0.0021, allowed 0.00201, worst at \[0\]"):
        assert_as_good(torch.tensor([2.1e-3]), eager, truth, "x")


def test_the_floor_is_that_of_what_computed():
    truth, eager = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    assert_as_good(torch.tensor([1.9e-3]), eager, truth, "x", torch.float16)
    with pytest.raises(AssertionError, match="allowed 1e-05"):
        assert_as_good(torch.tensor([1.9e-3]), eager, truth, "x")


def test_shapes_are_part_of_closeness():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(1, 2), torch.zeros(2), "x")
    with pytest.raises(AssertionError):
        assert_equal(torch.zeros(1), torch.zeros(1) + 1e-30, "x")


def test_floors_follow_precision():
    by_precision = sorted(FLOOR, key=lambda dtype: torch.finfo(dtype).eps)
    assert [FLOOR[dtype] for dtype in by_precision] == sorted(FLOOR.values())


def test_the_oracle_is_a_loop_of_the_step():
    cls = find_mechanism("linear_attention")
    rule = cls(cls.Spec(scale=1.0))
    k = torch.eye(3, dtype=torch.float64)[:, None]
    v = torch.arange(6.0, dtype=torch.float64).view(3, 1, 2)
    state = {"S": torch.zeros(2, 1, 3, 2, dtype=torch.float64)}
    sizes = {"H": 1, "G": 1, "K": 3, "V": 2}
    output, final = step_by_step(rule, {"q": k, "k": k, "v": v}, (2, 1), state, sizes, torch.float64)
    assert_equal(output, v, "what was just written")
    expected = torch.tensor([[[0, 1], [2, 3], [0, 0]], [[0, 0], [0, 0], [4, 5]]], dtype=torch.float64)
    assert_equal(final["S"][:, 0], expected, "state")


def test_affine_steps_repeat_key_heads_and_take_constants():
    T, H, K, V = 5, 4, 3, 2
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(T, 2, K, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(T, H, V, generator=generator, dtype=torch.float64)
    g = -torch.rand(H, generator=generator, dtype=torch.float64)
    S = torch.zeros(1, H, K, V, dtype=torch.float64)
    output, final = affine_steps(Structure(decay="constant"), Affine(q=q, k=k, v=v, g=g), S)
    cls = find_mechanism("retention")
    expected = scan(cls(cls.Spec(scale=1.0)), {"q": q, "k": k, "v": v, "g": g}, backend="reference")
    assert_close(output, expected.output, "output")
    assert_close(final, expected.final_state["S"], "state")


def test_gradients_of_what_does_not_depend():
    x = torch.ones(2, requires_grad=True)
    assert_equal(gradients_of(torch.zeros(()), {"x": x})["x"], torch.zeros(2), "no graph")
    assert_equal(gradients_of((2 * x).sum(), {"x": x})["x"], torch.full((2,), 2.0), "a graph")


def test_poison_shows():
    empty = torch.empty
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert torch.zeros(2).new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.long).min() > 1e18
        assert not torch.zeros(2).isnan().any()
    assert torch.empty is empty
