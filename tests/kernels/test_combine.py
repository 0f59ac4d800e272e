"""Combine, norm and gate in one kernel each way, under Triton's interpreter, held to the torch forms in float64:
`TRITON_INTERPRET=1 pytest`."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.available import interpreting
from momkit.ops import combine, gated_rms_norm
from momkit.testing.oracle import results_of
from momkit.testing.poison import poisoned_empty
from momkit.testing.tolerances import assert_all_as_good, assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels import combine as kernels
from momkit.kernels.combine import combine_norm

few = settings(max_examples=20, deadline=None, database=None, derandomize=True)
DTYPES = torch.float32, torch.float16


@dataclass
class Case:
    """Leaves by name: slots, weights, norm_weight, gate if there is one; the slots of each token; tokens that count."""

    leaves: dict[str, Tensor]
    token_slot: Tensor
    mask: Tensor | None
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves["slots"].dtype


def make(T, J=3, H=2, V=20, shared=True, masked=True, gated=True, dtype=torch.float32, eps=1e-5, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    leaves = {"slots": randn(T * J, H, V).to(dtype), "weights": randn(T, J - shared).sigmoid(), "norm_weight": randn(V)}
    if gated:
        leaves["gate"] = 2 * randn(T, H, V).to(dtype)
    token_slot = torch.randperm(T * J, generator=generator).view(T, J)
    return Case(leaves, token_slot, torch.rand(T, generator=generator) < 0.6 if masked else None, eps)


def in_torch(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    mixed = combine(leaves["slots"], case.token_slot, leaves["weights"], case.mask)
    return gated_rms_norm(mixed, leaves["norm_weight"], leaves.get("gate"), case.eps)


def in_kernels(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    slots, weights, norm_weight = (leaves[name] for name in ("slots", "weights", "norm_weight"))
    return combine_norm(slots, case.token_slot, weights, case.mask, norm_weight, leaves.get("gate"), case.eps)


def results(case: Case, forms=in_kernels, wide: bool = False) -> dict[str, Tensor]:
    """y and the gradients of all leaves."""
    leaves = {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in case.leaves.items()}
    y = forms(case, leaves)
    return results_of({"y": y if wide else y.to(case.dtype)}, leaves, ["y"])


def assert_right(case: Case) -> dict[str, Tensor]:
    """As good as the torch forms in the same dtype, and every element written."""
    with poisoned_empty():
        found = results(case)
    for name, x in case.leaves.items():
        assert found[f"gradient of {name}"].dtype == x.dtype
    assert found["y"].dtype == case.dtype
    assert_all_as_good(found, results(case, in_torch), results(case, in_torch, wide=True), case.dtype)
    return found


@few
@given(
    T=st.integers(0, 6), J=st.integers(2, 4), H=st.integers(1, 4), V=st.integers(1, 40), shared=st.booleans(),
    masked=st.booleans(), gated=st.booleans(), dtype=st.sampled_from(DTYPES), tile=st.sampled_from((32, 128, 2048)),
)  # fmt: skip
@example(T=0, J=2, H=1, V=16, shared=True, masked=True, gated=True, dtype=torch.float32, tile=128)
@example(T=1, J=2, H=1, V=16, shared=True, masked=False, gated=False, dtype=torch.float32, tile=128)
@example(T=3, J=9, H=3, V=16, shared=True, masked=True, gated=True, dtype=torch.float32, tile=32)
def test_same_as_in_torch(T, J, H, V, shared, masked, gated, dtype, tile):
    """Tiles of several tokens, of some heads of one, of one head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "TILE", tile)
        assert_right(make(T, J, H, V, shared, masked, gated, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, V", [(16, 256), (17, 128), (1, 2500), (70, 3)])
def test_wide_layers(H, V, dtype):
    assert_right(make(5, H=H, V=V, dtype=dtype))


@pytest.mark.parametrize("gated", [True, False])
def test_programs_of_many_blocks(gated):
    assert_right(make(700, J=2, H=4, V=32, gated=gated))


def test_one_memory_without_a_shared_one():
    assert_right(make(9, J=1, shared=False))


def test_only_the_shared_memory():
    case = make(9, J=1)
    found = results(case, wide=False)
    del case.leaves["weights"]
    truth = {name: x.double().requires_grad_() for name, x in case.leaves.items()}
    y = in_torch(case, {**truth, "weights": torch.zeros(9, 0, dtype=torch.float64)})
    truth = results_of({"y": y}, truth, ["y"])
    assert_all_as_good(found, truth, truth, case.dtype)


def test_slots_of_weight_zero():
    case = make(9)
    case.leaves["weights"][:, 0] = 0
    assert_right(case)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_masked_tokens_are_zeros_whatever_they_hold(eps):
    case = make(40, eps=eps)
    found = assert_right(case) if eps else results(case)
    out = ~case.mask
    rows = {"slots": case.token_slot[out].flatten(), "weights": out, "gate": out}
    for name, where in rows.items():
        case.leaves[name][where] = torch.nan
    # bitwise as before, so the others are none the wiser
    for name, x in results(case).items():
        assert x.isfinite().all(), name
        assert_equal(x, found[name], name)
    for name, where in {**{f"gradient of {name}": where for name, where in rows.items()}, "y": out}.items():
        assert_equal(found[name][where], torch.zeros_like(found[name][where]), name)


def test_gates_of_any_size():
    case = make(30)
    ends = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 1e4])
    case.leaves["gate"][:] = ends[torch.randint(6, (30, 2, 20), generator=torch.Generator().manual_seed(1))]
    assert_right(case)


def test_small_outputs_meet_eps():
    case = make(30)
    case.leaves["slots"] *= 1e-3
    assert_right(case)


def test_views_are_as_good_as_copies():
    case = make(12)
    expected = results(case)
    case.leaves = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.leaves.items()}
    case.token_slot = case.token_slot.T.contiguous().T
    case.mask = torch.stack([case.mask, ~case.mask], 1)[:, 0]
    for name, x in results(case).items():
        assert_equal(x, expected[name], name)


def test_dtypes_of_norm_weight_and_gate_are_their_own():
    case = make(20, dtype=torch.float16)
    case.leaves["norm_weight"] = case.leaves["norm_weight"].half()
    case.leaves["gate"] = case.leaves["gate"].float()
    assert_right(case)


@pytest.mark.parametrize("name", ["slots", "weights"])
def test_float64_is_refused(name):
    case = make(3)
    case.leaves[name] = case.leaves[name].double()
    with pytest.raises(BackendError, match="float64"):
        in_kernels(case, case.leaves)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional):
    case = make(5, masked=optional, gated=optional, shared=optional)
    x = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
    gate = x.get("gate")
    ops = torch.ops.momkit
    arguments = (x["slots"], case.token_slot, x["weights"], case.mask, x["norm_weight"], gate)
    torch.library.opcheck(ops.combine_norm.default, (*arguments, case.eps))
    plain = [tensor if tensor is None else tensor.detach() for tensor in arguments]
    y, rstd = ops.combine_norm(*plain, case.eps)
    torch.library.opcheck(ops.combine_norm_backward.default, (*plain, rstd, torch.ones_like(y)))
