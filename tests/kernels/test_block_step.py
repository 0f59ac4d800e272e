"""The kernels of one decoding step under Triton's interpreter, held to float64: `TRITON_INTERPRET=1 pytest`."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit import MoMSpec, MoMState, ops
from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import FLOOR, assert_all_as_good, assert_as_good, assert_equal, error

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import step_conv as conv
from momkit.kernels import step_linear as linear
from momkit.kernels.launch import launch
from momkit.kernels.short_conv import ACTIVATIONS, Part
from momkit.kernels.step_conv import convolve_parts, step_conv
from momkit.kernels.step_linear import step_linear

DTYPES = [torch.float32, torch.float16]


def random(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def distinct_ids(B: int, J: int, M: int, seed: int = 0) -> Tensor:
    """`[B, J]` memories, no memory twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, M, generator=generator).argsort(1)[:, :J].contiguous()


def all_ids(memory_ids: Tensor, shared_id: int | None) -> Tensor:
    """Those of a router, and the shared memory's."""
    return memory_ids if shared_id is None else torch.nn.functional.pad(memory_ids, (0, 1), value=shared_id)


# linear


def linear_case(B, D, shapes, dtype) -> tuple[Tensor, list[Tensor]]:
    randn = random()
    return randn(B, D).to(dtype), [(randn(*shape, D) / D**0.5).to(dtype) for shape in shapes]


def linear_reference(x: Tensor, weights: list[Tensor], memory_ids: Tensor, shared_id: int | None) -> list[Tensor]:
    ids = all_ids(memory_ids, shared_id)
    return [x @ w.T if w.ndim == 2 else (w[ids] @ x[:, None, :, None])[..., 0] for w in weights]


