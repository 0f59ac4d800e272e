"""Parity: the running parity of every sequence of its own, at lengths seen and unseen."""

from itertools import accumulate
from operator import xor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momkit.tasks.base import IGNORE, Batch
from momkit.tasks.parity import Parity, ParitySpec


def check_answers(batch: Batch, ask: str) -> None:
    lengths = batch.cu_seqlens.diff().tolist()
    assert batch.group is not None
    rows = zip(batch.tokens.split(lengths), batch.targets.split(lengths), batch.group.split(lengths), strict=True)
    for bits, targets, group in rows:
        parity = list(accumulate(bits.tolist(), xor))
        if ask == "last":
            parity[:-1] = [IGNORE] * (len(parity) - 1)
        assert targets.tolist() == parity
        assert group.eq(len(bits)).all()


@settings(max_examples=50, deadline=None)
@given(low=st.integers(1, 9), more=st.integers(0, 20), ask=st.sampled_from(["each", "last"]), seed=st.integers(0, 99))
def test_targets_are_the_parity_so_far(low: int, more: int, ask: str, seed: int) -> None:
    task = Parity(ParitySpec(min_len=low, max_len=low + more, ask=ask, eval_lens=(1, 30), eval_examples=3))
    batch = task.batch(torch.Generator().manual_seed(seed), 6)
    assert all(low <= length <= low + more for length in batch.cu_seqlens.diff().tolist())
    check_answers(batch, ask)
    for part in task.evaluation(2):
        check_answers(part, ask)


def test_lengths_are_uniform_and_bits_fair() -> None:
    batch = Parity(ParitySpec(min_len=3, max_len=8)).batch(torch.Generator().manual_seed(0), 12_000)
    counts = torch.bincount(batch.cu_seqlens.diff(), minlength=9)[3:].double()
    assert ((counts - 2000).abs() < 6 * 2000**0.5).all()
    assert abs(batch.tokens.double().mean() - 0.5) < 6 * 0.5 / batch.tokens.numel() ** 0.5


@pytest.mark.parametrize("progress, longest", [(0.0, 2), (0.25, 6), (0.5, 10), (1.0, 10)])
def test_progress_lengthens_the_strings(progress: float, longest: int) -> None:
    task = Parity(ParitySpec(min_len=2, max_len=10, curriculum=0.5))
    batch = task.batch(torch.Generator().manual_seed(0), 500, progress)
    assert int(batch.cu_seqlens.diff().max()) == longest


def test_evaluation_covers_every_length() -> None:
    task = Parity(ParitySpec(eval_lens=(4, 9), eval_examples=5))
    assert [b.cu_seqlens.diff().tolist() for b in task.evaluation(3)] == [[4] * 3, [4] * 2, [9] * 3, [9] * 2]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"min_len": 5, "max_len": 4}, "max_len=4 must be at least min_len=5"),
        ({"min_len": 0}, "min_len"),
        ({"eval_lens": ()}, r"eval_lens=\(\)"),
        ({"eval_lens": (3, 0)}, r"eval_lens=\(3, 0\)"),
        ({"ask": "first"}, "ask"),
    ],
)
def test_impossible_specs_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParitySpec(**fields)
