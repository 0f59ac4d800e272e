"""What a docstring is read as."""

import pytest

from momkit.cli.catalog import describe
from momkit.registry import registry


class Told:
    """Remember the mean
    of all values.

    n_t = n_{t-1} + 1
    m_t = m_{t-1} + (v_t - m_{t-1}) / n_t

    Nobody 1900, arXiv 0000.00000.
    """


class Silent:
    pass


def test_three_paragraphs():
    assert describe(Told) == {
        "summary": "Remember the mean of all values.",
        "equation": "n_t = n_{t-1} + 1\nm_t = m_{t-1} + (v_t - m_{t-1}) / n_t",
        "paper": "Nobody 1900, arXiv 0000.00000.",
    }
    assert describe(Silent) == {"summary": "", "equation": "", "paper": ""}


@pytest.mark.parametrize("kind", ["mechanism", "router", "task"])
def test_everything_registered_tells(kind: str):
    for cls in registry().classes[kind].values():
        assert all(describe(cls).values()), cls
