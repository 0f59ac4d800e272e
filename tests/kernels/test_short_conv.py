"""Convolution, activation and norm in one op, held to the plain torch forms in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass, field
from itertools import accumulate
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.ops import Windows, activate, l2_normalize, short_conv
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import short_conv as kernel
from momkit.kernels.short_conv import ACTIVATIONS, BACKWARD_STRIP, Part, conv_act_norm, pack

few = settings(max_examples=20, deadline=None, database=None, derandomize=True)
# none, one, fewer than the convolution sees, more
lengths_of_segments = st.lists(st.sampled_from((0, 1, 2, 3, 4, 7, 40)), max_size=5)
TENSORS = "bias", "weight", "conv_bias", "history"


@dataclass
class Case:
    """Leaves by name: x, and the tensors of part i, `weight0`, each if there is one; how slots lie; what to compute."""

    leaves: dict[str, Tensor]
    parts: list[Part]
    cu_seqlens: Tensor
    segment: Tensor
    sources: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["x"].dtype

    def fresh(self, wide: bool) -> dict[str, Tensor]:
        return {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in self.leaves.items()}

    def with_tensors(self, leaves: dict[str, Tensor]) -> list[Part]:
        return [
            part._replace(**{name: leaves.get(f"{name}{i}") for name in TENSORS}) for i, part in enumerate(self.parts)
        ]


def make(
    lengths, tail=0, *more, width=6, W=4, activation="silu", norm_size=0, memories=0, conv_bias=True, history=True,
    choices=None, dtype=torch.float32, wide=False,
) -> Case:  # fmt: skip
    """A part with these options, and further ones with theirs. choices: slots that read each row of x, None for one row
    a slot; W None: no convolution; memories: rows of a bias; wide: all but x is float32."""
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
    options = {
        "width": width, "W": W, "activation": activation, "norm_size": norm_size, "memories": memories,
        "conv_bias": conv_bias, "history": history,
    }  # fmt: skip
    every = [
        options | {"memories": 0, "norm_size": 0} | other
        for other in ({"memories": memories, "norm_size": norm_size}, *more)
    ]
    leaves = {"x": randn(R // J, sum(part["width"] for part in every))}
    for i, part in enumerate(every):
        width, W = part["width"], part["W"]
        if part["memories"]:
            leaves[f"bias{i}"] = randn(part["memories"], width)
        if W:
            leaves[f"weight{i}"] = 0.5 * randn(width, W)
            if part["history"]:
                leaves[f"history{i}"] = randn(N, W - 1, width)
            if part["conv_bias"]:
                leaves[f"conv_bias{i}"] = randn(width)
    leaves = {name: x if wide and name != "x" else x.to(dtype) for name, x in leaves.items()}
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    segment = torch.repeat_interleave(torch.arange(N + 1), torch.tensor([*lengths, R - sum(lengths)]))
    parts = [Part(part["width"], activation=part["activation"], norm_size=part["norm_size"]) for part in every]
    return Case(leaves, parts, cu_seqlens, segment, sources)


def outputs(ys, histories) -> dict[str, Tensor]:
    found = {f"y{i}": y for i, y in enumerate(ys)}
    return found | {f"new_history{i}": x for i, x in enumerate(histories) if x is not None}


def kernels(case: Case, names=None) -> dict[str, Tensor]:
    """Outputs, and gradients of those named; all by default."""
    leaves = case.fresh(wide=False)
    found = conv_act_norm(
        leaves["x"], case.with_tensors(leaves), case.cu_seqlens, case.segment, **case.sources
    )  # fmt: skip
    found = outputs(*found)
    return results_of(found, leaves, tuple(found) if names is None else names)


def torch_forms(case: Case, wide: bool, names=None) -> dict[str, Tensor]:
    leaves = case.fresh(wide)
    x, N = leaves["x"], len(case.cu_seqlens) - 1
    rows = x.index_select(0, case.sources["source"]) if case.sources else x
    covered = case.segment < N
    # what uncovered rows hold is of no account
    rows = torch.where(covered[:, None], rows, 0.0)
    ys, histories = [], []
    parts = case.with_tensors(leaves)
    for part, value in zip(parts, rows.split([part.width for part in parts], 1), strict=True):
        new_history = None
        if part.bias is not None and N:
            memory = case.segment // (N // len(part.bias))
            value = value + part.bias.index_select(0, memory.clamp_max(len(part.bias) - 1))
        if part.weight is not None:
            W = part.weight.shape[1]
            history = x.new_zeros(N, W - 1, part.width) if part.history is None else part.history
            windows = Windows.of(case.cu_seqlens, case.segment, None, W)
            value, new_history = short_conv(value, part.weight, part.conv_bias, history, windows)
        value = activate(value, part.activation)
        if part.norm_size:
            value = l2_normalize(value.unflatten(1, (-1, part.norm_size))).flatten(1)
        ys.append(torch.where(covered[:, None], value, 0.0))
        histories.append(new_history)
    found = outputs(ys, histories)
    return results_of(found, leaves, tuple(found) if names is None else names)


def assert_right(case: Case, names=None) -> None:
    """Outputs and all gradients: as good as the torch forms in the same dtype."""
    found = kernels(case, names)
    assert_all_as_good(found, torch_forms(case, False, names), torch_forms(case, True, names), case.dtype)
    for i in range(len(case.parts)):
        assert found[f"y{i}"].dtype == case.dtype
        assert found[f"y{i}"].is_contiguous()
        if f"history{i}" in case.leaves:
            assert found[f"new_history{i}"].dtype == case.leaves[f"history{i}"].dtype


def strips_of(rows: int, lanes: int = 8):
    """Short strips; so few lanes that a program has one strip, or several."""
    return mock.patch.multiple(
        kernel, FORWARD_STRIP=rows, BACKWARD_STRIP=rows, FORWARD_LANES=lanes, BACKWARD_LANES=lanes
    )


@few
@given(
    lengths=lengths_of_segments,
    tail=st.integers(0, 5),
    W=st.sampled_from((1, 2, 3, 4)),
    choices=st.sampled_from((None, 1, 2, 3)),
    activation=st.sampled_from(ACTIVATIONS),
    norm_size=st.sampled_from((0, 2, 3)),
    strip=st.sampled_from((1, 8, 64)),
    lanes=st.sampled_from((8, 32)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
@example([0, 0], 0, 4, None, "silu", 0, 64, 8, torch.float32)
@example([], 0, 2, 1, "none", 0, 64, 32, torch.float32)
@example([], 3, 4, 2, "sigmoid", 2, 1, 8, torch.float32)
@example([1, 0, 2], 0, 4, None, "silu", 2, 64, 8, torch.float16)
def test_ragged_segments(lengths, tail, W, choices, activation, norm_size, strip, lanes, dtype):
    case = make(lengths, tail, W=W, choices=choices, activation=activation, norm_size=norm_size, dtype=dtype)
    with strips_of(strip, lanes):
        assert_right(case)


@pytest.mark.parametrize("choices", [None, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, choices):
    assert_right(make((3, 10), 2, activation=activation, choices=choices))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("choices, memories", [(None, 0), (None, 3), (3, 1)])
def test_without_convolution(activation, choices, memories):
    assert_right(make((3, 0, 10), 3, W=None, memories=memories, activation=activation, choices=choices, norm_size=3))


# as a block has them: unlike sizes, so that no part but the first is aligned; a copy between others
@pytest.mark.parametrize("choices", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_side_by_side(choices, dtype):
    more = (
        {"width": 8, "activation": "none", "W": 3, "conv_bias": False},
        {"width": 3, "activation": "none", "W": None},
        {"width": 5, "activation": "sigmoid", "W": None, "memories": 1},
        {"width": 20, "norm_size": 10, "W": 2, "history": False},
    )
    assert_right(make((3, 1, 0, 9), 2, *more, norm_size=3, choices=choices, dtype=dtype))


# one head a block and several, padded or not, more than one block; no heads, and a last block that is not full
@pytest.mark.parametrize(
    "width, norm_size", [(60, 20), (192, 64), (160, 20), (5, 1), (200, 200), (512, 256), (140, 0), (1, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads(width, norm_size, dtype):
    assert_right(make((3, 10), 1, width=width, norm_size=norm_size, dtype=dtype))


@pytest.mark.parametrize("width, norm_size", [(60, 20), (6, 2), (9, 0)])
def test_lanes_without_a_column_do_not_count(width, norm_size):
    assert_right(make((3, 10), 1, width=width, norm_size=norm_size, activation="sigmoid"))


@pytest.mark.parametrize("W", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("choices", [None, 2])
def test_widths_of_the_convolution(W, choices):
    """In strips that are shorter than what the convolution sees."""
    with strips_of(1):
        assert_right(make((1, 3, 0, 12), 2, W=W, choices=choices))


@pytest.mark.parametrize("options", [{"conv_bias": False}, {"history": False}, {"conv_bias": False, "W": 1}])
def test_what_may_be_left_out(options):
    assert_right(make((2, 9), 1, **options))


@pytest.mark.parametrize("W", [None, 1, 4])
@pytest.mark.parametrize("memories, choices", [(1, None), (1, 2), (2, None), (6, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_of_memories(W, memories, choices, dtype):
    assert_right(make((3, 1, 0, 9, 0, 5), 2, W=W, memories=memories, choices=choices, dtype=dtype))


@pytest.mark.parametrize("names", [("y0",), ("new_history0",), ("y1", "new_history0")])
@pytest.mark.parametrize("choices", [None, 2])
def test_gradient_of_some_results(names, choices):
    assert_right(make((0, 2, 9), 1, {"width": 3}, choices=choices), names)


def test_history_that_wants_no_gradient():
    case = make((0, 2, 9), 1, {"W": None})
    expected = kernels(case)
    leaves = case.fresh(wide=False)
    leaves["history0"].requires_grad_(False)
    found = outputs(*conv_act_norm(leaves["x"], case.with_tensors(leaves), case.cu_seqlens, case.segment))
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    for name, x in results_of(found, wanted, tuple(found)).items():
        assert_equal(x, expected[name], name)


def test_weights_and_history_wider_than_x():
    assert_right(make((0, 2, 9), 1, memories=1, dtype=torch.float16, wide=True))


def test_a_history_holds_inputs_with_their_bias_rounded():
    case = make((5, 2), width=6, memories=2, dtype=torch.float16, wide=True)
    found, kept = kernels(case)["new_history0"], case.leaves["bias0"].repeat_interleave(torch.tensor([5, 2]), 0)
    rows = (case.leaves["x"] + kept).half().float()
    assert_equal(found, torch.stack([rows[2:5], torch.cat([case.leaves["history0"][1, 2:], rows[5:]])]), "new_history")


@pytest.mark.parametrize("most", [2, 512])
@pytest.mark.parametrize("W", [3, 4])
@pytest.mark.parametrize("lanes", [8, 32])
def test_gradients_of_parameters_over_many_rows(W, lanes, most):
    """Strips within segments, groups of rows far from edges, strips that are longer so that they are not too many."""
    case = make((51, 1, 20), 7, W=W, norm_size=2, memories=3)
    with strips_of(12, lanes), mock.patch.object(kernel, "MOST_PROGRAMS", most):
        assert_right(case)


def test_strips_as_long_as_on_a_gpu():
    assert_right(make((2 * BACKWARD_STRIP + 3, 1, BACKWARD_STRIP - 4), 7, width=140, conv_bias=False))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 100.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_and_large_values(activation, scale):
    """A rounding that grows in the norm of what is nearly zero would show."""
    case = make((2, 20), activation=activation, norm_size=3, conv_bias=False)
    case.leaves["x"] *= scale
    case.leaves["history0"] *= scale
    assert_right(case, ("y0",))


@pytest.mark.parametrize("choices", [None, 2])
@pytest.mark.parametrize("W", [None, 1, 4])
def test_uncovered_rows_are_zeros_whatever_they_hold(W, choices):
    case = make((3, 5), tail=6, W=W, choices=choices, activation="sigmoid", norm_size=3, memories=1)
    covered = case.segment < 2
    if choices:
        # tokens whose slots are all uncovered
        case.sources["token_slot"] = torch.arange(14).view(7, 2)
        case.sources["source"] = torch.arange(14) // 2
    lost = slice(4, None) if choices else ~covered
    expected = kernels(case)
    case.leaves["x"][lost] = torch.nan
    found = kernels(case)
    assert_equal(found["y0"][8:], torch.zeros_like(found["y0"][8:]), "y")
    assert_equal(found["gradient of x"][lost], torch.zeros_like(found["gradient of x"][lost]), "gradient of x")
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_rows_past_the_last_segment_are_uncovered_whatever_they_say():
    case = make((3, 5), tail=4, activation="sigmoid")
    expected = kernels(case)
    case.segment[8:] = 1
    for name, x in kernels(case).items():
        assert_equal(x, expected[name], name)


def test_every_layout_of_inputs():
    case = make((2, 9), width=8, memories=1)
    expected = kernels(case)
    case.fresh = lambda wide: {
        name: torch.stack([x, x], -1)[..., 0].requires_grad_() for name, x in case.leaves.items()
    }
    case.cu_seqlens = case.cu_seqlens.int()
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_a_slice_of_a_wider_tensor_is_not_copied():
    case = make((2, 9), 0, {"width": 3}, width=8)
    expected = outputs(*conv_act_norm(case.leaves["x"], case.with_tensors(case.leaves), case.cu_seqlens, case.segment))
    wide = torch.full((11, 24), torch.nan)
    wide[:, 8:19] = case.leaves["x"]
    with mock.patch.object(Tensor, "contiguous", lambda x: x):
        found = conv_act_norm(wide[:, 8:19], case.with_tensors(case.leaves), case.cu_seqlens, case.segment)
    for name, x in outputs(*found).items():
        assert_equal(x, expected[name], name)


@pytest.mark.parametrize("options", [{"choices": 2, "norm_size": 3}, {"W": None, "norm_size": 3}, {}])
def test_every_element_is_written(options):
    case = make((0, 1, 140, 3), 5, {"width": 3, "W": None}, memories=1, **options)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.mark.parametrize("strip", [3, 64])
def test_a_cut_segment_goes_on_from_its_history(strip):
    case = make((9,), 0, {"width": 3, "W": 2}, norm_size=3, memories=1)
    whole = kernels(case)
    leaves, seen = dict(case.leaves), []
    with strips_of(strip):
        for rows in leaves["x"].split([1, 2, 6]):
            cu_seqlens, segment = torch.tensor([0, len(rows)]), torch.zeros(len(rows), dtype=torch.long)
            ys, histories = conv_act_norm(rows, case.with_tensors(leaves), cu_seqlens, segment)
            leaves |= {f"history{i}": x for i, x in enumerate(histories)}
            seen.append(ys)
    for i, ys in enumerate(zip(*seen, strict=True)):
        assert_equal(torch.cat(ys), whole[f"y{i}"], f"y{i}")
        assert_equal(leaves[f"history{i}"], whole[f"new_history{i}"], f"new_history{i}")


@pytest.mark.parametrize(
    "part, more, message",
    [
        ({"activation": "gelu"}, {}, "activation = 'gelu'; allowed: none, silu, tanh, sigmoid"),
        ({"norm_size": 4}, {}, "norm_size = 4; allowed: 0 and divisors of the width 6"),
        ({"width": 5}, {}, r"parts have widths \[5\]; allowed: 6 columns in all"),
        ({}, {"source": torch.zeros(3, dtype=torch.long)}, "source and token_slot belong together"),
        ({}, {"x": torch.zeros(2, 6)}, "x has 2 rows; allowed without source: one for each of 3 slots"),
        ({"weight": None}, {}, "weight is None; allowed: those of a convolution only"),
        ({"bias": torch.zeros(2, 6)}, {}, "bias has 2 rows; allowed: 1 and numbers that divide the 1 segments"),
        (
            {"bias": torch.zeros(2, 6)},
            {"source": torch.zeros(3, dtype=torch.long), "token_slot": torch.zeros(3, 1, dtype=torch.long)},
            "bias has 2 rows; allowed with a source: 1",
        ),
    ],
)
def test_wrong_arguments_are_named(part, more, message):
    right = Part(6, weight=torch.zeros(6, 4), history=torch.zeros(1, 3, 6), activation="silu")
    arguments = {
        "x": torch.zeros(3, 6),
        "parts": [right._replace(**part)],
        "cu_seqlens": torch.tensor([0, 3]),
        "segment": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(InputError, match=message):
        conv_act_norm(**arguments | more)


@pytest.mark.parametrize("options", [{"choices": 2, "norm_size": 3}, {"W": None}, {"W": 1, "memories": 3}])
def test_opcheck(options):
    case = make((2, 0, 5), 1, {"width": 3, "W": None}, **options)
    ops, leaves = torch.ops.momkit, case.fresh(wide=False)

    def arguments(leaves):
        tensors, layout = pack(case.with_tensors(leaves))
        where = (case.sources.get("source"), case.sources.get("token_slot"), case.cu_seqlens, case.segment)
        return (leaves["x"], tensors, *where), layout

    given, layout = arguments(leaves)
    torch.library.opcheck(ops.conv_act_norm.default, (*given, layout))
    given, layout = arguments(case.leaves)
    gradients = [torch.ones_like(x) for x in ops.conv_act_norm(*given, layout)]
    for wants_history in (False, True):
        torch.library.opcheck(ops.conv_act_norm_backward.default, (*given, gradients, layout, wants_history))
