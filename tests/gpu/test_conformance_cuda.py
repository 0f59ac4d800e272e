"""The conformance kit on a GPU: one test a kernel family, one for the backends in plain torch."""

import pytest
import torch

from momkit.mechanisms.deltanet import DeltaNetSpec
from momkit.mechanisms.gated_deltanet import GatedDeltaNetSpec
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.registry import registry
from momkit.testing import parametrize_with_checks

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SCALAR = [
    "linear_attention",
    "retention",
    "lightning_attention",
    "mamba2",
    LinearAttentionSpec(normalize=True),
]
DELTA = [
    "deltanet",
    "gated_deltanet",
    DeltaNetSpec(allow_neg_eigval=True),
    GatedDeltaNetSpec(allow_neg_eigval=True),
]


CHANNEL = ["gla", "hgrn2", "rwkv6", "gsa"]


@parametrize_with_checks(SCALAR, only="-triton-", backend="triton", device=CUDA)
def test_scalar_family(check):
    check()


@parametrize_with_checks(DELTA, only="-triton-", backend="triton", device=CUDA)
def test_delta_family(check):
    check()


@parametrize_with_checks(CHANNEL, only="-triton-", backend="triton", device=CUDA)
def test_channel_family(check):
    check()


@parametrize_with_checks(["mamba"], only="-triton-", backend="triton", device=CUDA)
def test_selective_scan(check):
    check()


@parametrize_with_checks(registry().names("mechanism"), only="-generated-", backend="generated", device=CUDA)
def test_generated(check):
    check()


@parametrize_with_checks(registry().names("mechanism"), only="-reference-", device=CUDA)
def test_reference(check):
    check()


@parametrize_with_checks(registry().names("mechanism"), only="-chunked-", device=CUDA)
def test_chunked(check):
    check()
