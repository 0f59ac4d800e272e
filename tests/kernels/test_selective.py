"""The selective scan under Triton's interpreter, held to Mamba's step in float64: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.available import interpreting
from momkit.mechanisms.mamba import MambaSpec
from momkit.scan import as_mechanism, run
from momkit.testing.bounds import addresses_checked
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import selective_scan as module
from momkit.kernels.mamba_decode import decode_channels
from momkit.kernels.selective_scan import selective_scan

NAMES = ("x", "dt", "A", "B", "C", "D")
PARTS = "output final_state"


@dataclass
class Case:
    """Leaves by name, h (the initial state, if there is one) among them; bounds of the segments; rows past the last
    segment are a tail."""

    leaves: dict[str, Tensor]
    cu_seqlens: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["x"].dtype

    def fresh(self, wide: bool) -> dict[str, Tensor]:
        return {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in self.leaves.items()}


def make(lengths, channels=12, N=16, dtype=torch.float32, tail=0, state=True, decay=0.5) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    T, S = sum(lengths) + tail, len(lengths)
    leaves = {
        "x": randn(T, channels), "dt": 0.3 * randn(T, channels).exp(), "B": randn(T, N), "C": randn(T, N),
        "D": randn(channels),
    }  # fmt: skip
    leaves = {name: x.to(dtype) for name, x in leaves.items()} | {"A": -decay * randn(channels, N).exp()}
    if state:
        leaves["h"] = randn(S, channels, N)
    return Case(leaves, torch.tensor([0, *lengths]).cumsum(0))


def results(outputs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], parts: str) -> dict[str, Tensor]:
    return results_of(dict(zip(("output", "final_state"), outputs, strict=True)), leaves, parts.split())


def reference(case: Case, wide: bool, parts: str) -> dict[str, Tensor]:
    leaves = case.fresh(wide)
    inputs = {name: x for name, x in leaves.items() if name != "h"}
    state = {"h": leaves["h"]} if "h" in leaves else None
    out = run(as_mechanism(MambaSpec()), inputs, case.cu_seqlens, initial_state=state, backend="reference")
    return results((out.output, out.final_state["h"]), leaves, parts)


def kernels(case: Case, parts: str = PARTS) -> dict[str, Tensor]:
    x = case.fresh(wide=False)
    return results(selective_scan(*(x[name] for name in NAMES), case.cu_seqlens, x.get("h")), x, parts)


def assert_right(case: Case, parts: str = PARTS) -> None:
    """Outputs and all gradients: as good as the step in the same dtype."""
    found, truth, eager = kernels(case, parts), reference(case, True, parts), reference(case, False, parts)
    assert_all_as_good(found, eager, truth, case.dtype)


@pytest.fixture(autouse=True)
def in_bounds():
    with addresses_checked():
        yield


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 16 tokens, as if the GPU had room for all of them."""
    monkeypatch.setattr(module, "SHORTEST_PIECE", 16)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ragged_segments(dtype):
    assert_right(make((0, 1, 7, 8, 9, 27), tail=3, dtype=dtype))


@pytest.mark.parametrize("channels, N", [(1, 1), (3, 20), (70, 3), (5, 70), (2, 256)])
def test_any_size(channels, N):
    assert_right(make((3, 10), channels=channels, N=N))


@pytest.mark.parametrize("parts", ["output", "final_state"])
def test_gradient_of_one_result(parts):
    assert_right(make((5, 20)), parts)


@pytest.mark.parametrize("lengths, tail", [((), 0), ((), 5), ((0, 0), 0), ((0, 3), 4)])
def test_nothing_or_little_to_do(lengths, tail):
    assert_right(make(lengths, tail=tail))


@pytest.mark.parametrize("state", [True, False])
def test_split_segments(short_pieces, state):
    # what one piece passes to the next should last
    assert_right(make((0, 16, 70, 17, 33), tail=3, state=state, decay=0.05))


@pytest.mark.parametrize("decay", [0.0, 50.0, 1e4])
def test_one_strength_of_decay(short_pieces, decay):
    """A from 0 to what forgets all at once, with no step at all for some tokens."""
    case = make((1, 40))
    case.leaves["A"][:] = -decay
    case.leaves["dt"][::3] = 0.0
    assert_right(case)


@pytest.mark.parametrize("step", [1.0, 1e30])
@pytest.mark.parametrize("token", [5, 37])
def test_what_forgets_all_leaves_no_trace(short_pieces, token, step):
    """dt A of -1e4 and less is a decay of zero, not of almost zero, in the first piece and in the last one."""
    case = make((40,))
    case.leaves["A"][:] = -1e4
    case.leaves["h"][:] = 1e30
    case.leaves["dt"][:] = 0.0
    case.leaves["dt"][token] = step
    case.leaves["x"][token] = 0.0
    found = kernels(case)
    assert_equal(found["final_state"], torch.zeros_like(case.leaves["h"]), "final state")
    for name, x in found.items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("names", ["A", "D", "A D"])
def test_constants_that_vary(short_pieces, names):
    """A and D with a row for each token, as inputs of any rule may have; those of uncovered tokens don't matter."""
    case = make((0, 40, 1, 18), channels=10, tail=3)
    for name in names.split():
        x = case.leaves[name]
        case.leaves[name] = x * torch.rand(len(case.leaves["x"]), *x.shape, generator=torch.Generator().manual_seed(1))
        case.leaves[name][59:] = torch.nan
    found, truth, eager = kernels(case), reference(case, True, PARTS), reference(case, False, PARTS)
    for name in names.split():
        what = f"gradient of {name}"
        assert_equal(found[what][59:], torch.zeros_like(found[what][59:]), what)
    assert_all_as_good(found, eager, truth, case.dtype)


