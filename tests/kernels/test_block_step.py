"""The kernels of one decoding step under Triton's interpreter, held to float64: `TRITON_INTERPRET=1 pytest`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit import MoMSpec, ops
from momkit.errors import InputError
from momkit.mechanisms.triton_scan import interpreting
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import FLOOR, assert_all_as_good, assert_as_good, assert_equal, error

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import step_linear as linear
from momkit.kernels.decode import decode_rows
from momkit.kernels.step_conv import ACTIVATIONS, step_conv
from momkit.kernels.step_linear import step_linear

DTYPES = [torch.float32, torch.float16]


def random(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def distinct_ids(B: int, J: int, M: int, seed: int = 0) -> Tensor:
    """`[B, J]` memories, no memory twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, M, generator=generator).argsort(1)[:, :J].contiguous()


# linear


def linear_case(B, M, N, D, dtype) -> tuple[Tensor, Tensor]:
    randn = random()
    return randn(B, D).to(dtype), (randn(M, N, D) / D**0.5).to(dtype)


def linear_reference(x: Tensor, weight: Tensor, memory_ids: Tensor | None) -> Tensor:
    if memory_ids is None:
        return x @ weight[0].T
    return (weight[memory_ids] @ x[:, None, :, None])[..., 0].flatten(0, 1)


def assert_linear(x: Tensor, weight: Tensor, memory_ids: Tensor | None) -> None:
    truth = linear_reference(x.double(), weight.double(), memory_ids)
    eager = linear_reference(x, weight, memory_ids)
    assert_as_good(step_linear(x, weight, memory_ids, False), eager, truth, "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, J, M", [(0, 2, 3), (1, 1, 1), (1, 3, 5), (5, 3, 4), (40, 2, 3), (150, 2, 3)])
def test_linear(B, J, M, dtype):
    assert_linear(*linear_case(B, M, 40, 36, dtype), distinct_ids(B, J, M))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [0, 1, 20, 70])
def test_linear_for_all_rows(B, dtype):
    assert_linear(*linear_case(B, 1, 20, 150, dtype), None)


@pytest.mark.parametrize("rows", linear.TILES)
@pytest.mark.parametrize("collapsed", [True, False])
def test_linear_with_every_tile(rows, collapsed, monkeypatch):
    monkeypatch.setattr(linear, "TILES", {2**31: linear.TILES[rows]})
    ids = distinct_ids(270, 1, 3)
    assert_linear(*linear_case(270, 3, 70, 40, torch.float32), torch.ones_like(ids) if collapsed else ids)


def test_wide_results_of_narrow_inputs():
    x, weight = linear_case(3, 4, 20, 100, torch.float16)
    ids = distinct_ids(3, 2, 4)
    y = step_linear(x, weight, ids, True)
    assert y.dtype == torch.float32
    truth = linear_reference(x.double(), weight.double(), ids)
    assert error(y, truth) <= FLOOR[torch.float32]


@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(0, 20),
    M=st.integers(1, 5),
    share=st.floats(0, 1),
    N=st.integers(1, 40),
    D=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_any_linear(B, M, share, N, D, dtype):
    assert_linear(*linear_case(B, M, N, D, dtype), distinct_ids(B, max(1, round(share * M)), M))


def test_linear_of_views_and_poisoned_memory():
    x, weight = linear_case(5, 4, 36, 20, torch.float32)
    ids = distinct_ids(5, 2, 4)
    expected = step_linear(x, weight, ids, False)
    with poisoned_empty():
        found = step_linear(
            x.t().contiguous().t(), torch.stack([weight] * 2, -1)[..., 0], ids.t().contiguous().t(), False
        )
    assert_equal(found, expected, "y")


# convolution, activation, norm


def conv_case(
    B=3, J=2, M=4, heads=2, size=20, W=4, dtype=torch.float32, shared=False, bias=True, reads=True, history=None
) -> dict[str, Tensor | None]:
    randn, width = random(), heads * size
    groups = 1 if shared else M
    return {
        "x": randn(B if shared else B * J, width).to(dtype),
        "bias": randn(groups, width).to(dtype) if bias else None,
        "weight": (randn(width, W) / 2).to(dtype) if W else None,
        "conv_bias": randn(width).to(dtype) if W and bias else None,
        "history": randn(B, M, W - 1, width).to(history or dtype) if W else None,
        "memory_ids": distinct_ids(B, J, M),
        "writes": randn(B, J) > 0 if reads else None,
    }


