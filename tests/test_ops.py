"""The steps around a scan, each against a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from momkit.ops import Windows, activate, combine, gated_rms_norm, grouped_linear, l2_normalize, short_conv

few = settings(max_examples=40, deadline=None)
ragged = st.lists(st.integers(0, 7), max_size=5)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def segments(lengths: list[int], tail: int) -> Tensor:
    """The segment of each slot, and N for a tail that no segment covers."""
    return torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, tail]))


def windows(lengths: list[int], tail: int, writes: Tensor | None, width: int) -> Windows:
    return Windows.of(bounds(lengths), segments(lengths, tail), writes, width)


def naive_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, lengths: list[int], writes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment after the other, one slot after the other."""
    past = weight.shape[1] - 1
    rows, new, r = [], [], 0
    for n, length in enumerate(lengths):
        seen = list(history[n])
        for _ in range(length):
            window = [*seen[len(seen) - past :], x[r]]
            y = sum(weight[:, w] * value for w, value in enumerate(window))
            rows.append(y if bias is None else y + bias)
            if writes is None or writes[r]:
                seen.append(x[r])
            r += 1
        new.append(torch.stack(seen[len(seen) - past :]) if past else history[n])
    rows.extend(torch.zeros_like(row) for row in x[r:])
    return torch.stack(rows) if rows else x, torch.stack(new) if new else history


@few
@given(lengths=ragged, tail=st.integers(0, 3), width=widths, read_only=st.booleans(), biased=st.booleans(), seed=seeds)
def test_short_conv_is_a_loop_over_segments(
    lengths: list[int], tail: int, width: int, read_only: bool, biased: bool, seed: int
) -> None:
    """Values, new histories, and gradients to everything that goes in."""
    g, R, C = generator(seed), sum(lengths) + tail, 3
    x, weight, bias, history = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((R, C), (C, width), (C,), (len(lengths), width - 1, C))
    )
    writes = torch.rand(R, generator=g) < 0.5 if read_only else None
    given_bias = bias if biased else None
    expected = naive_conv(x, weight, given_bias, history, lengths, writes)
    actual = short_conv(x, weight, given_bias, history, windows(lengths, tail, writes, width))
    assert_close(actual, expected)
    if not R:
        return
    scales = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in expected]
    inputs = [x, weight, bias, history]
    gradients = [
        torch.autograd.grad(
            sum((t * s).sum() for t, s in zip(out, scales, strict=True)),
            inputs,
            allow_unused=True,
            materialize_grads=True,
        )
        for out in (actual, expected)
    ]
    assert_close(*gradients)


@few
@given(length=st.integers(0, 12), points=st.lists(st.integers(0, 12), max_size=4), width=widths, seed=seeds)
def test_short_conv_may_be_cut_anywhere(length: int, points: list[int], width: int, seed: int) -> None:
    """With the history handed on, pieces of a segment are the segment; read-only slots stay out of it."""
    g = generator(seed)
    x = torch.randn(length, 2, generator=g, dtype=torch.float64)
    weight = torch.randn(2, width, generator=g, dtype=torch.float64)
    history = torch.randn(1, width - 1, 2, generator=g, dtype=torch.float64)
    writes = torch.rand(length, generator=g) < 0.7
    whole, last = short_conv(x, weight, None, history, windows([length], 0, writes, width))
    cuts = sorted(min(p, length) for p in points)
    parts = [x[:0]]
    for a, b in zip([0, *cuts], [*cuts, length], strict=True):
        y, history = short_conv(x[a:b], weight, None, history, windows([b - a], 0, writes[a:b], width))
        parts.append(y)
    assert_close(torch.cat(parts), whole)
    assert torch.equal(history, last)


@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_short_conv_without_tokens_keeps_history(width: int) -> None:
    history = torch.randn(3, width - 1, 2)
    y, new = short_conv(torch.zeros(0, 2), torch.randn(2, width), None, history, windows([0, 0, 0], 0, None, width))
    assert y.shape == (0, 2)
    assert torch.equal(new, history)


