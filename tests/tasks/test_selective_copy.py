"""Selective copying: tokens scattered among blanks come back in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momkit.tasks.base import IGNORE
from momkit.tasks.selective_copy import SelectiveCopy, SelectiveCopySpec


def draw(seq_len: int, num_tokens: int, batch_size: int, seed: int = 0, vocab_size: int = 16) -> list[torch.Tensor]:
    part = {"seq_len": seq_len, "num_tokens": num_tokens}
    task = SelectiveCopy(SelectiveCopySpec(vocab_size=vocab_size, train=[part]))
    batch = task.batch(torch.Generator().manual_seed(seed), batch_size)
    assert batch.cu_seqlens.tolist() == [seq_len * i for i in range(batch_size + 1)]
    assert batch.group is not None and batch.group.eq(num_tokens).all()
    return [batch.tokens.view(batch_size, seq_len), batch.targets.view(batch_size, seq_len)]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10), slack=st.integers(0, 30), vocab_size=st.integers(3, 20), seed=st.integers(0, 99))
def test_every_sequence_keeps_the_rules(n: int, slack: int, vocab_size: int, seed: int) -> None:
    seq_len = 2 * n + 1 + slack
    blank, copy = vocab_size - 2, vocab_size - 1
    tokens, targets = draw(seq_len, n, 4, seed, vocab_size)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        content = [token for token in row if token < blank]
        assert len(content) == n
        assert row.count(copy) == 1 and row[-n - 1] == copy
        assert row[-n:] == [blank] * n
        assert asked == [IGNORE] * (seq_len - n) + content


def test_places_and_tokens_are_uniform() -> None:
    tokens, _ = draw(20, 3, 20_000)
    filled = (tokens[:, :16] < 14).double()
    p = 3 / 16
    assert ((filled.mean(0) - p).abs() < 6 * (p * (1 - p) / 20_000) ** 0.5).all()
    counts = torch.bincount(tokens[tokens < 14], minlength=14).double()
    assert ((counts - 60_000 / 14).abs() < 6 * (60_000 / 14) ** 0.5).all()


def test_slices_of_several_lengths_share_a_batch() -> None:
    parts = [{"seq_len": 30, "num_tokens": 5}, {"seq_len": 11, "num_tokens": 2}]
    task = SelectiveCopy(SelectiveCopySpec(train=parts, curriculum=1.0))
    generator = torch.Generator().manual_seed(0)
    late, early = task.batch(generator, 6, progress=0.5), task.batch(generator, 6, progress=0.49)
    assert late.cu_seqlens.diff().tolist() == [11, 11, 11, 30, 30, 30]
    assert early.cu_seqlens.diff().tolist() == [11] * 6


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train": [{"seq_len": 10, "num_tokens": 5}]}, "num_tokens=5 needs seq_len >= 11.*seq_len=10"),
        ({"eval": [{"seq_len": 10, "num_tokens": 0}]}, "num_tokens"),
        ({"vocab_size": 2}, "vocab_size"),
        ({"train": []}, r"train=\(\) must hold"),
    ],
)
def test_impossible_specs_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SelectiveCopySpec(**fields)
