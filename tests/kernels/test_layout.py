"""Which program works on which tokens, and the sums of gates, against plain Python: `TRITON_INTERPRET=1 pytest`."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from momkit.kernels.available import interpreting

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from momkit.kernels.gates import FORGET_ALL, FORGET_ENOUGH, LOG2_E, gate_sums
from momkit.kernels.launch import cdiv
from momkit.kernels.layout import BLOCK, Pieces

few = settings(max_examples=30, deadline=None, database=None, derandomize=True)
# none, some, and whole pieces more or less one token
LENGTHS = (0, 1, 2, 15, 16, 17, 40, 63, 64, 65, 130)
lengths_of_segments = st.lists(st.sampled_from(LENGTHS), max_size=6)
many_short = st.lists(st.integers(0, 3), min_size=BLOCK.value, max_size=2 * BLOCK.value + 5)


def pieces_of(lengths, tail, length, dtype=torch.int64) -> Pieces:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=dtype)
    return Pieces.of(cu_seqlens, sum(lengths) + tail, length)


def expected_rows(lengths, tail, length) -> tuple[list[tuple[int, int, int, int]], dict[int, int]]:
    """(segment, begin, end, index) of every piece in its place, and the place of each segment's first."""
    everything = [*lengths, tail]
    begins = [0, *accumulate(lengths)]
    rows, first = [], {}
    for n in sorted(range(len(everything)), key=lambda n: (-everything[n], n)):
        first[n] = len(rows)
        for index in range(max(1, cdiv(everything[n], length))):
            begin = begins[n] + index * length
            rows.append((n, begin, min(begin + length, begins[n] + everything[n]), index))
    return rows, first


def assert_laid_out(lengths, tail, length, dtype=torch.int64) -> None:
    pieces = pieces_of(lengths, tail, length, dtype)
    rows, first = expected_rows(lengths, tail, length)
    assert pieces.segments == len(lengths)
    assert pieces.count >= len(rows)
    assert [tuple(row) for row in pieces.table.T[: len(rows)].tolist()] == rows
    # a spare place says so in its first entry; nothing else of it is read
    assert pieces.table[0, len(rows) :].eq(-1).all()
    assert pieces.first.tolist() == [first[n] for n in range(len(first))]


@few
@given(lengths=lengths_of_segments, tail=st.sampled_from(LENGTHS), length=st.sampled_from((16, 64, None)))
@example(lengths=[], tail=0, length=16)
@example(lengths=[], tail=40, length=16)
@example(lengths=[0, 0], tail=0, length=None)
def test_few_segments(lengths, tail, length):
    # one piece for all, or several
    assert_laid_out(lengths, tail, length or max(1, sum(lengths) + tail))


@few
@given(lengths=many_short, long=st.integers(0, 40), tail=st.sampled_from((0, 1, 40)))
def test_more_segments_than_a_block(lengths, long, tail):
    assert_laid_out([*lengths, long], tail, 16, torch.int32)


@pytest.mark.parametrize("segments", [BLOCK.value - 1, BLOCK.value, BLOCK.value + 1])
def test_about_a_block_of_segments(segments):
    assert_laid_out([n % 5 for n in range(segments)], 3, 2)


@few
@given(lengths=lengths_of_segments, tail=st.sampled_from(LENGTHS), length=st.sampled_from((1, 16, 64)))
def test_every_token_has_one_piece(lengths, tail, length):
    table = pieces_of(lengths, tail, length).table.T.tolist()
    spans = sorted((begin, end) for segment, begin, end, _ in table if segment >= 0 and end > begin)
    assert [t for begin, end in spans for t in range(begin, end)] == list(range(sum(lengths) + tail))


@few
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5), tail=st.integers(0, 40))
def test_a_cut_does_not_depend_on_what_is_packed_beside(lengths, tail):
    together = pieces_of(lengths, tail, 16).table.T.tolist()
    start = 0
    for n, tokens in enumerate(lengths):
        alone = [(begin, end) for segment, begin, end, _ in pieces_of([tokens], 0, 16).table.T.tolist() if segment == 0]
        assert [(begin - start, end - start) for segment, begin, end, _ in together if segment == n] == alone
        start += tokens


EXTREMES = (0.0, -1e-3, -0.7, -50.0, -1e4, -math.inf)


def exact_sums(g, lengths, chunk_size, least) -> torch.Tensor:
    """`[H, T]` float64: from each chunk's start, to base 2, gates no less than `least`."""
    spans = [
        range(begin + at, min(begin + at + chunk_size, begin + n))
        for begin, n in zip([0, *accumulate(lengths)], lengths, strict=False)
        for at in range(0, n, chunk_size)
    ]
    wide = g.double().clamp(min=least) * LOG2_E.value
    return torch.cat([wide[list(span)].cumsum(0) for span in spans]).T


def random_gates(T, H) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    g = -torch.rand(T, H, generator=generator)
    picked = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), g.shape, generator=generator)]
    return torch.where(torch.rand(g.shape, generator=generator) < 0.5, picked, g)


LENGTHS_OF_GATES = (0, 1, 64, 65, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("H, chunk_size, piece", [(2, 64, 64), (17, 16, 512), (1, 32, 128)])
def test_gate_sums(H, chunk_size, piece, dtype):
    T = sum(LENGTHS_OF_GATES)
    g = random_gates(T + 3, H)
    g[T:] = torch.nan
    sums = gate_sums(g, pieces_of(LENGTHS_OF_GATES, 3, piece), piece, T + 3, H, chunk_size, dtype)
    assert sums.shape == (2 if dtype == torch.float32 else 1, H, T + 3)
    assert sums.dtype == torch.float32
    least = FORGET_ALL.value if dtype == torch.float32 else FORGET_ENOUGH.value
    exact = exact_sums(g[:T], LENGTHS_OF_GATES, chunk_size, least)
    # two parts hold 48 bits of each sum, one part 24
    bits = 47 if dtype == torch.float32 else 23
    wrong = (sums[:, :, :T].double().sum(0) - exact).abs()
    assert (wrong <= 2.0**-bits * exact.abs()).all(), f"off by {float(wrong.max()):.3g}"


@pytest.mark.parametrize("gate", EXTREMES)
def test_sums_of_constant_gates(gate):
    g = torch.tensor([gate, -0.1])
    pieces = pieces_of((70, 3), 2, 64)
    constant = gate_sums(g, pieces, 64, 75, 2, 64, torch.float32)
    by_token = gate_sums(g.expand(75, 2), pieces, 64, 75, 2, 64, torch.float32)
    assert torch.equal(constant[:, :, :73], by_token[:, :, :73])
    exact = exact_sums(g.expand(73, 2), (70, 3), 64, FORGET_ALL.value)
    torch.testing.assert_close(constant[:, :, :73].double().sum(0), exact, rtol=2.0**-47, atol=0)


# what a difference of two sums loses must not show in the decay between two tokens
def test_small_gates_after_a_reset_keep_their_precision():
    g = torch.full((64, 1), -1e-3)
    g[1] = -torch.inf
    high, low = gate_sums(g, pieces_of((64,), 0, 64), 64, 64, 1, 64, torch.float32)[:, 0]
    between = (high[2:] - high[1]) + (low[2:] - low[1])
    exact = torch.arange(1, 63).double() * g[0].double() * LOG2_E.value
    torch.testing.assert_close(between.double(), exact, rtol=0, atol=1e-7)