def conv_reference(case, activation, norm_size) -> dict[str, Tensor]:
    """The torch forms of a block's projections, every slot a segment of its own."""
    x, bias, weight, conv_bias, history, ids, writes = case.values()
    S, J = ids.numel(), ids.shape[1]
    rows, memory = torch.arange(S) // max(1, J), ids.flatten()
    value = x if len(x) == S else x[rows]
    if bias is not None:
        value = value + (bias if len(bias) == 1 else bias[memory])
    new = {}
    if weight is not None:
        bounds, segment = torch.arange(S + 1), torch.arange(S)
        windows = ops.Windows.of(bounds, segment, None if writes is None else writes.flatten(), weight.shape[1])
        value, kept = ops.short_conv(value, weight, conv_bias, history[rows, memory], windows)
        new["history"] = history.clone()
        new["history"][rows, memory] = kept
    value = ops.activate(value, activation)
    if norm_size:
        value = ops.l2_normalize(value.unflatten(-1, (-1, norm_size))).flatten(-2)
    return {"y": value, **new}


def conv_found(case, activation, norm_size) -> dict[str, Tensor]:
    history = None if case["history"] is None else case["history"].clone()
    y = step_conv(**(case | {"history": history}), activation=activation, norm_size=norm_size)
    return {"y": y} if history is None else {"y": y, "history": history}


def assert_conv(case, activation="silu", norm_size=0) -> None:
    wide = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in case.items()}
    truth = conv_reference(wide, activation, norm_size)
    eager = conv_reference(case, activation, norm_size)
    found = conv_found(case, activation, norm_size)
    assert_all_as_good(found, eager, truth, case["x"].dtype)
    if "history" in found:
        # what moves moves bitwise, and what a slot does not touch stays
        touched = torch.zeros(case["history"].shape[:2], dtype=torch.bool)
        writes = case["writes"] if case["writes"] is not None else torch.ones_like(case["memory_ids"], dtype=torch.bool)
        touched.scatter_(1, case["memory_ids"], writes)
        assert_equal(found["history"][~touched], case["history"][~touched], "untouched history")
        moved, before = found["history"][touched][:, :-1], case["history"][touched][:, 1:]
        assert_equal(moved, before, "moved history")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_conv(dtype, shared, bias, reads):
    assert_conv(conv_case(dtype=dtype, shared=shared, bias=bias, reads=reads), norm_size=20)


