"""Checks of a rule on one backend of `decode`: one token at a time is the whole, and nothing else in the pool moves.

Letters: B rows of a batch, P rows of the pool.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.decode import BACKENDS, DecodeBackend, choose_decode_backend, decode
from momkit.errors import BackendError
from momkit.kernels.available import interpreting
from momkit.mechanisms.base import Inputs, Mechanism, MechanismSpec, State
from momkit.testing.devices import CPU
from momkit.testing.drawing import Draw, drawn
from momkit.testing.oracle import step_by_step
from momkit.testing.poison import poisoned_empty
from momkit.testing.strategies import ScanCase, scan_cases
from momkit.testing.subjects import RuleSubject
from momkit.testing.tolerances import assert_as_good, assert_close, assert_equal


@dataclass(frozen=True)
class DecodeSubject(RuleSubject):
    """A rule on one backend of `decode`, on one device."""

    backend: DecodeBackend
    device: torch.device = CPU
    kind = "decode"

    @property
    def id(self) -> str:
        return f"{self.name}-decode-{self.backend}"

    @property
    def exact(self) -> bool:
        """Whether a row must not depend, by a single bit, on the rows beside it; the width of tiles depends on both."""
        return self.backend == "reference"

    @property
    def environment(self) -> dict[str, str]:
        where = {} if self.device.type == "cpu" else {"MOMKIT_DEVICE": self.device.type}
        return where | ({"TRITON_INTERPRET": "1"} if self.backend != "reference" and interpreting() else {})

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What inputs may be, as far as it makes a difference."""
        narrow = (torch.float32, torch.float16, torch.bfloat16)
        return (*narrow, torch.float64) if self.backend == "reference" else narrow


def decode_subjects(
    name: str, cls: type[Mechanism], spec: MechanismSpec, device: torch.device = CPU
) -> list[DecodeSubject]:
    """A rule on every backend that decodes with it on a device."""
    able: list[DecodeSubject] = []
    for backend in cast(dict[DecodeBackend, object], BACKENDS):
        subject = DecodeSubject(name, cls, spec, backend, device)
        try:
            choose_decode_backend(subject.rule, backend, device=device)
        except BackendError:
            continue
        able.append(subject)
    return able