@pytest.mark.parametrize("width", [1, 4])
def test_short_conv_without_segments(width: int) -> None:
    y, new = short_conv(
        torch.randn(3, 2), torch.randn(2, width), None, torch.zeros(0, width - 1, 2), windows([], 3, None, width)
    )
    assert torch.equal(y, torch.zeros(3, 2))
    assert new.shape == (0, width - 1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_short_conv_reaches_nothing_else(dtype: torch.dtype) -> None:
    """NaN in a slot stays with the slots of its segment from there on, and in the tail with none."""
    g = generator(0)
    lengths, width = [6, 2, 5], 4
    x, weight = torch.randn(16, 2, generator=g).to(dtype), torch.randn(2, width, generator=g).to(dtype)
    history, where = torch.randn(3, width - 1, 2, generator=g).to(dtype), windows(lengths, 3, None, width)
    clean, kept = short_conv(x, weight, None, history, where)
    assert clean.dtype == kept.dtype == dtype
    start = 0
    for n, length in enumerate(lengths):
        for r in range(start, start + length):
            dirty = x.clone()
            dirty[r] = torch.nan
            y, new = short_conv(dirty, weight, None, history, where)
            reached = torch.zeros(16, dtype=torch.bool)
            reached[r : min(r + width, start + length)] = True
            assert y[reached].isnan().all()
            assert torch.equal(y[~reached], clean[~reached])
            others = [i for i in range(3) if i != n]
            assert torch.equal(new[others], kept[others])
        start += length
    dirty = torch.cat([x[:13], torch.full((3, 2), torch.nan, dtype=dtype)])
    y, new = short_conv(dirty, weight, None, history, where)
    assert torch.equal(y, clean)
    assert torch.equal(new, kept)


def test_read_only_slots_see_themselves_and_are_seen_by_none() -> None:
    x = torch.tensor([[1.0], [10.0], [100.0]])
    writes = torch.tensor([True, False, True])
    y, new = short_conv(x, torch.tensor([[2.0, 1.0]]), None, torch.tensor([[[5.0]]]), windows([3], 0, writes, 2))
    assert y.flatten().tolist() == [11, 12, 102]
    assert new.flatten().tolist() == [100]


def test_windows_take_int32_bounds() -> None:
    x, weight, history = torch.randn(5, 2), torch.randn(2, 3), torch.randn(2, 2, 2)
    segment = segments([2, 3], 0)
    expected = short_conv(x, weight, None, history, Windows.of(bounds([2, 3]), segment, None, 3))
    actual = short_conv(x, weight, None, history, Windows.of(bounds([2, 3]).int(), segment, None, 3))
    assert_close(actual, expected, rtol=0, atol=0)


@few
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    tail=st.integers(0, 3),
    biased=st.booleans(),
    seed=seeds,
)
def test_grouped_linear_is_a_loop_over_rows(lengths: list[int], tail: int, biased: bool, seed: int) -> None:
    g, R, groups = generator(seed), sum(lengths) + tail, len(lengths)
    x, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((R, 3), (groups, 4, 3), (groups, 4))
    )
    group = segments(lengths, tail).tolist()
    rows = [
        (weight[m] @ row + (bias[m] if biased else 0)) if m < groups else row.new_zeros(4)
        for m, row in zip(group, x, strict=True)
    ]
    expected = torch.stack(rows) if rows else x.new_zeros(0, 4)
    actual = grouped_linear(x, weight, bounds(lengths), bias if biased else None)
    assert_close(actual, expected)
    if not sum(lengths):
        return
    scale = torch.randn(R, 4, generator=g, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((y * scale).sum(), [x, weight, bias], allow_unused=True, materialize_grads=True)
        for y in (actual, expected)
    ]
    assert_close(*gradients)


def test_grouped_linear_looks_at_no_other_group() -> None:
    """Rows past the last group may hold anything, and a group without rows gets no gradient."""
    x = torch.randn(6, 3)
    x[4:] = torch.nan
    weight = torch.randn(3, 2, 3, requires_grad=True)
    y = grouped_linear(x, weight, torch.tensor([0, 1, 1, 4]))
    assert y[:4].isfinite().all()
    assert (y[4:] == 0).all()
    y.sum().backward()
    assert weight.grad.isfinite().all()
    assert (weight.grad[1] == 0).all()
    assert (weight.grad[[0, 2]] != 0).any()


