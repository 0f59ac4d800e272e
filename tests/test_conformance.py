"""Every registered rule on every backend, every router, every block around one, and the dispatch."""

from momkit.registry import registry
from momkit.testing import parametrize_with_checks


@parametrize_with_checks(["dispatch", *registry().names("router"), *registry().names("mechanism")])
def test_conformance(check):
    check()