def assert_same(subject: DecodeSubject, actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise where nothing else may matter, to rounding elsewhere."""
    (assert_equal if subject.exact else assert_close)(actual, expected, f"{subject.id}: {what}")


@dataclass(frozen=True)
class Batch:
    """Rows to decode: a pool `[P, *shape]` of states, and the pool rows of the first token of each segment of a case.

    spare: pool rows that belong to nobody.
    """

    subject: DecodeSubject
    case: ScanCase = field(repr=False)
    pool: State = field(repr=False)
    rows: list[int]
    spare: list[int]

    def decode(self, tokens: list[int], rows: list[int], inputs: Inputs | None = None) -> Tensor:
        """Decode packed tokens, each on a row of the pool; every output element must be written."""
        inputs = self.case.inputs if inputs is None else inputs
        by_token, device = self.case.token_inputs(), self.subject.device
        given = {n: (x[tokens] if n in by_token else x).to(device) for n, x in inputs.items()}
        dtype = torch.int32 if self.case.seed % 2 else torch.int64
        index = torch.tensor(rows, dtype=dtype, device=device)
        with poisoned_empty():
            return decode(self.case.rule, given, self.pool, index, backend=self.subject.backend)

    def restore(self, pool: State) -> None:
        """Put the states back, as they were in a copy."""
        for name, x in pool.items():
            self.pool[name].copy_(x)


@st.composite
def batches(draw: st.DrawFn, subject: DecodeSubject, min_segments: int = 1) -> Batch:
    """A case with a state for each segment, somewhere in a larger pool."""
    case = draw(
        scan_cases(
            subject,
            gates=("sampled", "mixed"),
            dtypes=subject.dtypes,
            max_tokens=12,
            min_segments=min_segments,
            max_segments=4,
            with_state=True,
        )
    )
    count = len(case.lengths)
    places = draw(st.permutations(range(count + draw(st.integers(1, 3)))))
    rows, spare = list(places[:count]), list(places[count:])
    pool = {name: x.to(subject.device) for name, x in case.random_state(case.seed + 3, len(places)).items()}
    for name, x in case.start().items():
        pool[name][rows] = x.to(pool[name].device)
    return Batch(subject, case, pool, rows, spare)


def copy_of(pool: State) -> State:
    return {name: x.clone() for name, x in pool.items()}


def starts(case: ScanCase) -> list[int]:
    """The first packed token of each segment."""
    return [case.segment(n).start for n in range(len(case.lengths))]


# all segments side by side, a token each at a time and padding where one has ended, in an order that changes: outputs
# and states are those of the scan of the whole, that is of the step in float64, and other pool rows stay as they were
@drawn()
def check_decode_matches_step(subject: DecodeSubject, draw: Draw) -> None:
    batch = draw(batches(subject), "batch")
    case, before = batch.case, copy_of(batch.pool)
    begin = starts(case)
    outputs: dict[int, Tensor] = {}
    for t in range(max(case.lengths, default=0)):
        order = draw(st.permutations(range(len(case.lengths))), f"order of the rows at time {t}")
        alive = [t < case.lengths[n] for n in order]
        tokens = [begin[n] + t if here else 0 for n, here in zip(order, alive, strict=True)]
        output = batch.decode(tokens, [batch.rows[n] if here else -1 for n, here in zip(order, alive, strict=True)])
        outputs |= {token: row for token, row, here in zip(tokens, output, alive, strict=True) if here}
        idle = output[[i for i, here in enumerate(alive) if not here]]
        assert_equal(idle, torch.zeros_like(idle), f"{subject.id}: outputs of padding rows at time {t}")
    start, sizes = case.start(), case.all_sizes
    truth, true_state = step_by_step(case.rule, case.inputs, case.lengths, start, sizes, torch.float64)
    eager, eager_state = step_by_step(case.rule, case.inputs, case.lengths, start, sizes, case.state_dtype)
    for name, state in true_state.items():
        actual = batch.pool[name].cpu()
        assert_as_good(actual[batch.rows], eager_state[name], state, f"{subject.id}: {name} after decoding")
        assert_equal(actual[batch.spare], before[name].cpu()[batch.spare], f"{subject.id}: {name} of nobody")
    if outputs:
        decoded = torch.stack([outputs[token] for token in range(case.num_tokens)]).cpu()
        assert decoded.dtype == case.dtype, f"{subject.id}: output is {decoded.dtype} for {case.dtype} values"
        assert_as_good(decoded, eager.to(case.dtype), truth, f"{subject.id}: decoded outputs")


# padding rows, NaN in their tokens included, give zeros, and change neither the pool nor the rows beside them
@drawn()
def check_decode_padding(subject: DecodeSubject, draw: Draw) -> None:
    batch = draw(batches(subject), "batch")
    case, begin = batch.case, starts(batch.case)
    tokens = [begin[n] for n in range(len(begin)) if case.lengths[n]]
    rows = [batch.rows[n] for n in range(len(begin)) if case.lengths[n]]
    if not tokens:
        return
    padding = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)), "padding rows")
    kept = [i for i, idle in enumerate(padding) if not idle]
    before = copy_of(batch.pool)
    alone = batch.decode([tokens[i] for i in kept], [rows[i] for i in kept])
    expected = copy_of(batch.pool)
    batch.restore(before)
    lost = [tokens[i] for i, idle in enumerate(padding) if idle]
    spoilt = {name: x.clone() if name in case.token_inputs() else x for name, x in case.inputs.items()}
    for name in case.token_inputs():
        spoilt[name][lost] = torch.nan
    output = batch.decode(tokens, [-1 if idle else row for row, idle in zip(rows, padding, strict=True)], spoilt)
    idle = output[[i for i in range(len(tokens)) if padding[i]]]
    assert_equal(idle, torch.zeros_like(idle), f"{subject.id}: outputs of padding rows")
    assert_same(subject, output[kept], alone, "outputs beside padding rows")
    untouched = [row for row in range(len(batch.rows) + len(batch.spare)) if row not in {rows[i] for i in kept}]
    for name, x in expected.items():
        assert_same(subject, batch.pool[name], x, f"{name} beside padding rows")
        assert_equal(batch.pool[name][untouched], before[name][untouched], f"{subject.id}: {name} of padding rows")


# rows may come in any order, and each gives what it gives by itself
@drawn()
def check_decode_rows_in_any_order(subject: DecodeSubject, draw: Draw) -> None:
    batch = draw(batches(subject, min_segments=2), "batch")
    case, begin = batch.case, starts(batch.case)
    filled = [n for n in range(len(begin)) if case.lengths[n]]
    before = copy_of(batch.pool)
    alone = [batch.decode([begin[n]], [batch.rows[n]])[0] for n in filled]
    expected = copy_of(batch.pool)
    batch.restore(before)
    order = draw(st.permutations(range(len(filled))), "order of the rows")
    output = batch.decode([begin[filled[i]] for i in order], [batch.rows[filled[i]] for i in order])
    for place, i in enumerate(order):
        assert_same(subject, output[place], alone[i], f"row {i} of {len(order)} rows")
    for name, x in expected.items():
        assert_same(subject, batch.pool[name], x, f"{name} of rows in another order")


# the same rows of the same pool decode to the same bits
@drawn(0.5)
def check_decode_repeats(subject: DecodeSubject, draw: Draw) -> None:
    batch = draw(batches(subject), "batch")
    begin = starts(batch.case)
    filled = [n for n in range(len(begin)) if batch.case.lengths[n]]
    tokens, rows = [begin[n] for n in filled], [batch.rows[n] for n in filled]
    before = copy_of(batch.pool)
    first, after = batch.decode(tokens, rows), copy_of(batch.pool)
    batch.restore(before)
    assert_equal(batch.decode(tokens, rows), first, f"{subject.id}: outputs of a second run")
    for name, x in after.items():
        assert_equal(batch.pool[name], x, f"{subject.id}: {name} of a second run")
