"""The channel kernels under Triton's interpreter, held to the rules' step in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.mechanisms.base import Affine, Structure
from momkit.testing.oracle import affine_steps, results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_close, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import channel_decay
from momkit.kernels.channel_decay import channel_scan


@dataclass
class Case:
    """Leaves by name: q k v, gk or gv, u where reads come before writes, S0 if there is an initial state. Rows past the
    last segment are a tail."""

    leaves: dict[str, Tensor]
    cu_seqlens: Tensor
    scale: float
    before: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["q"].dtype

    @property
    def gates(self) -> Tensor:
        return self.leaves["gk" if "gk" in self.leaves else "gv"]

    def fresh(self, wide: bool) -> dict[str, Tensor]:
        return {name: (x.double() if wide else x.detach()).requires_grad_() for name, x in self.leaves.items()}


def make(
    lengths, H=2, G=1, K=12, V=20, gates="gk", before=False, dtype=torch.float32, tail=0, scale=0.3, state=True,
    decay=0.1,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    T, N = sum(lengths) + tail, len(lengths)
    leaves = {"q": randn(T, G, K), "k": normalize(randn(T, G, K), dim=-1), "v": randn(T, H, V)}
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    leaves[gates] = -decay * randn(*((T, G, K) if gates == "gk" else (T, H, V))).exp()
    if before and gates == "gk":
        leaves["u"] = randn(H, K)
    if state:
        leaves["S0"] = randn(N, H, K, V)
    return Case(leaves, torch.tensor([0, *lengths]).cumsum(0), scale, before)


def with_extreme_gates(case: Case) -> Case:
    """A third of the gates replaced by ordinary, strong and endless forgetting."""
    generator = torch.Generator().manual_seed(3)
    ends = torch.tensor([0.0, -1e-3, -50.0, -1e4, -torch.inf])
    picked = ends[torch.randint(len(ends), case.gates.shape, generator=generator)]
    case.gates.copy_(torch.where(torch.rand(case.gates.shape, generator=generator) < 0.3, picked, case.gates))
    return case


def results(outputs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], parts: str) -> dict[str, Tensor]:
    return results_of(dict(zip(("output", "final_state"), outputs, strict=True)), leaves, parts.split())


def reference(case: Case, wide: bool, parts: str) -> dict[str, Tensor]:
    """The affine step that rules declare, segment by segment."""
    x = case.fresh(wide)
    structure = Structure("key" if "gk" in x else "value", read="before" if case.before else "after")
    dtype, (T, H, V), K = torch.float64 if wide else torch.float32, x["v"].shape, x["k"].shape[-1]
    token = {name: x[name].to(dtype) for name in ("q", "k", "v", "gk", "gv") if name in x}
    start = x.get("S0", torch.zeros(len(case.cu_seqlens) - 1, H, K, V, dtype=dtype))
    bounds = case.cu_seqlens.tolist()
    outputs, finals = [x["v"].new_zeros(T - bounds[-1], H, V)], []
    for n, (begin, end) in reversed([*enumerate(pairwise(bounds))]):
        inputs = Affine(**{name: y[begin:end] for name, y in token.items()}, u=x.get("u"), scale=case.scale)
        output, final = affine_steps(structure, inputs, start[n : n + 1])
        outputs.insert(0, output.to(x["v"].dtype))
        finals.insert(0, final)
    return results((torch.cat(outputs), torch.cat(finals) if finals else start), x, parts)


def kernels(case: Case, parts: str = "output final_state") -> dict[str, Tensor]:
    x = case.fresh(wide=False)
    tensors = (*(x[name] for name in "qkv"), x.get("gk"), x.get("gv"), x.get("u"), case.cu_seqlens, x.get("S0"))
    return results(channel_scan(*tensors, case.scale, case.before), x, parts)


def assert_right(case: Case, parts: str = "output final_state") -> None:
    """Outputs and all gradients: as good as the step in the same dtype."""
    found, truth, eager = kernels(case, parts), reference(case, True, parts), reference(case, False, parts)
    assert_all_as_good(found, eager, truth, case.dtype)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 64 tokens, as if the GPU had room for all of them."""
    monkeypatch.setattr(channel_decay, "SHORTEST_PIECE", 64)
    monkeypatch.setattr(channel_decay, "multiprocessors", lambda device: 1 << 20)


