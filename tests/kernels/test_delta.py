"""The delta kernels under Triton's interpreter, held to the rules' step in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from momkit.kernels.available import interpreting
from momkit.scan import as_mechanism, run
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import delta, tuning
from momkit.kernels.delta import delta_scan


@dataclass
class Case:
    """Inputs by name, bounds of the segments, initial state; rows past the last segment are a tail."""

    inputs: dict[str, Tensor]
    cu_seqlens: Tensor
    initial_state: Tensor | None

    @property
    def scale(self) -> float:
        return self.inputs["q"].shape[-1] ** -0.5

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs["q"].dtype

    def leaves(self, wide: bool) -> dict[str, Tensor]:
        every = self.inputs if self.initial_state is None else {**self.inputs, "initial_state": self.initial_state}
        return {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in every.items()}


def make(lengths, H=1, G=1, K=16, V=16, gates="token", dtype=torch.float32, tail=0, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    T, N = sum(lengths) + tail, len(lengths)
    inputs = {"q": randn(T, G, K), "k": normalize(randn(T, G, K), dim=-1), "v": randn(T, H, V)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["beta"] = randn(T, H).sigmoid()
    if gates is not None:
        inputs["g"] = -0.1 * randn(*((T, H) if gates == "token" else (H,))).exp()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Case(inputs, cu_seqlens, randn(N, H, K, V))


def sprinkle(tensor: Tensor, values: tuple[float, ...], share: float = 0.1) -> None:
    """Some entries of a tensor replaced, each value as often."""
    generator = torch.Generator().manual_seed(3)
    for value in values:
        tensor[torch.rand(tensor.shape, generator=generator) < share] = value


def results(outputs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], parts: str) -> dict[str, Tensor]:
    return results_of(dict(zip(("output", "final_state"), outputs, strict=True)), leaves, parts.split())


def reference(case: Case, wide: bool, parts: str) -> dict[str, Tensor]:
    leaves = case.leaves(wide)
    inputs = {name: x for name, x in leaves.items() if name != "initial_state"}
    rule = as_mechanism("gated_deltanet" if "g" in inputs else "deltanet")
    if "g" in inputs and inputs["g"].ndim == 1:
        inputs["g"] = inputs["g"].expand(inputs["v"].shape[:2])
    state = None if case.initial_state is None else {"S": leaves["initial_state"]}
    out = run(rule, inputs, case.cu_seqlens, initial_state=state, backend="reference")
    return results((out.output, out.final_state["S"]), leaves, parts)


def kernels(case: Case, parts: str = "output final_state") -> dict[str, Tensor]:
    x = case.leaves(wide=False)
    start = x.get("initial_state")
    outputs = delta_scan(x["q"], x["k"], x["v"], x.get("g"), x["beta"], case.cu_seqlens, start, case.scale)
    return results(outputs, x, parts)


def assert_right(case: Case, parts: str = "output final_state") -> None:
    """Outputs and all gradients: as good as the step in the same dtype."""
    found, truth, eager = kernels(case, parts), reference(case, True, parts), reference(case, False, parts)
    assert_all_as_good(found, eager, truth, case.dtype)


RAGGED = (0, 1, 63, 64, 65, 130)


@pytest.mark.parametrize("gates", ["token", "head", None])
def test_ragged_segments(gates):
    assert_right(make(RAGGED, H=2, G=1, K=20, V=48, gates=gates, tail=3))


@pytest.mark.parametrize("K, V", [(32, 20), (70, 100), (130, 200)])
def test_float16(K, V):
    assert_right(make((70, 0, 1, 64), H=2, G=2, K=K, V=V, dtype=torch.float16))


def test_tiles_of_a_wide_state():
    assert_right(make((40,), K=130, V=70))


@pytest.mark.parametrize("parts", ["output", "final_state"])
def test_gradient_of_one_result(parts):
    assert_right(make((5, 40)), parts)


@pytest.mark.parametrize("parts", ["output", "output final_state"])
def test_without_an_initial_state(parts):
    case = make((5, 0, 70), H=2, tail=2)
    case.initial_state = None
    assert_right(case, parts)


def test_extreme_gates_and_strengths():
    case = make((1, 70, 40), H=2, G=2, K=16, V=20)
    sprinkle(case.inputs["g"], (0.0, -1e-3, -50.0, -1e4, -torch.inf))
    sprinkle(case.inputs["beta"], (0.0, 1.0), 0.2)
    assert_right(case)


def test_one_key_over_and_over():
    case = make((100,), K=16, V=16, gates=None)
    case.inputs["k"][:] = 1.4 * case.inputs["k"][0]
    sprinkle(case.inputs["beta"], (0.0, 1.0), 0.3)
    assert_right(case)


# without its gates, the inverse of a chunk's system would overflow
def test_long_keys_that_gates_tame():
    case = make((70,), K=16, V=16)
    case.inputs["k"][:] = 5 * case.inputs["k"][0]
    case.inputs["g"] -= 6
    assert_right(case)


@pytest.mark.parametrize("lengths, tail", [((), 0), ((), 5), ((0, 0), 0), ((0, 3), 4)])
def test_nothing_or_little_to_do(lengths, tail):
    assert_right(make(lengths, tail=tail))


def test_uncovered_rows_are_zeros_whatever_they_hold():
    case = make((3, 40), tail=70)
    for x in case.inputs.values():
        x[43:] = torch.nan
    found = kernels(case)
    for name in ("output", *(f"gradient of {name}" for name in case.inputs)):
        assert_equal(found[name][43:], torch.zeros_like(found[name][43:]), name)
        assert found[name].isfinite().all(), name


def test_every_element_is_written():
    case = make((0, 1, 70), H=2, G=1, tail=3)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(delta, "SHORTEST_PIECE", 64)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 1 << 20)


@pytest.mark.parametrize("gates", ["token", None])
def test_split_segments(short_pieces, gates):
    assert_right(make((0, 64, 300, 65, 130), H=2, G=1, K=20, V=36, gates=gates, tail=3))


def test_split_segments_without_an_initial_state(short_pieces):
    case = make((200, 0, 70), K=20, V=36)
    case.initial_state = None
    assert_right(case, "output")


def test_split_segments_write_every_element(short_pieces):
    case = make((3, 200, 70), tail=3)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_split_at_a_reset(short_pieces):
    case = make((260,))
    sprinkle(case.inputs["g"], (-50.0, -1e4, -torch.inf), 0.01)
    case.inputs["g"][64] = case.inputs["g"][127] = -torch.inf
    assert_right(case)


def test_some_heads_at_a_time(monkeypatch):
    case = make((70, 3), H=4, G=2)
    expected = kernels(case)
    monkeypatch.setattr(delta, "WORKSPACE", 0)
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_queries_may_be_the_keys():
    case = make((40, 3), H=2, G=2)
    k, rest = case.inputs["k"], [case.inputs[name] for name in ("v", "g", "beta")]
    for found, expected in zip(
        delta_scan(k, k, *rest, case.cu_seqlens, case.initial_state, 1.0),
        delta_scan(k.clone(), k, *rest, case.cu_seqlens, case.initial_state, 1.0),
        strict=True,
    ):
        assert_equal(found, expected, "with one tensor for both")


def test_gradients_of_gates_that_let_nothing_or_next_to_nothing_pass():
    """Nothing that does not pass a gate is added to its gradient and taken away again."""
    case = make((64,), K=16, V=16)
    case.inputs["g"] = torch.full((64, 1), -1e-3)
    case.inputs["g"][20], case.inputs["g"][40] = -17.0, -torch.inf
    found, truth = (x["gradient of g"] for x in (kernels(case), reference(case, True, "output final_state")))
    assert found[40] == 0
    assert abs(found[20] / truth[20] - 1) < 1e-3


def test_large_gradients_in_float16():
    """A loss scale of 1024: what is multiplied in 16 bits must not pass 65504."""
    case = make((64,), K=128, V=128, gates=None, dtype=torch.float16)
    leaves = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
    scale = 128**-0.5
    q, k, v, beta = (leaves[name] for name in ("q", "k", "v", "beta"))
    output, _ = delta_scan(q, k, v, None, beta, case.cu_seqlens, None, scale)
    gradient = torch.autograd.grad(output, q, 1024 * v.detach().sign())[0]
    assert gradient.isfinite().all()


def test_views_are_as_good_as_copies():
    case = make((40,), H=2, G=2)
    expected = kernels(case)
    case.inputs = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in case.inputs.items()}
    case.cu_seqlens = case.cu_seqlens.int()
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.mark.parametrize("gates, start", [("token", True), ("head", True), (None, True), ("token", False)])
def test_opcheck(gates, start):
    x = make((2, 0, 5), H=2, G=1, gates=gates, tail=1).leaves(wide=False)
    cu_seqlens = torch.tensor([0, 2, 2, 7])
    arguments = (x["q"], x["k"], x["v"], x.get("g"), x["beta"], cu_seqlens, x["initial_state"] if start else None, 0.5)
    torch.library.opcheck(torch.ops.momkit.delta_scan.default, arguments)
    inputs = tuple(tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in arguments[:-1])
    output, final_state, *found = torch.ops.momkit.delta_scan(*inputs, 0.5)
    d_outputs = torch.ones_like(output), torch.ones_like(final_state) if start else None
    torch.library.opcheck(torch.ops.momkit.delta_scan_backward.default, (*inputs, *found, *d_outputs, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_settings_of_small_gpus(monkeypatch, dtype):
    """The other half of the table, which an interpreter would not take by itself."""
    monkeypatch.setattr(tuning, "gpu_class", lambda device: "small")
    tuning.config.cache_clear()
    try:
        assert_right(make((3, 70), K=20, V=36, dtype=dtype))
    finally:
        tuning.config.cache_clear()