def assert_linear(x: Tensor, weights: list[Tensor], memory_ids: Tensor, shared_id: int | None = None) -> None:
    truth = linear_reference(x.double(), [w.double() for w in weights], memory_ids, shared_id)
    eager = linear_reference(x, weights, memory_ids, shared_id)
    found = step_linear(x, weights, memory_ids, shared_id)
    assert len(found) == len(truth)
    for i, y in enumerate(found):
        assert_as_good(y, eager[i], truth[i], f"y of weight {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("B, J, M", [(0, 2, 3), (1, 1, 1), (1, 3, 5), (5, 3, 4), (40, 2, 3), (150, 2, 3)])
def test_linear(B, J, M, shared, dtype):
    shapes = [(40,), (M + shared, 36), (20,)]
    assert_linear(*linear_case(B, 36, shapes, dtype), distinct_ids(B, J, M), M if shared else None)


@pytest.mark.parametrize("shapes", [[], [(20,)], [(4, 20)], [(3, 20), (4, 17), (1,)]])
def test_numbers_of_weights(shapes):
    assert_linear(*linear_case(7, 150, shapes, torch.float32), distinct_ids(7, 2, 3))


def test_the_shared_memory_alone():
    assert_linear(*linear_case(7, 40, [(4, 20)], torch.float32), torch.zeros(7, 0, dtype=torch.long), 3)


@pytest.mark.parametrize("rows", linear.TILES)
@pytest.mark.parametrize("collapsed", [True, False])
def test_linear_with_every_tile(rows, collapsed, monkeypatch):
    monkeypatch.setattr(linear, "TILES", {2**31: linear.TILES[rows]})
    ids = distinct_ids(270, 1, 3)
    case = linear_case(270, 40, [(3, 70), (70,)], torch.float32)
    assert_linear(*case, torch.ones_like(ids) if collapsed else ids)


@settings(max_examples=10, deadline=None)
@given(
    B=st.integers(0, 20),
    M=st.integers(1, 5),
    share=st.floats(0, 1),
    shared=st.booleans(),
    N=st.integers(1, 40),
    D=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_any_linear(B, M, share, shared, N, D, dtype):
    ids = distinct_ids(B, max(1, round(share * M)), M)
    assert_linear(*linear_case(B, D, [(M + shared, N)], dtype), ids, M if shared else None)


def test_linear_of_views_and_poisoned_memory():
    x, weights = linear_case(5, 20, [(4, 36), (36,)], torch.float32)
    ids = distinct_ids(5, 2, 3)
    expected = step_linear(x, weights, ids, 3)
    with poisoned_empty():
        views = [torch.stack([weight] * 2, -1)[..., 0] for weight in weights]
        found = step_linear(x.t().contiguous().t(), views, ids.t().contiguous().t(), 3)
    for y, wanted in zip(found, expected, strict=True):
        assert_equal(y, wanted, "y")


# convolution, activation, norm


def conv_part(
    M=4, P=3, heads=2, size=20, W=4, dtype=torch.float32, shared=False, bias=True, history=None, seed=0, act="silu",
    norm=False,
) -> Part:  # fmt: skip
    """shared: a bias for all memories."""
    randn, width = random(seed), heads * size
    return Part(
        width,
        randn(1 if shared else M, width).to(dtype) if bias else None,
        (randn(width, W) / 2).to(dtype) if W else None,
        randn(width).to(dtype) if W and bias else None,
        randn(P * M, W - 1, width).to(history or dtype) if W else None,
        act,
        size if norm else 0,
    )


def conv_case(
    parts: list[Part], B=3, J=2, M=4, dtype=torch.float32, shared=False, reads=True, shared_id=None, state_index=None,
    by_memory=False, P=3,
) -> dict[str, Any]:  # fmt: skip
    """shared: values that all slots of a row read."""
    randn = random(1)
    slots = J + (shared_id is not None)
    return {
        "values": [randn(*((B,) if shared else (B, slots)), part.width).to(dtype) for part in parts],
        "parts": parts,
        "memory_ids": distinct_ids(B, J, M - (shared_id is not None)),
        "shared_id": shared_id,
        "writes": randn(B, J) > 0 if reads else None,
        "state_index": None if state_index is None else torch.tensor(state_index),
        "sequence_stride": 1 if by_memory else M,
        "memory_stride": P if by_memory else 1,
    }


def slot_rows(case) -> tuple[Tensor, Tensor, Tensor]:
    """Pool row, -1 at padding, memory, and whether it writes, of each slot."""
    ids, index, writes = all_ids(case["memory_ids"], case["shared_id"]), case["state_index"], case["writes"]
    sequence = torch.arange(len(ids)) if index is None else index.long()
    rows = sequence[:, None] * case["sequence_stride"] + ids * case["memory_stride"]
    rows = torch.where(sequence[:, None] < 0, -1, rows).flatten()
    if writes is None:
        writes = torch.ones_like(case["memory_ids"], dtype=torch.bool)
    if case["shared_id"] is not None:
        writes = torch.nn.functional.pad(writes, (0, 1), value=True)
    return rows, ids.flatten(), writes.flatten() & (rows >= 0)


def conv_reference(value: Tensor, part: Part, case) -> dict[str, Tensor]:
    """The torch forms of a block's projections, every slot a segment of its own."""
    rows, memory, writes = slot_rows(case)
    S, J = len(rows), all_ids(case["memory_ids"], case["shared_id"]).shape[1]
    value = value.flatten(0, 1) if value.ndim == 3 else value.repeat_interleave(J, 0)
    if part.bias is not None:
        value = value + (part.bias if len(part.bias) == 1 else part.bias[memory])
    new = {}
    if part.weight is not None:
        windows = ops.Windows.of(torch.arange(S + 1), torch.arange(S), writes, part.weight.shape[1])
        value, kept = ops.short_conv(value, part.weight, part.conv_bias, part.history[rows.clamp_min(0)], windows)
        new["history"] = part.history.clone()
        new["history"][rows[writes]] = kept[writes].to(part.history.dtype)
    value = ops.activate(value, part.activation)
    if part.norm_size:
        value = ops.l2_normalize(value.unflatten(-1, (-1, part.norm_size))).flatten(-2)
    return {"y": value.masked_fill((rows < 0)[:, None], 0), **new}


def conv_found(case) -> list[dict[str, Tensor]]:
    parts = [part._replace(history=None if part.history is None else part.history.clone()) for part in case["parts"]]
    ys, rows, token_slot = step_conv(**(case | {"parts": parts}))
    ids = all_ids(case["memory_ids"], case["shared_id"])
    assert_equal(rows, slot_rows(case)[0], "rows")
    assert_equal(token_slot, torch.arange(ids.numel()).view(ids.shape), "token_slot")
    return [{"y": y} if p.history is None else {"y": y, "history": p.history} for y, p in zip(ys, parts, strict=True)]


def wide(part: Part) -> Part:
    return Part(*(x.double() if isinstance(x, Tensor) else x for x in part))


def assert_conv(case) -> None:
    rows, _, writes = slot_rows(case)
    for found, value, part in zip(conv_found(case), case["values"], case["parts"], strict=True):
        truth, eager = conv_reference(value.double(), wide(part), case), conv_reference(value, part, case)
        assert_all_as_good(found, eager, truth, value.dtype)
        assert torch.equal(found["y"][rows < 0], torch.zeros_like(found["y"][rows < 0]))
        if part.history is not None:
            # what moves moves bitwise, and what a slot does not touch stays
            touched = torch.zeros(len(part.history), dtype=torch.bool)
            touched[rows[writes]] = True
            assert_equal(found["history"][~touched], part.history[~touched], "untouched history")
            assert_equal(found["history"][touched][:, :-1], part.history[touched][:, 1:], "moved history")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_conv(dtype, shared, bias, reads):
    part = conv_part(dtype=dtype, shared=shared, bias=bias, norm=True)
    assert_conv(conv_case([part], dtype=dtype, shared=shared, reads=reads))


@pytest.mark.parametrize("W", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_widths_of_the_convolution(W, activation):
    assert_conv(conv_case([conv_part(W=W, act=activation)]))


@pytest.mark.parametrize("heads, size", [(1, 1), (3, 16), (5, 33), (1, 300), (1, 600)])
@pytest.mark.parametrize("norm", [True, False])
def test_sizes_of_heads(heads, size, norm):
    assert_conv(conv_case([conv_part(heads=heads, size=size, norm=norm)]))


def test_parts_of_all_kinds_side_by_side():
    parts = [
        conv_part(heads=2, size=20, norm=True, seed=1),
        conv_part(heads=3, size=5, W=0, act="sigmoid", seed=2),
        conv_part(heads=1, size=300, W=2, bias=False, act="tanh", seed=3),
        conv_part(heads=1, size=4, W=0, bias=False, act="none", seed=4),
        conv_part(heads=5, size=33, W=4, shared=True, norm=True, seed=5),
    ]
    case = conv_case(parts)
    for i in (0, 2):
        case["values"][i] = case["values"][i][:, 0].contiguous()
    assert_conv(case)


@pytest.mark.parametrize("B, J, M", [(0, 2, 3), (1, 1, 1), (1, 3, 3), (9, 1, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_batches(B, J, M, shared):
    assert_conv(conv_case([conv_part(M, B, bias=not shared)], B, J, M, shared=shared, P=B))


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("J", [0, 2])
def test_a_shared_memory_is_one_choice_more_and_writes(reads, J):
    assert_conv(conv_case([conv_part(M=4)], J=J, M=4, reads=reads, shared_id=3))


@pytest.mark.parametrize("state_index", [[2, 4, 0], [-1, 3, -1], [-1, -1, -1]])
@pytest.mark.parametrize("by_memory", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_a_larger_pool_and_padding(state_index, by_memory, shared):
    case = conv_case(
        [conv_part(P=5), conv_part(W=0, seed=1)], P=5, state_index=state_index, by_memory=by_memory, shared=shared,
        shared_id=3,
    )  # fmt: skip
    for value in case["values"]:
        value[case["state_index"] < 0] = torch.nan
    for dtype in (torch.int32, torch.int64):
        assert_conv(case | {"state_index": case["state_index"].to(dtype)})


def test_a_bias_counts_as_the_history_keeps_it():
    part = conv_part(dtype=torch.float16, shared=True, act="none")
    case = conv_case([part], dtype=torch.float16)
    plain = case | {"values": [case["values"][0] + part.bias], "parts": [part._replace(bias=None)]}
    (found,), (expected,) = conv_found(case), conv_found(plain)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_history_wider_than_inputs():
    assert_conv(conv_case([conv_part(dtype=torch.float16, history=torch.float32)], dtype=torch.float16))


def test_a_row_of_zeros_has_no_direction():
    case = conv_case([conv_part(bias=False, norm=True)])
    case["values"][0].zero_(), case["parts"][0].history.zero_()
    y = conv_found(case)[0]["y"]
    assert_equal(y, torch.zeros_like(y), "y")


def test_columns_of_a_wide_projection_and_poisoned_memory():
    case = conv_case([conv_part(norm=True)])
    expected, value = conv_found(case)[0], case["values"][0]
    nan = torch.full((3, 2, 3), torch.nan)
    for x in (torch.cat([nan, value, nan], 2)[..., 3:43], value.transpose(0, 2).contiguous().transpose(0, 2)):
        with poisoned_empty():
            found = conv_found(case | {"values": [x]})[0]
        for name, wanted in expected.items():
            assert_equal(found[name], wanted, name)


def test_wrong_arguments_are_named():
    part = conv_part()
    case = conv_case([part])
    with pytest.raises(InputError, match="activation = 'relu'; allowed: none, silu"):
        step_conv(**(case | {"parts": [part._replace(activation="relu")]}))
    history = part.history
    for wrong in (history[:, 1:], history[..., :-1], history.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(InputError, match="history has shape"):
            step_conv(**(case | {"parts": [part._replace(history=wrong)]}))
    with pytest.raises(InputError, match="one of weight and history"):
        step_conv(**(case | {"parts": [part._replace(history=None)]}))


# a whole step


LAYERS = [
    {},
    {"shared_memory": False},
    {"output_gate": False, "conv_size": None},
    {"router": "read_write"},
    {"mechanism": {"kind": "mamba"}},
    {"mechanism": {"kind": "rwkv7", "num_heads": 2, "head_dim": 8}},
]


@pytest.mark.parametrize("fields, by_memory", [({}, False), *((fields, True) for fields in LAYERS)])
def test_steps_of_a_block(fields, by_memory):
    """From a pool of sequences, with padding rows, held to float64 in plain torch."""
    torch.manual_seed(0)
    mechanism = {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 8}
    spec = MoMSpec(hidden_size=16, num_memories=3, **({"mechanism": mechanism} | fields))
    block, exact = spec.build(), spec.build().double()
    exact.load_state_dict(block.state_dict())
    truth = exact(torch.randn(5, 4, 16).double()).state.detach()
    state = MoMState(*({n: t.float() for n, t in part.items()} for part in (truth.recurrent, truth.conv)))
    # `float` keeps strides, which are those of a forward pass, memory by memory
    state = state if by_memory else state.select(torch.arange(5))
    for index in (None, [4, 0, -1], [-1, -1]):
        rows = None if index is None else torch.tensor(index)
        x = torch.randn(5 if index is None else len(index), 16)
        if index == [4, 0, -1]:
            x[2] = torch.nan
        expected, before = exact.step(x.double(), truth, rows), state.clone()
        found = block.step(x, state, rows)
        assert error(found.hidden_states, expected.hidden_states) <= FLOOR[torch.float32]
        assert torch.equal(found.routing.memory_ids, expected.routing.memory_ids)
        for part in ("recurrent", "conv"):
            for name, tensor in getattr(truth, part).items():
                assert error(getattr(state, part)[name], tensor) <= FLOOR[torch.float32], name
                if rows is not None:
                    idle = [s for s in range(5) if s not in index]
                    assert_equal(getattr(state, part)[name][idle], getattr(before, part)[name][idle], name)
                    y = found.hidden_states[rows < 0]
                    assert_equal(y, torch.zeros_like(y), "padding")


def test_steps_on_a_state_of_any_layout():
    torch.manual_seed(0)
    block = MoMSpec(hidden_size=8, num_memories=3).build()
    state, x = block.initial_state(2), torch.randn(2, 8)
    strided = state._map(lambda t: torch.stack([t, t], -1)[..., 0])
    assert not any(t.is_contiguous() for t in strided.conv.values())
    expected, found = block.step(x, state), block.step(x, strided)
    assert_equal(found.hidden_states, expected.hidden_states, "y")
    for name, tensor in (state.recurrent | state.conv).items():
        assert_equal((strided.recurrent | strided.conv)[name], tensor, name)


def test_a_step_is_a_few_launches(monkeypatch):
    launched = []

    def counting(kernel, *arguments, **options):
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    for module in (linear, conv):
        monkeypatch.setattr(module, "launch", counting)
    block = MoMSpec(hidden_size=20).build()
    block.step(torch.randn(2, 20), block.initial_state(2))
    assert launched == ["step_linear_kernel", "step_conv_kernel"]


def test_opcheck_linear():
    arguments = (*linear_case(3, 36, [(20,), (4, 20)], torch.float32), distinct_ids(3, 2, 3), 3)
    torch.library.opcheck(torch.ops.momkit.step_linear.default, arguments)


@pytest.mark.parametrize("pooled", [True, False])
def test_opcheck_conv(pooled, monkeypatch):
    parts = [conv_part(bias=pooled, P=5, norm=True), conv_part(W=0, bias=not pooled, seed=1)]
    case = conv_case(parts, shared_id=3, P=5, reads=pooled, state_index=[2, -1, 0] if pooled else None)
    calls = []
    monkeypatch.setattr(conv, "convolve_parts", lambda *arguments: calls.append(arguments))
    step_conv(**case)
    *arguments, ys, rows, token_slot = calls[0]
    # opcheck compares what is in them
    outputs = ([torch.zeros_like(y) for y in ys], torch.zeros_like(rows), torch.zeros_like(token_slot))
    torch.library.opcheck(convolve_parts, (*arguments, *outputs))
