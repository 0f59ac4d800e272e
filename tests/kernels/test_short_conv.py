"""Convolution, activation and norm in one op, held to the plain torch forms in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import InputError
from momkit.mechanisms.triton_scan import interpreting
from momkit.ops import Windows, activate, l2_normalize, short_conv
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels.short_conv import ACTIVATIONS, STRIP, conv_act_norm

few = settings(max_examples=20, deadline=None, database=None, derandomize=True)
# none, one, fewer than the convolution sees, more
lengths_of_segments = st.lists(st.sampled_from((0, 1, 2, 3, 4, 7, 40)), max_size=5)


@dataclass
class Case:
    """Leaves by name: x, weight, bias and history, each if there is one; how slots lie; what to compute."""

    leaves: dict[str, Tensor]
    cu_seqlens: Tensor
    segment: Tensor
    activation: str
    norm_size: int
    sources: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["x"].dtype

    def fresh(self, wide: bool) -> dict[str, Tensor]:
        return {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in self.leaves.items()}


def make(
    lengths, tail=0, width=6, W=4, activation="silu", norm_size=0, choices=None, bias=True, history=True,
    dtype=torch.float32, wide=False,
) -> Case:  # fmt: skip
    """choices: slots that read each row of x, None for one row a slot; W None: no convolution; wide: all but x is
    float32."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    sources = {}
    J, N, R = choices or 1, len(lengths), sum(lengths) + tail
    if choices:
        R += -R % J
        slots = torch.randperm(R, generator=generator)
        sources = {"source": torch.empty_like(slots), "token_slot": slots.view(-1, J)}
        sources["source"][slots] = torch.arange(R) // J
    leaves = {"x": randn(R // J, width)}
    if W:
        leaves["weight"] = 0.5 * randn(width, W)
        if history:
            leaves["history"] = randn(N, W - 1, width)
    if bias:
        leaves["bias"] = randn(width)
    leaves = {name: x if wide and name != "x" else x.to(dtype) for name, x in leaves.items()}
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    segment = torch.repeat_interleave(torch.arange(N + 1), torch.tensor([*lengths, R - sum(lengths)]))
    return Case(leaves, cu_seqlens, segment, activation, norm_size, sources)


def kernels(case: Case, parts=("y", "new_history")) -> dict[str, Tensor]:
    leaves = case.fresh(wide=False)
    y, new_history = conv_act_norm(
        leaves["x"],
        case.sources.get("source"),
        leaves.get("weight"),
        leaves.get("bias"),
        leaves.get("history"),
        case.cu_seqlens,
        case.segment,
        case.sources.get("token_slot"),
        case.activation,
        case.norm_size,
    )
    return results_of({"y": y, "new_history": new_history}, leaves, parts)


def torch_forms(case: Case, wide: bool, parts=("y", "new_history")) -> dict[str, Tensor]:
    leaves = case.fresh(wide)
    x, weight, bias = leaves["x"], leaves.get("weight"), leaves.get("bias")
    value = x.index_select(0, case.sources["source"]) if case.sources else x
    covered = case.segment < len(case.cu_seqlens) - 1
    # what uncovered rows hold is of no account
    value = torch.where(covered[:, None], value, 0.0)
    new_history = value.new_empty(0)
    if weight is not None:
        W = weight.shape[1]
        history = leaves.get("history", x.new_zeros(len(case.cu_seqlens) - 1, W - 1, x.shape[1]))
        windows = Windows.of(case.cu_seqlens, case.segment, None, W)
        value, new_history = short_conv(value, weight, bias, history, windows)
    elif bias is not None:
        value = value + bias
    value = activate(value, case.activation)
    if case.norm_size:
        value = l2_normalize(value.unflatten(1, (-1, case.norm_size))).flatten(1)
    y = torch.where(covered[:, None], value, 0.0)
    return results_of({"y": y, "new_history": new_history}, leaves, parts)


def assert_right(case: Case, parts=("y", "new_history")) -> None:
    """Outputs and all gradients: as good as the torch forms in the same dtype."""
    found = kernels(case, parts)
    assert_all_as_good(found, torch_forms(case, False, parts), torch_forms(case, True, parts), case.dtype)
    assert found["y"].dtype == case.dtype
    if "history" in case.leaves:
        assert found["new_history"].dtype == case.leaves["history"].dtype


@few
@given(
    lengths=lengths_of_segments,
    tail=st.integers(0, 5),
    W=st.sampled_from((1, 2, 3, 4)),
    choices=st.sampled_from((None, 1, 2, 3)),
    activation=st.sampled_from(ACTIVATIONS),
    norm_size=st.sampled_from((0, 2, 3)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
@example([0, 0], 0, 4, None, "silu", 0, torch.float32)
@example([], 0, 2, 1, "none", 0, torch.float32)
@example([], 3, 4, 2, "sigmoid", 2, torch.float32)
@example([1, 0, 2], 0, 4, None, "silu", 2, torch.float16)
def test_ragged_segments(lengths, tail, W, choices, activation, norm_size, dtype):
    assert_right(make(lengths, tail, W=W, choices=choices, activation=activation, norm_size=norm_size, dtype=dtype))


@pytest.mark.parametrize("choices", [None, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, choices):
    assert_right(make((3, 10), 2, activation=activation, choices=choices))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("choices, bias", [(None, False), (None, True), (3, False)])
def test_without_convolution(activation, choices, bias):
    assert_right(make((3, 0, 10), 3, W=None, bias=bias, activation=activation, choices=choices, norm_size=3))


# one head a block and several, padded or not, more than one block; no heads, and a last block that is not full
@pytest.mark.parametrize(
    "width, norm_size", [(60, 20), (192, 64), (160, 20), (5, 1), (200, 200), (512, 256), (140, 0), (1, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads(width, norm_size, dtype):
    assert_right(make((3, 10), 1, width=width, norm_size=norm_size, dtype=dtype))


@pytest.mark.parametrize("W", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("choices", [None, 2])
def test_widths_of_the_convolution(W, choices):
    assert_right(make((1, 3, 0, 12), 2, W=W, choices=choices))


@pytest.mark.parametrize("options", [{"bias": False}, {"history": False}, {"bias": False, "W": 1}])
def test_what_may_be_left_out(options):
    assert_right(make((2, 9), 1, **options))


@pytest.mark.parametrize("parts", [("y",), ("new_history",)])
@pytest.mark.parametrize("choices", [None, 2])
def test_gradient_of_one_result(parts, choices):
    assert_right(make((0, 2, 9), 1, choices=choices), parts)


def test_weights_and_history_wider_than_x():
    assert_right(make((0, 2, 9), 1, dtype=torch.float16, wide=True))


@pytest.mark.parametrize("width, norm_size", [(1, 0), (6, 2), (140, 0)])
def test_gradients_of_parameters_over_many_rows(width, norm_size):
    assert_right(make((2 * STRIP + 3, 1, STRIP - 4), 7, width=width, norm_size=norm_size))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 100.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_and_large_values(activation, scale):
    """A rounding that grows in the norm of what is nearly zero would show."""
    case = make((2, 20), activation=activation, norm_size=3, bias=False)
    case.leaves["x"] *= scale
    case.leaves["history"] *= scale
    assert_right(case, ("y",))


@pytest.mark.parametrize("choices", [None, 2])
@pytest.mark.parametrize("W", [None, 4])
def test_uncovered_rows_are_zeros_whatever_they_hold(W, choices):
    case = make((3, 5), tail=6, W=W, choices=choices, activation="sigmoid", norm_size=3)
    covered = case.segment < 2
    if choices:
        # tokens whose slots are all uncovered
        case.sources["token_slot"] = torch.arange(14).view(7, 2)
        case.sources["source"] = torch.arange(14) // 2
    lost = slice(4, None) if choices else ~covered
    expected = kernels(case)
    case.leaves["x"][lost] = torch.nan
    found = kernels(case)
    assert_equal(found["y"][8:], torch.zeros_like(found["y"][8:]), "y")
    assert_equal(found["gradient of x"][lost], torch.zeros_like(found["gradient of x"][lost]), "gradient of x")
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_rows_past_the_last_segment_are_uncovered_whatever_they_say():
    case = make((3, 5), tail=4, activation="sigmoid")
    expected = kernels(case)
    case.segment[8:] = 1
    for name, x in kernels(case).items():
        assert_equal(x, expected[name], name)


def test_a_slice_of_a_wide_projection_is_not_copied():
    case = make((2, 9), width=8)
    expected = kernels(case)
    wide = torch.full((11, 24), torch.nan)
    wide[:, 8:16] = case.leaves["x"]
    leaves = {name: x.clone() for name, x in case.leaves.items()} | {"x": wide[:, 8:16]}
    y, new_history = conv_act_norm(
        leaves["x"], None, leaves["weight"], leaves["bias"], leaves["history"], case.cu_seqlens.int(), case.segment,
        None, "silu", 0,
    )  # fmt: skip
    assert_equal(y, expected["y"], "y")
    assert_equal(new_history, expected["new_history"], "new_history")


def test_every_layout_of_inputs():
    case = make((2, 9), width=8)
    expected = kernels(case)
    case.fresh = lambda wide: {
        name: torch.stack([x, x], -1)[..., 0].requires_grad_() for name, x in case.leaves.items()
    }
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.mark.parametrize("options", [{"choices": 2, "norm_size": 3}, {"W": None, "norm_size": 3}, {}])
def test_every_element_is_written(options):
    case = make((0, 1, 140, 3), tail=5, **options)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_a_cut_segment_goes_on_from_its_history():
    case = make((9,), norm_size=3)
    whole = kernels(case)
    leaves, history, seen = case.leaves, case.leaves["history"], []
    for part in leaves["x"].split([1, 2, 6]):
        cu_seqlens, segment = torch.tensor([0, len(part)]), torch.zeros(len(part), dtype=torch.long)
        y, history = conv_act_norm(
            part, None, leaves["weight"], leaves["bias"], history, cu_seqlens, segment, None, "silu", 3
        )
        seen.append(y)
    assert_equal(torch.cat(seen), whole["y"], "y")
    assert_equal(history, whole["new_history"], "new_history")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"activation": "gelu"}, "activation = 'gelu'; allowed: none, silu, tanh, sigmoid"),
        ({"norm_size": 4}, "norm_size = 4; allowed: 0 and divisors of the width 6"),
        ({"source": torch.zeros(3, dtype=torch.long)}, "source and token_slot belong together"),
        ({"x": torch.zeros(2, 6)}, "x has 2 rows; allowed without source: one for each of 3 slots"),
        ({"weight": None}, "weight is None; allowed: a history of a convolution only"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    arguments = {
        "x": torch.zeros(3, 6),
        "source": None,
        "weight": torch.zeros(6, 4),
        "bias": None,
        "history": torch.zeros(1, 3, 6),
        "cu_seqlens": torch.tensor([0, 3]),
        "segment": torch.zeros(3, dtype=torch.long),
        "token_slot": None,
        "activation": "silu",
        "norm_size": 0,
    }
    with pytest.raises(InputError, match=message):
        conv_act_norm(**arguments | wrong)


@pytest.mark.parametrize("options", [{"choices": 2, "norm_size": 3}, {"W": None, "bias": False}, {"W": 1}])
def test_opcheck(options):
    case = make((2, 0, 5), tail=1, **options)
    ops, leaves = torch.ops.momkit, case.fresh(wide=False)

    def arguments(leaves):
        return (
            leaves["x"], case.sources.get("source"), *map(leaves.get, ("weight", "bias", "history")), case.cu_seqlens,
            case.segment, case.sources.get("token_slot"),
        )  # fmt: skip

    how = case.activation, case.norm_size
    torch.library.opcheck(ops.conv_act_norm.default, (*arguments(leaves), *how))
    plain = arguments(case.leaves)
    gradients = [torch.ones_like(x) for x in ops.conv_act_norm(*plain, *how)]
    torch.library.opcheck(ops.conv_act_norm_backward.default, (*plain, *gradients, *how))