@pytest.mark.parametrize("W", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_widths_of_the_convolution(W, activation):
    assert_conv(conv_case(W=W), activation)


@pytest.mark.parametrize("heads, size", [(1, 1), (3, 16), (5, 33), (1, 300), (1, 600)])
@pytest.mark.parametrize("norm", [True, False])
def test_sizes_of_heads(heads, size, norm):
    assert_conv(conv_case(heads=heads, size=size), norm_size=size if norm else 0)


@pytest.mark.parametrize("B, J, M", [(0, 2, 3), (1, 1, 1), (1, 3, 3), (9, 1, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_batches(B, J, M, shared):
    assert_conv(conv_case(B, J, M, shared=shared))


def test_a_bias_counts_as_the_history_keeps_it():
    case = conv_case(dtype=torch.float16, shared=True)
    found, expected = (conv_found(c, "none", 0) for c in (case, case | {"x": case["x"] + case["bias"], "bias": None}))
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_history_wider_than_inputs():
    assert_conv(conv_case(dtype=torch.float16, history=torch.float32))


def test_a_row_of_zeros_has_no_direction():
    case = conv_case(bias=False)
    case["x"].zero_(), case["history"].zero_()
    y = conv_found(case, "silu", 20)["y"]
    assert_equal(y, torch.zeros_like(y), "y")


def test_columns_of_a_wide_projection_and_poisoned_memory():
    case = conv_case()
    expected = conv_found(case, "silu", 20)
    wide = torch.cat([torch.full((6, 3), torch.nan), case["x"], torch.full((6, 5), torch.nan)], 1)
    for x in (wide[:, 3:43], case["x"].t().contiguous().t()):
        with poisoned_empty():
            found = conv_found(case | {"x": x}, "silu", 20)
        for name, value in expected.items():
            assert_equal(found[name], value, name)


def test_a_history_may_lie_memory_by_memory():
    case = conv_case()
    other = case | {"history": case["history"].transpose(0, 1).contiguous().transpose(0, 1)}
    expected = step_conv(**case, activation="silu", norm_size=0)
    assert torch.equal(step_conv(**other, activation="silu", norm_size=0), expected)
    assert torch.equal(other["history"], case["history"])


def test_wrong_arguments_are_named():
    case = conv_case()
    with pytest.raises(InputError, match="activation = 'relu'; allowed: none, silu"):
        step_conv(**case, activation="relu", norm_size=0)
    for wrong in (
        case["history"][:, :, 1:],
        case["history"][1:],
        case["history"].transpose(2, 3).contiguous().transpose(2, 3),
    ):
        with pytest.raises(InputError, match="history has shape"):
            step_conv(**(case | {"history": wrong}), activation="silu", norm_size=0)
    with pytest.raises(InputError, match="one of weight and history"):
        step_conv(**(case | {"history": None}), activation="silu", norm_size=0)


# a whole step


def test_steps_of_a_block():
    """The kernels in a row, as a decoding step has them."""
    torch.manual_seed(0)
    mechanism = {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 12}
    block = MoMSpec(hidden_size=20, num_memories=3, mechanism=mechanism).build()
    wide = MoMSpec(hidden_size=20, num_memories=3, mechanism=mechanism).build().double()
    wide.load_state_dict(block.state_dict())
    B, M = 3, 4
    state, truth = block.initial_state(B), wide.initial_state(B)
    for _ in range(5):
        x = torch.randn(B, 20)
        expected = wide.step(x.double(), truth)
        routing = block.route(x, None)
        ids = torch.nn.functional.pad(routing.memory_ids, (0, 1), value=3)
        project, J = block.project, ids.shape[1]
        parts = dict(zip("q", step_linear(x, project.shared_weight[None], None, False).split([24], 1), strict=True))
        per_slot = step_linear(x, project.memory_weight, ids, False).split([24, 24, 2, 2], 1)
        parts |= dict(zip(("k", "v", "beta", "dt"), per_slot, strict=True))
        projected = {
            p.name: step_conv(
                parts[p.name], None, getattr(project, f"{p.name}_conv_weight") if p.conv else None, None,
                state.conv[p.name] if p.conv else None, ids, None, p.activation, p.shape[-1] if p.l2 else 0,
            ).view(-1, *p.shape)
            for p in project.order
        }  # fmt: skip
        r = block.mechanism.prepare(projected)
        state_index = (torch.arange(B)[:, None] * M + ids).flatten()
        pool = state.recurrent["S"].flatten(0, 1)
        slots = decode_rows(
            r["q"], r["k"], r["v"], r["g"], None, None, r["beta"], None, None, None, pool, state_index,
            12**-0.5, False, False,
        )  # fmt: skip
        y = block.output(slots, torch.arange(B * J).view(B, J), routing.weights, None, x)
        assert error(y, expected.hidden_states) <= FLOOR[torch.float32]
        assert error(state.recurrent["S"], truth.recurrent["S"]) <= FLOOR[torch.float32]
        for name in truth.conv:
            assert error(state.conv[name], truth.conv[name]) <= FLOOR[torch.float32], name


@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(shared):
    x, weight = linear_case(3, 4, 20, 36, torch.float32)
    ids = distinct_ids(3, 2, 4)
    arguments = (x, weight[:1], None, True) if shared else (x, weight, ids, False)
    torch.library.opcheck(torch.ops.momkit.step_linear.default, arguments)
    for W in (0, 4):
        case = conv_case(shared=shared, bias=not shared, reads=not shared, W=W)
        torch.library.opcheck(torch.ops.momkit.step_conv.default, (*case.values(), "tanh", 20))
