"""The conformance kit on the kernels under Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/kernels`."""

import os

import pytest

from momkit.kernels.available import interpreting
from momkit.mechanisms.deltanet import DeltaNetSpec
from momkit.mechanisms.gated_deltanet import GatedDeltaNetSpec
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.testing import parametrize_with_checks

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

RULES = [
    "linear_attention",
    "retention",
    "lightning_attention",
    "mamba2",
    "deltanet",
    "gated_deltanet",
    "mamba",
    LinearAttentionSpec(normalize=True),
    DeltaNetSpec(allow_neg_eigval=True),
    GatedDeltaNetSpec(allow_neg_eigval=True),
]


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", os.environ.get("MOMKIT_PROFILE", "interpret"))


@parametrize_with_checks(RULES, only="-triton-", backend="triton")
def test_conformance(check):
    check()