KINDS = pytest.mark.parametrize("gates, before", [("gk", False), ("gk", True), ("gv", False), ("gv", True)])


@KINDS
def test_ragged_segments(gates, before):
    assert_right(make((0, 1, 63, 64, 65), gates=gates, before=before, tail=3))


@KINDS
def test_float16(gates, before):
    # the first segment forgets little in a chunk, the others what 16 bits can't hold
    case = make((130, 63, 1, 64), H=1, K=36, V=20, gates=gates, before=before, dtype=torch.float16, decay=0.02)
    case.gates[130:] *= 30
    assert_right(case)


@pytest.mark.parametrize("gates", ["gk", "gv"])
def test_gates_of_16_bits(gates):
    case = make((40,), G=2, gates=gates)
    case.leaves[gates] = case.gates.bfloat16()
    found = kernels(case)
    case.leaves[gates] = case.gates.float()
    for name, x in kernels(case).items():
        # an interpreter cuts what a GPU rounds
        assert_close(found[name], x, name)
    assert found[f"gradient of {gates}"].dtype == torch.bfloat16


@pytest.mark.parametrize("gates, before", [("gk", True), ("gv", False)])
def test_two_heads_share_a_key_head(gates, before):
    assert_right(make((3, 20), H=4, G=2, K=3, V=5, gates=gates, before=before))


@pytest.mark.parametrize("gates", ["gk", "gv"])
def test_tiles_of_a_wide_state(gates):
    assert_right(make((40,), H=1, K=130, V=70, gates=gates))


@pytest.mark.parametrize("parts", ["output", "final_state"])
def test_gradient_of_one_result(parts):
    assert_right(make((5, 40)), parts)


def test_no_initial_state(short_pieces):
    assert_right(make((0, 5, 70), state=False))


@KINDS
def test_extreme_gates(gates, before):
    assert_right(with_extreme_gates(make((1, 70), H=1, gates=gates, before=before)))


def test_extreme_gates_in_float16():
    assert_right(with_extreme_gates(make((1, 70), before=True, dtype=torch.float16)))


@pytest.mark.parametrize("gate", [0.0, -1e-3, -2.0, -50.0, -1e4, -torch.inf])
def test_one_gate_throughout(gate):
    case = make((40,), H=1)
    case.gates[:] = gate
    assert_right(case)


@pytest.mark.parametrize("before", [False, True])
def test_gradients_of_gates_that_let_nothing_pass(before):
    """Nothing that does not pass a gate is added to its gradient and taken away again."""
    case = make((64,), H=1, before=before, decay=1e-3)
    case.gates[20, :, ::2] = -torch.inf
    found, truth = (x["gradient of gk"] for x in (kernels(case), reference(case, True, "output final_state")))
    assert (found[20, :, ::2] == 0).all()
    assert found[20, :, 1::2].ne(0).all() and truth[20, :, 1::2].ne(0).all()


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_any_scale(scale):
    assert_right(make((3, 40), H=1, scale=scale))


def test_reads_before_writes_without_a_bonus():
    case = make((40,), before=True)
    del case.leaves["u"]
    assert_right(case)


@pytest.mark.parametrize("lengths, tail", [((), 0), ((), 5), ((0, 0), 0), ((0, 3), 4)])
@pytest.mark.parametrize("gates, before", [("gk", True), ("gv", False)])
def test_nothing_or_little_to_do(lengths, tail, gates, before):
    assert_right(make(lengths, tail=tail, gates=gates, before=before))


