from momkit.testing import parametrize_with_checks


@parametrize_with_checks(["decayed_oja", "cosine_topk"])
def test_conformance(check):
    check()
