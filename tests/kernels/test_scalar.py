"""The scalar kernels under Triton's interpreter, held to the rules' step in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from momkit.kernels.available import interpreting
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.mechanisms.mamba2 import Mamba2Spec
from momkit.scan import as_mechanism, run
from momkit.testing.oracle import gradients_of, results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import FLOOR, assert_all_as_good, assert_equal, error

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import scalar_decay, tuning
from momkit.kernels.scalar_decay import scalar_scan


@dataclass
class Case:
    """Leaves by name, S0 (the initial state, if there is one) among them; bounds of the segments; rows past the last
    segment are a tail."""

    leaves: dict[str, Tensor]
    cu_seqlens: Tensor
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["q"].dtype

    def fresh(self, wide: bool) -> dict[str, Tensor]:
        return {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in self.leaves.items()}


def make(
    lengths, H=2, G=1, K=20, V=36, gates="token", dtype=torch.float32, tail=0, scale=0.3, state=True, decay=0.1
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    T, N = sum(lengths) + tail, len(lengths)
    leaves = {"q": randn(T, G, K), "k": normalize(randn(T, G, K), dim=-1), "v": randn(T, H, V)}
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    if gates is not None:
        leaves["g"] = -decay * randn(*((T, H) if gates == "token" else (H,))).exp()
    if state:
        leaves["S0"] = randn(N, H, K, V)
    return Case(leaves, torch.tensor([0, *lengths]).cumsum(0), scale)


def with_extreme_gates(case: Case) -> Case:
    """A third of the gates replaced by ordinary, strong and endless forgetting."""
    g, generator = case.leaves["g"], torch.Generator().manual_seed(3)
    ends = torch.tensor([0.0, -1e-3, -50.0, -1e4, -torch.inf])
    picked = ends[torch.randint(len(ends), g.shape, generator=generator)]
    case.leaves["g"] = torch.where(torch.rand(g.shape, generator=generator) < 0.3, picked, g)
    return case


def results(outputs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], parts: str) -> dict[str, Tensor]:
    return results_of(dict(zip(("output", "final_state"), outputs, strict=True)), leaves, parts.split())


def reference(case: Case, wide: bool, parts: str) -> dict[str, Tensor]:
    leaves = case.fresh(wide)
    inputs = {name: x for name, x in leaves.items() if name != "S0"}
    spec = Mamba2Spec if "g" in inputs else LinearAttentionSpec
    if "g" in inputs:
        inputs["g"] = inputs["g"].expand(inputs["v"].shape[:2])
    state = {"S": leaves["S0"]} if "S0" in leaves else None
    rule = as_mechanism(spec(scale=case.scale))
    out = run(rule, inputs, case.cu_seqlens, initial_state=state, backend="reference")
    return results((out.output, out.final_state["S"]), leaves, parts)


def kernels(case: Case, parts: str = "output final_state") -> dict[str, Tensor]:
    x = case.fresh(wide=False)
    outputs = scalar_scan(x["q"], x["k"], x["v"], x.get("g"), case.cu_seqlens, x.get("S0"), case.scale)
    return results(outputs, x, parts)


def assert_right(case: Case, parts: str = "output final_state") -> None:
    """Outputs and all gradients: as good as the step in the same dtype."""
    found, truth, eager = kernels(case, parts), reference(case, True, parts), reference(case, False, parts)
    assert_all_as_good(found, eager, truth, case.dtype)


RAGGED = (0, 1, 63, 64, 65, 130)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 64 tokens, as if the GPU had room for all of them."""
    monkeypatch.setattr(scalar_decay, "SHORTEST_PIECE", 64)
    monkeypatch.setattr(scalar_decay, "multiprocessors", lambda device: 1 << 20)


@pytest.mark.parametrize("gates", ["token", "head", None])
def test_ragged_segments(gates):
    assert_right(make(RAGGED, gates=gates, tail=3))


@pytest.mark.parametrize("gates", ["token", None])
def test_float16(gates):
    assert_right(make((70, 0, 1, 64), K=36, V=20, gates=gates, dtype=torch.float16))


def test_two_heads_share_a_key_head():
    assert_right(make((3, 20), H=4, G=2, K=3, V=5))


def test_tiles_of_a_wide_state():
    assert_right(make((40,), H=1, G=1, K=130, V=70))


@pytest.mark.parametrize("parts", ["output", "final_state"])
def test_gradient_of_one_result(parts):
    assert_right(make((5, 40)), parts)


