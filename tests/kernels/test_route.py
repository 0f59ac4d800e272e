"""The paper's router in one kernel each way, under Triton's interpreter, held to the torch form in float64:
`TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.available import interpreting
from momkit.routing.base import RouterContext, Routing
from momkit.routing.softmax_topk import SoftmaxTopK, SoftmaxTopKSpec
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import route as kernels
from momkit.kernels.route import route_top_k

few = settings(max_examples=16, deadline=None, database=None, derandomize=True)
DTYPES = torch.float32, torch.float16


@dataclass
class Case:
    """Tokens `[T, D]`, the router's weight `[M, D]`, tokens that count, choices."""

    x: Tensor
    weight: Tensor
    mask: Tensor | None
    top_k: int


def make(T, D=20, M=5, top_k=2, masked=True, dtype=torch.float32, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=generator).to(dtype)
    weight = 2 * torch.randn(M, D, generator=generator) * D**-0.5
    return Case(x, weight, torch.rand(T, generator=generator) < 0.6 if masked else None, top_k)


def in_torch(x: Tensor, weight: Tensor, mask: Tensor | None, top_k: int) -> tuple[Tensor, ...]:
    router = SoftmaxTopK(SoftmaxTopKSpec(top_k=top_k), RouterContext(x.shape[1], len(weight)))
    del router.weight
    router.weight = weight
    routing = router.route_in_torch(x, mask)
    return routing.weights, routing.memory_ids, routing.logits, routing.aux_loss


def results(case: Case, form=route_top_k, wide: bool = False, parts=("weights", "logits", "aux_loss")):
    """All that a form returns, and gradients of x and weight through some of it; ids by themselves."""
    leaves = {"x": case.x, "weight": case.weight}
    leaves = {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in leaves.items()}
    weights, ids, logits, aux_loss = form(leaves["x"], leaves["weight"], case.mask, case.top_k)
    return results_of({"weights": weights, "logits": logits, "aux_loss": aux_loss}, leaves, list(parts)), ids


def assert_right(case: Case, **options) -> dict[str, Tensor]:
    """As good as the torch form in float32, the same choices, and every element written."""
    with poisoned_empty():
        found, ids = results(case, **options)
    expected, _ = results(case, in_torch, **options)
    truth, true_ids = results(case, in_torch, wide=True, **options)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
    assert ids.dtype == torch.int64
    assert_equal(ids, true_ids, "ids")
    for name, x in truth.items():
        # all is float32 but the gradient of x, which is rounded to the dtype of x
        dtype = case.x.dtype if name == "gradient of x" else torch.float32
        assert_all_as_good({name: found[name]}, {name: expected[name]}, {name: x}, dtype)
    return found


@few
@given(data=st.data(), T=st.sampled_from((0, 1, 2, 9)), M=st.sampled_from((1, 2, 5, 16)),
       D=st.sampled_from((3, 20, 300)), masked=st.booleans(), dtype=st.sampled_from(DTYPES),
       wide=st.booleans())  # fmt: skip
def test_same_as_in_torch(data, T, M, D, masked, dtype, wide):
    """Tiles of one token, or of several tokens and some memories."""
    top_k = data.draw(st.integers(1, min(M, kernels.MOST_CHOICES)))
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(kernels, "TILES", {2**31: kernels.TILES[2**31]})
        assert_right(make(T, D, M, top_k, masked, dtype))


@pytest.mark.parametrize("D, dtype", [(20, torch.float32), (300, torch.float16)])
def test_programs_of_many_blocks(D, dtype):
    assert_right(make(70, D, dtype=dtype))


def test_many_parts(monkeypatch):
    """The loss from more parts than are added up at a time."""
    monkeypatch.setattr(kernels, "PARTS", 2)
    assert_right(make(20))


def test_most_memories_and_choices():
    assert_right(make(9, M=kernels.MOST_MEMORIES, top_k=kernels.MOST_CHOICES))


def test_wide_layers():
    assert_right(make(3, D=4096))


@pytest.mark.parametrize("part", ["weights", "logits", "aux_loss"])
def test_gradients_through_one_result(part):
    assert_right(make(12), parts=[part])


@pytest.mark.parametrize("T", [1, 12])
def test_no_token_counts(T):
    case = make(T)
    case.mask[:] = False
    assert assert_right(case)["aux_loss"] == 0