def test_combine_adds_in_the_order_of_choices() -> None:
    """Bitwise the sum from left to right, in float32, the shared memory's slot last with weight one."""
    g = generator(0)
    slots = torch.randn(20, 2, 3, generator=g) * 10.0 ** torch.randint(-4, 4, (20, 1, 1), generator=g)
    token_slot = torch.randperm(20, generator=g).view(5, 4)
    weights = torch.rand(5, 3, generator=g)
    expected = torch.zeros(5, 2, 3)
    for t in range(5):
        for j in range(4):
            picked = slots[token_slot[t, j]]
            expected[t] = expected[t] + (weights[t, j] * picked if j < 3 else picked)
    assert torch.equal(combine(slots, token_slot, weights), expected)
    without_shared = combine(slots, token_slot[:, :3], weights)
    assert_close(without_shared, expected - slots[token_slot[:, 3]], atol=1e-2, rtol=1e-5)


def test_combine_mixes_in_the_precision_of_the_weights() -> None:
    slots, token_slot = torch.randn(4, 1, 2).bfloat16(), torch.tensor([[0, 1], [3, 2]])
    for dtype in (torch.float32, torch.float64):
        weights = torch.rand(2, 2, dtype=dtype)
        mixed = combine(slots, token_slot, weights)
        assert mixed.dtype == dtype
        assert_close(mixed, (slots.to(dtype)[token_slot] * weights[..., None, None]).sum(1))


def test_combine_selects_by_mask() -> None:
    """A masked token is zero whatever its slots hold; zero times NaN would not be."""
    slots = torch.randn(4, 1, 2)
    slots[[1, 2]] = torch.nan
    token_slot, mask = torch.tensor([[0, 3], [1, 2]]), torch.tensor([True, False])
    mixed = combine(slots, token_slot, torch.ones(2, 2), mask)
    assert torch.equal(mixed[0], slots[0] + slots[3])
    assert (mixed[1] == 0).all()


def test_combine_of_no_tokens() -> None:
    assert combine(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 2, 3)


def test_combine_gradient() -> None:
    slots = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    token_slot, mask = torch.tensor([[3, 0], [1, 5], [2, 4]]), torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(lambda s, w: combine(s, token_slot, w, mask), (slots, weights))


@pytest.mark.parametrize("gated", [True, False])
def test_gated_rms_norm(gated: bool) -> None:
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    gate = torch.randn(3, 2, 5, dtype=torch.float64) if gated else None
    expected = torch.empty_like(x)
    for t in range(3):
        for h in range(2):
            expected[t, h] = weight * x[t, h] / (x[t, h].pow(2).sum() / 5 + 0.1).sqrt()
            if gate is not None:
                expected[t, h] *= gate[t, h] / (1 + (-gate[t, h]).exp())
    assert_close(gated_rms_norm(x, weight, gate, 0.1), expected)


def test_gated_rms_norm_keeps_the_precision_of_its_input() -> None:
    x = torch.randn(3, 2, 5)
    y = gated_rms_norm(x, torch.ones(5).bfloat16(), torch.randn(3, 2, 5).bfloat16(), 1e-6)
    assert y.dtype == torch.float32


def test_gated_rms_norm_of_nothing_is_nothing() -> None:
    """An unrouted token: zero, with finite gradients."""
    x = torch.zeros(2, 1, 4, requires_grad=True)
    y = gated_rms_norm(x, torch.ones(4), None, 1e-6)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_l2_normalize(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 3, 6, generator=generator(0), dtype=torch.float64) * 100).to(dtype)
    x[0, 0] = 0
    y = l2_normalize(x)
    wide = x.double()
    expected = wide / (wide.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == dtype
    # in at least float32, so that only the last rounding is the dtype's: squares of 300 overflow float16
    assert_close(y.double(), expected, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)
    assert (y[0, 0] == 0).all()


def test_l2_normalize_gradient_at_zero() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert x.grad.isfinite().all()


def test_activate() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert torch.equal(activate(x, "none"), x)
    assert_close(activate(x, "silu"), x / (1 + (-x).exp()))
    assert_close(activate(x, "tanh"), (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()))
    assert_close(activate(x, "sigmoid"), 1 / (1 + (-x).exp()))
    with pytest.raises(ValueError, match=r"activation = 'relu'; allowed: none, silu, tanh, sigmoid"):
        activate(x, "relu")
