"""Rules that leave their structure to their step, on the kernels of its family: `TRITON_INTERPRET=1 pytest`."""

import pytest
import torch

from momkit import decode, scan
from momkit.kernels.available import interpreting
from momkit.mechanisms.base import Domain, Mechanism, outer, read, take
from momkit.mechanisms.gla import GLASpec
from momkit.testing.tolerances import assert_close

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

SIZES = {"T": 40, "H": 4, "G": 2, "K": 5, "V": 3}


class Fading(Mechanism):
    Spec = GLASpec
    structure = "infer"

    def inputs_domain(self):
        key, head = Domain("T G K", unit_norm=True), Domain("T H", low=0.0, high=1.0)
        return {"q": key, "k": key, "v": Domain("T H V"), "g": Domain("T H", high=0.0), "beta": head}

    def step(self, state, inputs):
        q, k, v, g = take(inputs, "q k v g")
        S = g.exp()[..., None, None] * state["S"] + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)


class FadingDelta(Fading):
    def step(self, state, inputs):
        q, k, v, g, beta = take(inputs, "q k v g beta")
        S = g.exp()[..., None, None] * state["S"]
        S = S + outer(k, beta[..., None] * (v - read(S, k)))
        return {"S": S}, self.scale_for(q) * read(S, q)


@pytest.mark.parametrize("cls", [Fading, FadingDelta])
def test_kernels_of_its_family_serve_it(cls):
    rule = cls(GLASpec())
    drawn = rule.sample(torch.Generator().manual_seed(0), SIZES)
    inputs = {name: x.float() for name, x in drawn.items()}
    assert_close(scan(rule, inputs, backend="triton").output, scan(rule, inputs, backend="reference").output, "output")
    rows = torch.arange(SIZES["T"])
    pools = [{"S": torch.ones(SIZES["T"], SIZES["H"], SIZES["K"], SIZES["V"])} for _ in range(2)]
    outputs = [
        decode(rule, inputs, pool, rows, backend=b) for pool, b in zip(pools, ("triton", "reference"), strict=True)
    ]
    assert_close(*outputs, "decoded")
    assert_close(pools[0]["S"], pools[1]["S"], "pool")