def test_no_step_leaves_the_state(short_pieces):
    case = make((0, 40, 3))
    case.leaves["A"][::2] = -1e4
    case.leaves["dt"][:] = 0.0
    assert_equal(kernels(case)["final_state"], case.leaves["h"], "final state")


def test_uncovered_rows_are_zeros_whatever_they_hold():
    case = make((3, 10), tail=20)
    rows = ("x", "dt", "B", "C")
    for name in rows:
        case.leaves[name][13:] = torch.nan
    found = kernels(case)
    for name in ("output", *(f"gradient of {name}" for name in rows)):
        assert_equal(found[name][13:], torch.zeros_like(found[name][13:]), name)
    for name, x in found.items():
        assert x.isfinite().all(), name


def test_segments_see_nothing_of_each_other(short_pieces):
    case = make((5, 20, 11), channels=5)
    expected = kernels(case)
    for name in ("x", "dt", "B", "C"):
        case.leaves[name][5:25] = torch.nan
    found = kernels(case)
    for name in ("output", *(f"gradient of {name}" for name in ("x", "dt", "B", "C"))):
        for rows in (slice(0, 5), slice(25, None)):
            assert_equal(found[name][rows], expected[name][rows], name)


def test_every_element_is_written(short_pieces):
    case = make((0, 1, 34, 18), channels=5, tail=3)
    expected = kernels(case)
    with poisoned_empty():
        found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_views_are_as_good_as_copies():
    case = make((20,))
    expected = kernels(case)
    # every second element of larger tensors
    case.leaves = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.leaves.items()}
    case.cu_seqlens = case.cu_seqlens.int()
    found = kernels(case)
    for name, x in expected.items():
        assert_equal(found[name], x, name)


def test_without_gradients_nothing_is_kept(monkeypatch):
    case, kept = make((20,)), []
    original = module.forward

    def spied(*args):
        results = original(*args)
        kept.append(results[2].numel())
        return results

    monkeypatch.setattr(module, "forward", spied)
    expected = kernels(case)
    with torch.no_grad():
        output, final_state = selective_scan(*(case.leaves[name] for name in NAMES), case.cu_seqlens, case.leaves["h"])
    assert_equal(output, expected["output"], "output")
    assert_equal(final_state, expected["final_state"], "final state")
    assert kept[0] > 0 == kept[1]


def test_gradients_of_what_kept_nothing_are_refused():
    x = make((3,)).fresh(wide=False)
    output, *_ = module.forward(*(x[name] for name in NAMES), torch.tensor([0, 3]), x["h"], False)
    with pytest.raises(InputError, match="keep = False"):
        output.sum().backward()


@pytest.mark.parametrize("state, varies", [(True, False), (False, False), (True, True)])
def test_opcheck(state, varies):
    # no place for a state is left over: what is never written nor read differs from run to run
    case = make((2, 4), channels=4, N=3, tail=1, state=state)
    if varies:
        for name in ("A", "D"):
            case.leaves[name] = case.leaves[name].repeat(7, *[1] * case.leaves[name].ndim)
    x = case.fresh(wide=False)
    ops = torch.ops.momkit
    arguments = (*(x[name] for name in NAMES), case.cu_seqlens, x.get("h"), True)
    torch.library.opcheck(ops.selective_scan.default, arguments)
    plain = [tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in arguments]
    output, final_state, *saved = ops.selective_scan(*plain)
    arguments = (*plain[:7], *saved, torch.ones_like(output), torch.ones_like(final_state) if state else None)
    torch.library.opcheck(ops.selective_scan_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "channels, N, varying", [(1, 1, ""), (40, 16, ""), (5, 20, "A"), (40, 3, "D"), (2, 256, "A D")]
)
def test_decoding_is_one_step_in_place(channels, N, varying, dtype):
    case = make((1,) * 4, channels=channels, N=N, dtype=dtype)
    for name in varying.split():
        case.leaves[name] = torch.stack([case.leaves[name] * factor for factor in (1, 2, 3, 4)])
    x, pool, index = case.leaves, torch.randn(6, channels, N), torch.tensor([4, -1, 0, 5])
    case.leaves["h"] = pool[index]
    # rows that lie apart, as parts of a wide projection do
    rows = {name: torch.cat([x[name], x[name]], 1)[:, : x[name].shape[1]] for name in ("x", "dt", "B", "C")}
    after, live = pool.clone(), index >= 0
    output = decode_channels(*(rows.get(name, x[name]) for name in NAMES), after, index)
    truth, eager = (reference(case, wide, "output") for wide in (True, False))
    for name, found in (("output", output[live]), ("final_state", after[index[live]])):
        assert_as_good(found, eager[name][live].to(dtype), truth[name][live], name)
    assert_equal(output[1], torch.zeros_like(output[1]), "output of a padding row")
    assert_equal(after[[1, 2, 3]], pool[[1, 2, 3]], "rows that no token has")


def test_opcheck_of_decoding():
    x = make((1, 1), channels=3, N=5).leaves
    arguments = (*(x[name] for name in NAMES), x["h"], torch.tensor([1, -1]))
    torch.library.opcheck(torch.ops.momkit.mamba_decode.default, arguments)
