"""MQAR: where pairs and queries stand, what is asked, what is refused, how slices mix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momkit.tasks.base import IGNORE
from momkit.tasks.mqar import MQAR, MQARSpec, distinct, power_law_gaps
from momkit.tasks.slices import allot


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_slice(seq_len: int, num_pairs: int, **fields: object) -> MQAR:
    part = {"seq_len": seq_len, "num_pairs": num_pairs}
    return MQAR(MQARSpec(train=[part], eval=[part], **fields))


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    num_pairs = draw(st.integers(1, 12))
    seq_len = draw(st.integers(4 * num_pairs, 4 * num_pairs + 30))
    vocab_size = draw(st.integers(2 * num_pairs + 2, 2 * num_pairs + 60))
    return vocab_size, seq_len, num_pairs


@settings(max_examples=60, deadline=None)
@given(size=sizes(), fill=st.booleans(), power_a=st.sampled_from([0.01, 0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_every_sequence_keeps_the_rules(size: tuple[int, int, int], fill: bool, power_a: float, seed: int) -> None:
    vocab_size, seq_len, n = size
    task = one_slice(seq_len, n, vocab_size=vocab_size, random_non_queries=fill, power_a=power_a)
    batch = task.batch(seeded(seed), 5)
    assert batch.cu_seqlens.tolist() == [seq_len * i for i in range(6)]
    assert batch.group is not None and batch.group.eq(n).all()
    tokens, targets = batch.tokens.view(5, seq_len), batch.targets.view(5, seq_len)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[: 2 * n : 2], row[1 : 2 * n : 2]
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        where = [i for i, target in enumerate(asked) if target != IGNORE]
        assert sorted(row[i] for i in where) == sorted(keys)
        assert all(i >= 2 * n and (i - 2 * n) % 2 == 0 for i in where)
        assert all(asked[i] == values[keys.index(row[i])] for i in where)
        if not fill:
            rest = [token for i, token in enumerate(row) if i >= 2 * n and i not in where]
            assert not any(rest)


def test_filler_is_uniform_over_the_vocabulary() -> None:
    batch = one_slice(64, 4, vocab_size=32).batch(seeded(), 500)
    tokens, targets = batch.tokens.view(500, 64)[:, 8:], batch.targets.view(500, 64)[:, 8:]
    counts = torch.bincount(tokens[targets == IGNORE], minlength=32).double()
    mean = counts.sum() / 32
    assert ((counts - mean).abs() < 6 * mean.sqrt()).all()


@pytest.mark.parametrize("count, low, high", [(1, 0, 1), (5, 3, 8), (3, 10, 15)])
def test_distinct_is_uniform(count: int, low: int, high: int) -> None:
    drawn = distinct(20_000, count, low, high, seeded())
    ordered = drawn.sort(1).values
    assert (ordered.diff(dim=1) > 0).all() and drawn.min() >= low and drawn.max() < high
    expected = 20_000 / (high - low)
    for column in drawn.T:
        counts = torch.bincount(column - low, minlength=high - low).double()
        assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_distinct_sets_are_equally_likely() -> None:
    drawn = distinct(20_000, 2, 0, 4, seeded(1))
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).double()
    assert counts[[0, 5, 10, 15]].eq(0).all()
    pairs = counts[counts > 0]
    assert len(pairs) == 12 and ((pairs - 20_000 / 12).abs() < 6 * (20_000 / 12) ** 0.5).all()


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_first_gap_follows_the_power_law(power_a: float) -> None:
    space, rows = 12, 40_000
    gaps = power_law_gaps(rows, 3, space, power_a, seeded())
    assert (gaps.sort(1).values.diff(dim=1) > 0).all()
    p = torch.arange(1, space + 1, dtype=torch.float64) ** (power_a - 1)
    p = p / p.sum()
    frequency = torch.bincount(gaps[:, 0], minlength=space) / rows
    assert ((frequency - p).abs() < 6 * (p / rows).sqrt()).all()
    # the second is drawn from what the first left: p(j) sum over i != j of p(i) / (1 - p(i))
    second = p * ((p / (1 - p)).sum() - p / (1 - p))
    frequency = torch.bincount(gaps[:, 1], minlength=space) / rows
    assert ((frequency - second).abs() < 6 * (second / rows).sqrt()).all()


MIXTURE = [
    {"seq_len": 40, "num_pairs": 8},
    {"seq_len": 16, "num_pairs": 2, "weight": 2.0},
    {"seq_len": 21, "num_pairs": 4},
]


def test_slices_mix_within_a_batch_by_weight() -> None:
    task = MQAR(MQARSpec(vocab_size=64, train=MIXTURE))
    batch = task.batch(seeded(), 20)
    lengths = batch.cu_seqlens.diff()
    assert sorted(lengths.tolist()) == [16] * 10 + [21] * 5 + [40] * 5
    assert batch.group is not None
    pairs = batch.group[batch.cu_seqlens[:-1]]
    assert dict(zip(lengths.tolist(), pairs.tolist(), strict=True)) == {16: 2, 21: 4, 40: 8}
    per_sequence = torch.repeat_interleave(torch.arange(20), lengths)
    asked = torch.bincount(per_sequence[batch.targets != IGNORE], minlength=20)
    assert torch.equal(asked, pairs)


def test_shares_are_unbiased_and_within_one_of_their_mean() -> None:
    generator, weights = seeded(), [5.0, 1.0, 1.0, 0.25]
    counts = torch.tensor([allot(7, weights, generator) for _ in range(4000)]).double()
    means = 7 * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert (counts.sum(1) == 7).all()
    assert ((counts - means).abs() < 1).all()
    assert ((counts.mean(0) - means).abs() < 6 * 0.5 / 4000**0.5).all()


@pytest.mark.parametrize(
    "progress, groups",
    [(0.0, {2}), (0.19, {2}), (0.2, {2, 4}), (0.39, {2, 4}), (0.4, {2, 4, 8}), (1.0, {2, 4, 8})],
)
def test_progress_opens_slices_by_number_of_pairs(progress: float, groups: set[int]) -> None:
    task = MQAR(MQARSpec(vocab_size=64, train=MIXTURE, curriculum=0.6))
    batch = task.batch(seeded(), 40, progress)
    assert batch.group is not None and set(batch.group.tolist()) == groups


def test_without_a_curriculum_all_slices_are_there_from_the_start() -> None:
    batch = MQAR(MQARSpec(vocab_size=64, train=MIXTURE)).batch(seeded(), 40, 0.0)
    assert batch.group is not None and set(batch.group.tolist()) == {2, 4, 8}


def test_evaluation_covers_every_slice() -> None:
    task = MQAR(MQARSpec(eval_examples=3))
    batches = list(task.evaluation(2))
    seen = [(int(b.cu_seqlens[1]), int(b.group[0]), len(b.cu_seqlens) - 1) for b in batches if b.group is not None]
    slices = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert seen == [(*part, count) for part in slices for count in (2, 1)]


def test_the_slices_of_training_are_scored_where_none_are_given() -> None:
    spec = MQARSpec(vocab_size=64, train=MIXTURE)
    slices = [(40, 8), (16, 2), (21, 4)]
    assert [(part.seq_len, part.num_pairs) for part in spec.eval] == slices
    again = MQARSpec(vocab_size=64, train=spec.train)
    assert again == spec and MQARSpec.model_validate_json(spec.model_dump_json()) == spec
    assert len(MQARSpec().eval) == 7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train": [{"seq_len": 31, "num_pairs": 8}]}, "num_pairs=8 needs seq_len >= 32.*seq_len=31"),
        ({"eval": [{"seq_len": 31, "num_pairs": 8}]}, "num_pairs=8 needs seq_len >= 32.*seq_len=31"),
        ({"vocab_size": 16, "train": [{"seq_len": 64, "num_pairs": 8}]}, r"train\[0\].num_pairs=8 .* at most 7"),
        (
            {"vocab_size": 32, "train": [{"seq_len": 64, "num_pairs": 8}], "eval": [{"seq_len": 64, "num_pairs": 16}]},
            r"eval\[0\].num_pairs=16 .* at most 15",
        ),
        ({"train": []}, r"train=\(\) must hold"),
        ({"eval": []}, r"eval=\(\) must hold"),
        ({"train": [{"seq_len": 64, "num_pairs": 8, "weight": 0}]}, "weight"),
        ({"eval": [{"seq_len": 64, "num_pairs": 8, "weight": 1}]}, "weight"),
        ({"train": [{"seq_len": 64, "num_pairs": 0}]}, "num_pairs"),
        ({"power_a": 0.0}, "power_a"),
        ({"vocab_size": 3}, "vocab_size"),
        ({"curriculum": 1.5}, "curriculum"),
    ],
)
def test_impossible_specs_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MQARSpec(**fields)