def test_the_lowest_of_equal_logits():
    case = make(4, M=6, top_k=3)
    case.weight[[1, 3, 4]] = case.weight[5].clone()
    case.x[2:] = 0
    _, ids, logits, _ = route_top_k(case.x, case.weight, None, 3)
    assert_equal(ids, logits.sort(stable=True, descending=True).indices[:, :3], "ids")
    assert ids[2:].tolist() == [[0, 1, 2]] * 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_ids_are_legal_whatever_tokens_hold(odd):
    """A token that is not finite spoils no other, nor what it indexes."""
    case = make(6, M=5, top_k=4)
    expected = route_top_k(case.x, case.weight, None, 4)
    case.x[3] = odd
    weights, ids, *_ = route_top_k(case.x, case.weight, None, 4)
    assert (ids >= 0).all() and (ids < 5).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    others = torch.arange(6) != 3
    assert_equal(weights[others], expected[0][others], "weights")


def test_large_logits_do_not_overflow():
    case = make(12)
    case.weight *= 1e3
    assert_right(case, parts=["logits", "aux_loss"])


@pytest.mark.parametrize("D", [20, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_routes_alone_as_among_others(D, dtype, monkeypatch):
    """Bit for bit, whatever the number of tokens and the tile."""
    monkeypatch.setattr(kernels, "TILES", dict(zip((4, 2**31), kernels.TILES.values(), strict=True)))
    case = make(43, D, dtype=dtype)
    among = route_top_k(case.x, case.weight, None, 2)
    for rows in (slice(0, 1), slice(42, 43), slice(7, 10), slice(5, 25)):
        alone = route_top_k(case.x[rows], case.weight, None, 2)
        for name, x, expected in zip(("weights", "ids", "logits"), alone, among, strict=False):
            assert_equal(x, expected[rows], name)


def test_views_are_as_good_as_copies():
    case = make(12)
    expected, _ = results(case)
    case.x, case.weight = (torch.stack([x, x], -1)[..., 0] for x in (case.x, case.weight))
    case.mask = torch.stack([case.mask, ~case.mask], 1)[:, 0]
    for name, x in results(case)[0].items():
        assert_equal(x, expected[name], name)


def test_weight_has_a_dtype_of_its_own():
    case = make(20)
    case.weight = case.weight.half()
    assert_right(case)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (make(3, dtype=torch.float64), "float64"),
        (make(3, M=65), "M = 65"),
        (make(3, M=16, top_k=9), "top_k = 9"),
        (make(3, M=2, top_k=3), "top_k = 3"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(BackendError, match=message):
        route_top_k(wrong.x, wrong.weight, wrong.mask, wrong.top_k)


def router_and_tokens(num_memories: int, dtype=torch.float32) -> tuple[SoftmaxTopK, Tensor]:
    torch.manual_seed(0)
    router = SoftmaxTopK(SoftmaxTopKSpec(), RouterContext(20, num_memories)).to(dtype)
    return router, torch.randn(9, 20, dtype=dtype)


def same_routing(actual: Routing, expected: Routing) -> bool:
    return all(torch.equal(getattr(actual, x), getattr(expected, x)) for x in ("weights", "memory_ids", "logits"))


def test_the_router_runs_on_the_kernel():
    router, x = router_and_tokens(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "route_in_torch", None)
        plain = router.route(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same_routing(router.route(x), plain)
    assert plain.memory_ids.equal(router.route_in_torch(x).memory_ids)


@pytest.mark.parametrize("num_memories, dtype", [(65, torch.float32), (5, torch.float64)])
def test_the_router_runs_in_torch_where_the_kernel_can_not(num_memories, dtype):
    router, x = router_and_tokens(num_memories, dtype)
    assert same_routing(router.route(x), router.route_in_torch(x))


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    case, ops = make(5, masked=masked), torch.ops.momkit
    leaves = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    torch.library.opcheck(ops.route_top_k.default, (*leaves, case.mask, 2))
    weights, ids, logits, aux_loss, pull = ops.route_top_k(case.x, case.weight, case.mask, 2)
    for d in ((weights, logits, aux_loss), (None, None, aux_loss)):
        arguments = case.x, case.weight, case.mask, weights, ids, logits, pull, *d
        torch.library.opcheck(ops.route_top_k_backward.default, arguments)