@pytest.mark.parametrize("gates", ["gk", "gv"])
def test_uncovered_rows_are_zeros_whatever_they_hold(gates):
    case = make((3, 40), tail=40, gates=gates)
    for name in ("q", "k", "v", gates):
        case.leaves[name][43:] = torch.nan
    found = kernels(case)
    for name in ("output", *(f"gradient of {name}" for name in ("q", "k", "v", gates))):
        assert_equal(found[name][43:], torch.zeros_like(found[name][43:]), name)
    for name, x in found.items():
        assert x.isfinite().all(), name


@KINDS
def test_split_segments(short_pieces, gates, before):
    # what one piece passes to the next should last
    assert_right(make((0, 130), gates=gates, before=before, tail=3, decay=0.01))


def test_split_segments_with_extreme_gates(short_pieces):
    case = make((150,), H=1)
    case.gates[[5, 70, 140]] = torch.tensor([-50.0, -1e4, -torch.inf]).view(3, 1, 1)
    # the first and the last token of a piece
    case.gates[64] = case.gates[127] = -torch.inf
    assert_right(case)


@pytest.mark.parametrize("gates, before", [("gk", True), ("gv", False)])
def test_every_element_is_written(short_pieces, gates, before):
    case = make((0, 1, 70), H=1, gates=gates, before=before, tail=3)
    case.gates[30:60] -= 40
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


@pytest.mark.parametrize("gates, before", [("gk", False), ("gk", True), ("gv", False)])
def test_some_heads_at_a_time(monkeypatch, gates, before):
    case = make((20,), H=4, G=2, gates=gates, before=before)
    expected = kernels(case)
    monkeypatch.setattr(channel_decay, "WORKSPACE", 0)
    for name, x in kernels(case).items():
        assert_equal(x, expected[name], name)


def test_views_are_as_good_as_copies():
    case = make((40,), G=2, before=True)
    expected = kernels(case)
    # every second element of larger tensors
    case.leaves = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.leaves.items()}
    case.cu_seqlens = case.cu_seqlens.int()
    for name, x in kernels(case).items():
        assert_equal(x, expected[name], name)


def test_large_gradients_in_float16():
    """A loss scale of 1024: what is multiplied in 16 bits must not pass 65504."""
    case = make((64,), H=1, K=128, V=128, dtype=torch.float16, scale=128**-0.5, state=False, decay=1e-3)
    x = case.fresh(wide=False)
    output, _ = channel_scan(x["q"], x["k"], x["v"], x["gk"], None, None, case.cu_seqlens, None, case.scale)
    for gradient in torch.autograd.grad(output, [x["q"], x["gk"]], 1024 * x["v"].detach().sign()):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("names", [("gk", "gv"), (), ("gv", "u"), ("gk", "u")])
def test_refused(names):
    x = make((3,), G=2).leaves
    given = {"gk": x["gk"], "gv": torch.zeros_like(x["v"]), "u": torch.zeros(2, 12)}
    tensors = [given[name] if name in names else None for name in ("gk", "gv", "u")]
    with pytest.raises(InputError, match="allowed"):
        channel_scan(x["q"], x["k"], x["v"], *tensors, torch.tensor([0, 3]), None, 1.0)


@pytest.mark.parametrize("gates, before, state", [("gk", True, True), ("gv", False, False)])
def test_opcheck(gates, before, state):
    case = make((2, 0), H=1, gates=gates, before=before, tail=1, state=state)
    x, ops = case.fresh(wide=False), torch.ops.momkit
    arguments = (*(x[name] for name in "qkv"), x.get("gk"), x.get("gv"), x.get("u"), case.cu_seqlens, x.get("S0"))
    torch.library.opcheck(ops.channel_scan.default, (*arguments, 0.5, before))
    plain = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in arguments]
    output, final_state, *found = ops.channel_scan(*plain, 0.5, before)
    d_outputs = torch.ones_like(output), torch.ones_like(final_state) if state else None
    torch.library.opcheck(ops.channel_scan_backward.default, (*plain, *found, *d_outputs, 0.5, before))
