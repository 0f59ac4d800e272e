"""Every registered rule on every backend, every router, every block around one, and the dispatch."""

from momkit.mechanisms.deltanet import DeltaNetSpec
from momkit.mechanisms.gated_deltanet import GatedDeltaNetSpec
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.mechanisms.rwkv6 import RWKV6Spec
from momkit.registry import registry
from momkit.routing.read_write import ReadWriteSpec
from momkit.routing.softmax_topk import SoftmaxTopKSpec
from momkit.testing import parametrize_with_checks

# options that change what a rule or a router computes
VARIANTS = [
    LinearAttentionSpec(normalize=True),
    LinearAttentionSpec(feature_map="relu"),
    DeltaNetSpec(allow_neg_eigval=True),
    GatedDeltaNetSpec(allow_neg_eigval=True),
    RWKV6Spec(scale=0.5),
    SoftmaxTopKSpec(top_k=1),
    ReadWriteSpec(k_write=1, k_read=3),
]


@parametrize_with_checks(["dispatch", *registry().names("router"), *registry().names("mechanism")])
def test_conformance(check):
    check()


@parametrize_with_checks(VARIANTS)
def test_conformance_of_variants(check):
    check()