def test_no_initial_state(short_pieces):
    assert_right(make((0, 5, 130), state=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_gates(dtype):
    assert_right(with_extreme_gates(make((1, 70, 40), dtype=dtype)))


@pytest.mark.parametrize("gate", [0.0, -1e-3, -50.0, -1e4, -torch.inf])
def test_one_gate_throughout(gate):
    case = make((1, 70), H=1)
    case.leaves["g"][:] = gate
    assert_right(case)


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_any_scale(scale, short_pieces):
    assert_right(make((3, 70), H=1, scale=scale))


@pytest.mark.parametrize("lengths, tail", [((), 0), ((), 5), ((0, 0), 0), ((0, 3), 4)])
@pytest.mark.parametrize("gates", ["token", None])
def test_nothing_or_little_to_do(lengths, tail, gates):
    assert_right(make(lengths, tail=tail, gates=gates))


def test_uncovered_rows_are_zeros_whatever_they_hold():
    case = make((3, 40), tail=70)
    for name in "qkvg":
        case.leaves[name][43:] = torch.nan
    found = kernels(case)
    for name in ("output", *(f"gradient of {name}" for name in "qkvg")):
        assert_equal(found[name][43:], torch.zeros_like(found[name][43:]), name)
    for name, x in found.items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("gates", ["token", "head", None])
def test_split_segments(short_pieces, gates):
    # what one piece passes to the next should last
    assert_right(make((0, 64, 300, 65, 130), gates=gates, tail=3, decay=0.01))


def test_split_segments_with_extreme_gates(short_pieces):
    case = make((260, 70), H=1)
    case.leaves["g"][[5, 70, 200]] = torch.tensor([[-50.0], [-1e4], [-torch.inf]])
    # the first and the last token of a piece
    case.leaves["g"][64] = case.leaves["g"][127] = -torch.inf
    assert_right(case)


def test_every_element_is_written(short_pieces):
    case = make((0, 1, 200, 70), tail=3)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_views_are_as_good_as_copies():
    case = make((40,), G=2)
    expected = kernels(case)
    # every second element of larger tensors
    case.leaves = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.leaves.items()}
    case.cu_seqlens = case.cu_seqlens.int()
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


# a sum over all tokens, and over all that 16 bits round off
def test_gradient_of_a_constant_gate_in_float16():
    case = make((300,), gates="head", dtype=torch.float16, decay=0.03)
    found, truth = (
        results["gradient of g"] for results in (kernels(case), reference(case, True, "output final_state"))
    )
    assert error(found, truth) <= FLOOR[torch.float16]


@pytest.mark.parametrize("gates", ["token", None])
def test_opcheck(gates):
    case = make((2, 0, 5), gates=gates, tail=1, state=gates is not None)
    x = case.fresh(wide=False)
    ops = torch.ops.momkit
    arguments = (x["q"], x["k"], x["v"], x.get("g"), case.cu_seqlens, x.get("S0"))
    torch.library.opcheck(ops.scalar_scan.default, (*arguments, 0.5))
    plain = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in arguments]
    output, final_state, *saved = ops.scalar_scan(*plain, 0.5)
    gradients = torch.ones_like(output), torch.ones_like(final_state) if gates else None
    arguments = (*plain, *saved, *gradients, 0.5, gates is not None)
    torch.library.opcheck(ops.scalar_scan_backward.default, arguments)


def test_gradients_of_gates_add_up_over_many_tokens(monkeypatch):
    """What a bias of all gates gets as its gradient: what 16 bits round off adds up over a window, and no further."""
    monkeypatch.setattr(scalar_decay, "SHORTEST_PIECE", 2048)
    case = make((2048,), H=2, G=2, K=16, V=16, dtype=torch.float16, state=False, decay=0.01)
    weight = torch.randn(2048, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(backend, wide):
        leaves = case.fresh(wide)
        output = run(as_mechanism(Mamba2Spec()), dict(leaves), case.cu_seqlens, backend=backend).output
        return gradients_of((output.double() * weight).sum(), leaves)["g"].double()

    def off():
        return float(((gradient("triton", False) - truth).sum(0).abs() / truth.abs().sum(0)).max())

    truth, allowed = gradient("chunked", True), torch.finfo(torch.float16).eps / 8
    assert off() <= allowed
    monkeypatch.setattr(scalar_decay, "WINDOW", 16)
    assert off() > allowed


def test_windows_and_blocks_of_the_gradient_of_gates(monkeypatch):
    """More than a block of tokens in a segment, gates that forget all where blocks and windows meet, and a tail."""
    monkeypatch.setattr(scalar_decay, "SHORTEST_PIECE", 2048)
    case = make((1100, 0, 257, 1), H=1, K=16, V=16, tail=260, decay=0.01)
    case.leaves["g"][[255, 256, 511, 1023, 1024, 1100 + 256]] = -torch.inf
    assert_right(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_settings_of_small_gpus(monkeypatch, dtype):
    """The other half of the table, which an interpreter would not take by itself."""
    monkeypatch.setattr(tuning, "gpu_class", lambda device: "small")
    tuning.config.cache_clear()
    try:
        assert_right(make((3, 70), V=70, dtype=dtype))
    finally:
        tuning.config.cache_clear()
