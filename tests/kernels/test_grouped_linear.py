"""The grouped linear map, forward and backward, under Triton's interpreter: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit import ops
from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import grouped_linear as module
from momkit.kernels.grouped_linear import aligned, grouped_linear, uses_grouped_mm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Case:
    """x and weight; bounds of the groups; the token of each row and the rows of each token, or None."""

    x: Tensor
    weight: Tensor
    offsets: Tensor
    source: Tensor | None = None
    token_slot: Tensor | None = None

    def results(self, wide: bool, kernels: bool) -> dict[str, Tensor]:
        leaves = {"x": self.x, "weight": self.weight}
        leaves = {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in leaves.items()}
        x, weight = leaves["x"], leaves["weight"]
        if kernels:
            y = grouped_linear(x, weight, self.offsets, self.source, self.token_slot)
        else:
            y = ops.grouped_linear(x if self.source is None else x[self.source], weight, self.offsets)
        return results_of({"y": y}, leaves, ["y"])


def make(sizes, D=20, N=36, J=0, tail=0, dtype=torch.float32) -> Case:
    """sizes: rows of each group. J: rows of a token, in any order; 0 where each row reads its own token."""
    generator = torch.Generator().manual_seed(0)
    R = sum(sizes) + tail
    T = R // J if J else R
    x = torch.randn(T, D, generator=generator).to(dtype)
    weight = (torch.randn(len(sizes), N, D, generator=generator) / D**0.5).to(dtype)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    if not J:
        return Case(x, weight, offsets)
    assert R == T * J
    token_slot = torch.randperm(R, generator=generator)
    source = torch.empty_like(token_slot)
    source[token_slot] = torch.arange(R) // J
    return Case(x, weight, offsets, source, token_slot.view(T, J))


def assert_right(case: Case) -> None:
    """As good as torch in the same dtype, by the same in float64."""
    found, eager, truth = case.results(False, True), case.results(False, False), case.results(True, False)
    assert_all_as_good(found, eager, truth, case.x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_groups(dtype):
    assert_right(make((0, 1, 130, 0, 64, 5, 0), dtype=dtype, tail=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_share_tokens(dtype):
    assert_right(make((40, 0, 133, 10), J=3, tail=6, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, N", [(1, 1), (130, 24), (24, 130), (128, 64)])
def test_widths(D, N, dtype):
    assert_right(make((17, 2), D=D, N=N, J=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("J", [0, 2])
@pytest.mark.parametrize("sizes, tail", [((0,), 0), ((0, 0), 4), ((1, 1), 0), ((2, 0), 2)])
def test_nothing_or_little_to_do(sizes, tail, J, dtype):
    assert_right(make(sizes, J=J, tail=tail, dtype=dtype))


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    J=st.integers(0, 4),
    D=st.integers(1, 70),
    N=st.integers(1, 70),
    tail=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_any_groups(sizes, J, D, N, tail, dtype):
    assert_right(make(sizes, D, N, J, tail + -(sum(sizes) + tail) % max(1, J), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("J", [0, 1])
def test_rows_of_no_group_are_zeros_whatever_they_hold(J, dtype):
    case = make((3, 70), J=J, tail=70, dtype=dtype)
    outside = slice(73, None) if case.source is None else case.source[73:]
    case.x[outside] = torch.nan
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    y = grouped_linear(x, weight, case.offsets, case.source, case.token_slot)
    assert_equal(y[73:], torch.zeros_like(y[73:]), "y")
    d_y = torch.ones_like(y).index_fill(0, torch.arange(73, 143), torch.nan)
    dx, d_weight = torch.autograd.grad(y, (x, weight), d_y)
    assert_equal(dx[outside], torch.zeros_like(dx[outside]), "dx")
    for name, found in {"y": y, "dx": dx, "d_weight": d_weight}.items():
        assert found.isfinite().all(), name


@pytest.mark.parametrize("J", [0, 1])
def test_what_grouped_mm_leaves_undefined(J, monkeypatch):
    def grouped_mm(a, b, offs):
        y = torch.nn.functional.grouped_mm(a, b, offs=offs)
        empty = offs.diff(prepend=offs.new_zeros(1)) == 0
        return y.index_fill(0, torch.arange(int(offs[-1]), len(y)) if y.ndim == 2 else empty.nonzero()[:, 0], torch.nan)

    case = make((0, 5, 0, 8), J=J, tail=3, dtype=torch.bfloat16)
    expected = case.results(False, True)
    monkeypatch.setattr(module, "grouped_mm", grouped_mm)
    for name, found in case.results(False, True).items():
        assert_equal(found, expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("J", [0, 3])
def test_every_element_is_written(J, dtype):
    case = make((0, 70, 16), J=J, tail=7, dtype=dtype)
    expected = case.results(False, True)
    with poisoned_empty():
        found = case.results(False, True)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_as_good_as_copies(dtype):
    case = make((5, 13), J=2, D=16, N=8, dtype=dtype)
    expected = case.results(False, True)
    # every second element of larger tensors, and addresses that are no multiple of 16 bytes
    apart = replace(case, x=torch.stack([case.x] * 2, -1)[..., 0], offsets=case.offsets.int())
    flat = torch.cat([case.weight.new_zeros(1), case.weight.flatten()])
    shifted = replace(case, weight=flat[1:].view(case.weight.shape), source=torch.stack([case.source] * 2, -1)[:, 0])
    for other in (apart, shifted):
        x, weight = other.x.detach().requires_grad_(), other.weight.detach().requires_grad_()
        y = grouped_linear(x, weight, other.offsets, other.source, other.token_slot)
        for name, value in results_of({"y": y}, {"x": x, "weight": weight}, ["y"]).items():
            assert_equal(value, expected[name], name)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient(wanted):
    case = make((5, 13), J=2)
    expected = case.results(False, True)[f"gradient of {wanted}"]
    leaves = {"x": case.x, "weight": case.weight}
    leaf = leaves[wanted].requires_grad_()
    y = grouped_linear(case.x, case.weight, case.offsets, case.source, case.token_slot)
    found = results_of({"y": y}, {wanted: leaf}, ["y"])
    assert_equal(found[f"gradient of {wanted}"], expected, wanted)


def test_what_grouped_mm_takes():
    weight = torch.arange(1, 31).bfloat16().view(2, 3, 5)
    filled = aligned(weight)
    assert filled.shape == (2, 8, 8) and filled.sum() == weight.sum()
    assert_equal(filled[:, :3, :5], weight, "filled up")
    shifted = torch.arange(129).bfloat16()[1:].view(16, 8)
    assert shifted.data_ptr() % 16 and not aligned(shifted).data_ptr() % 16
    assert_equal(aligned(shifted), shifted, "moved")


def test_which_form_runs():
    cpu = torch.device("cpu")
    assert [uses_grouped_mm(dtype, cpu) for dtype in DTYPES] == [False, False, True]


def test_wrong_arguments_are_named():
    case = make((5, 13), J=2)
    arguments = {name: getattr(case, name) for name in ("x", "weight", "offsets", "source", "token_slot")}
    wrong = [
        ({"x": case.x[:, 1:]}, r"x, weight have shapes \(9, 19\)"),
        ({"x": case.x.half()}, "x is torch.float16, weight is torch.float32"),
        ({"x": case.x.double(), "weight": case.weight.double()}, "x is torch.float64"),
        ({"offsets": case.offsets[1:]}, r"offsets has shape \(2,\); allowed: \[M \+ 1\] = \[3\]"),
        ({"source": None}, "source and token_slot"),
        ({"token_slot": None}, "source and token_slot"),
        ({"token_slot": case.token_slot[1:]}, "source, token_slot have shapes"),
        ({"source": case.source[1:]}, "source, token_slot have shapes"),
    ]
    for changed, message in wrong:
        with pytest.raises(InputError, match=message):
            grouped_linear(**(arguments | changed))


@pytest.mark.parametrize("J, dtype", [(0, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_opcheck(J, dtype):
    case = make((2, 0, 5), J=J, tail=1, D=8, N=4, dtype=dtype)
    rest = (case.offsets, case.source, case.token_slot)
    inputs = (case.x.requires_grad_(), case.weight.requires_grad_())
    torch.library.opcheck(torch.ops.momkit.grouped_linear.default, (*inputs, *rest))
    plain = [tensor.detach() for tensor in inputs]
    y = torch.ops.momkit.grouped_linear(*plain, *rest)
    for wanted in ((True, True), (False, True)):
        arguments = (torch.ones_like(y), *plain, *rest, *wanted)
        torch.library.opcheck(torch.ops.momkit.grouped_linear_backward.default, arguments)
