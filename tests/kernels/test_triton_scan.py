"""Rules that compose affine scans in unusual ways, on the kernels: `TRITON_INTERPRET=1 pytest`."""

from dataclasses import replace

import pytest
import torch

from momkit.errors import BackendError
from momkit.kernels.available import interpreting
from momkit.mechanisms.base import Structure
from momkit.mechanisms.deltanet import DeltaNet
from momkit.mechanisms.mamba2 import Mamba2
from momkit.scan import scan
from momkit.testing.tolerances import assert_close

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

SIZES = {"T": 70, "H": 2, "G": 1, "K": 4, "V": 6}


class FromOnes(Mamba2):
    """Mamba2 that starts one above the state it is given."""

    def compose(self, inputs, state, affine):
        output, S = affine(self.structure, self.lower(inputs), state["S"] + 1)
        return output, {"S": S}


class WideQueries(DeltaNet):
    """DeltaNet that gives each head a query of its own, and keys to share."""

    def compose(self, inputs, state, affine):
        lowered = self.lower(inputs)
        output, S = affine(self.structure, replace(lowered, q=lowered.q.repeat_interleave(2, 1)), state["S"])
        return output, {"S": S}


class Unstated(DeltaNet):
    """DeltaNet that runs another structure than it states."""

    def compose(self, inputs, state, affine):
        output, S = affine(Structure("none", "delta", read="before"), self.lower(inputs), state["S"])
        return output, {"S": S}


def inputs_of(rule):
    sampled = rule.sample(torch.Generator().manual_seed(0), SIZES)
    return {name: x.float() for name, x in sampled.items()}


@pytest.mark.parametrize("cls", [FromOnes, WideQueries])
def test_what_a_rule_composes_is_what_runs(cls):
    rule = cls(cls.Spec())
    inputs, cu_seqlens = inputs_of(rule), torch.tensor([0, 3, 70])
    expected = scan(rule, inputs, cu_seqlens, backend="chunked")
    found = scan(rule, inputs, cu_seqlens, backend="triton")
    assert_close(found.output, expected.output, "output")
    assert_close(found.final_state["S"], expected.final_state["S"], "final state")


def test_a_structure_without_kernels_is_refused():
    rule = Unstated(Unstated.Spec())
    with pytest.raises(BackendError, match=r"no kernel family serves Structure\(.*read='before'\)"):
        scan(rule, inputs_of(rule), backend="triton")
