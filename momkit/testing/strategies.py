"""What hypothesis draws: lengths, cuts, sizes, routings, masks. Values of tensors come from a drawn seed.

Letters: T packed tokens, N segments, B sequences, M memories, J slots a token.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor

from momkit.mechanisms.base import Domain, Inputs, Mechanism, Sizes, State
from momkit.routing.base import Routing
from momkit.testing.profiles import current_profile
from momkit.testing.subjects import RuleSubject

# none, one, shorter than a convolution, and around the sizes of chunks
LENGTHS = (2, 1, 0, 3, 5, 7, 13, 16, 17, 31, 32, 33, 40, 63, 64, 65, 70)
EXTREME_GATES = (0.0, -1e-3, -1.0, -87.0, -1e4, -torch.inf)
AXIS_SIZES = (4, 1, 2, 3, 5, 8)

seeds = st.integers(0, 2**31 - 1)


@st.composite
def ragged(
    draw: st.DrawFn, max_tokens: int | None = None, min_segments: int = 1, max_segments: int = 5
) -> tuple[int, ...]:
    """Lengths of packed segments: empty ones, single tokens, shorter than a conv, longer than a chunk."""
    left = current_profile().max_tokens
    if max_tokens is not None:
        left = min(left, max_tokens)
    lengths: list[int] = []
    # two first: what hypothesis takes for simple should still be able to go wrong
    for _ in range(draw(st.sampled_from(sorted(range(min_segments, max_segments + 1), key=lambda n: abs(n - 2))))):
        lengths.append(min(draw(st.sampled_from(LENGTHS)), left))
        left -= lengths[-1]
    return tuple(lengths)


def bounds(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """cu_seqlens of lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int = 3) -> tuple[int, ...]:
    """Lengths of the pieces of one sequence, some of them empty."""
    points = sorted(draw(st.lists(st.integers(0, length), max_size=most)))
    return tuple(b - a for a, b in zip([0, *points], [*points, length], strict=True))


@st.composite
def rule_sizes(draw: st.DrawFn, subject: RuleSubject) -> Sizes:
    """A size for every axis of a rule, H a multiple of G, those fixed that its spec or the profile fixes."""
    profile, fixed = current_profile(), subject.fixed_sizes()
    shape = draw(st.sampled_from(profile.shapes)) if profile.shapes else {}
    free = sorted(subject.axes() - {"G", "H"})
    sizes = {axis: draw(st.sampled_from(AXIS_SIZES)) for axis in free}
    sizes |= {axis: shape[axis] for axis in free if axis in shape} | fixed
    if {"G", "H"} & subject.axes():
        # four heads of two key heads: the least that tells h // r from h % G
        choices = ((2, 2), (4, 2), (2, 1), (1, 1))
        heads = [(H, G) for H, G in choices if profile.max_heads >= H and ("G" in subject.axes() or G == H)]
        if shape:
            heads = [(shape["H"], shape["G" if "G" in subject.axes() else "H"])]
        if "H" in fixed:
            heads = [(fixed["H"], G) for G in ((1, fixed["H"]) if "G" in subject.axes() else (fixed["H"],))]
        sizes["H"], sizes["G"] = draw(st.sampled_from(heads))
    return sizes


def extremes_of(domain: Domain) -> tuple[float, ...]:
    """The ends of what an input may be; for a log decay also what lies between."""
    if domain.is_gate:
        return EXTREME_GATES
    return tuple(end for end in (domain.low, domain.high) if abs(end) < torch.inf)


def pushed(domain: Domain, x: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """`x` at the ends of its domain: "mixed" moves half of the elements, "constant" all of them to the same end."""
    ends = torch.tensor(extremes_of(domain), dtype=x.dtype)
    if mode == "sampled" or not len(ends):
        return x
    if mode == "constant":
        return ends[torch.randint(len(ends), (), generator=generator)].expand_as(x).clone()
    picked = ends[torch.randint(len(ends), x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, picked, x)


@dataclass(frozen=True)
class ScanCase:
    """Everything that a scan is given, made from a few drawn numbers.

    gates: "sampled" as the rule's `sample` has them, "mixed" or "constant" with bounded inputs at their ends.
    dtype: of inputs without bounds; bounded ones (gates, write strengths) are at least float32.
    """

    rule: Mechanism = field(repr=False)
    sizes: Sizes
    lengths: tuple[int, ...]
    seed: int
    gates: str = "sampled"
    dtype: torch.dtype = torch.float64
    with_state: bool = True

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def all_sizes(self) -> Sizes:
        return self.sizes | {"T": self.num_tokens}

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def cu_seqlens(self) -> Tensor:
        return bounds(self.lengths, torch.int32 if self.seed % 2 else torch.int64)

    def segment(self, n: int) -> slice:
        """The rows of segment n."""
        start = sum(self.lengths[:n])
        return slice(start, start + self.lengths[n])

    def token_inputs(self) -> list[str]:
        """Names of the inputs that have a row for each token."""
        return [name for name, domain in self.rule.inputs_domain().items() if domain.axes.split()[0] == "T"]

    @cached_property
    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        sampled = self.rule.sample(generator, self.all_sizes)
        made: Inputs = {}
        for name, domain in self.rule.inputs_domain().items():
            bounded = bool(extremes_of(domain))
            x = pushed(domain, sampled[name], self.gates, generator)
            made[name] = x.to(self.state_dtype if bounded else self.dtype)
        return made

    @cached_property
    def initial_state(self) -> State | None:
        return self.random_state(self.seed + 1, len(self.lengths)) if self.with_state else None

    def random_state(self, seed: int, rows: int) -> State:
        """States of order one."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.rule.state_spec(self.all_sizes)
        return {
            name: torch.randn((rows, *shape), generator=generator, dtype=torch.float64).to(self.state_dtype)
            for name, shape in shapes.items()
        }

    def start(self) -> State:
        """The initial state, zeros where there is none."""
        shapes = self.rule.state_spec(self.all_sizes)
        zeros = {name: torch.zeros(len(self.lengths), *shape, dtype=self.state_dtype) for name, shape in shapes.items()}
        return self.initial_state or zeros

    def with_seed(self, seed: int) -> "ScanCase":
        """The same shapes with other values."""
        return replace(self, seed=seed)


@st.composite
def scan_cases(
    draw: st.DrawFn,
    subject: RuleSubject,
    *,
    gates: tuple[str, ...] = ("sampled",),
    dtypes: tuple[torch.dtype, ...] | None = None,
    max_tokens: int | None = None,
    min_segments: int = 1,
    max_segments: int = 5,
    with_state: bool | None = None,
) -> ScanCase:
    """A scan of a rule; of the dtypes one is drawn, by default the widest that the subject takes."""
    return ScanCase(
        subject.rule,
        sizes=draw(rule_sizes(subject)),
        lengths=draw(ragged(max_tokens, min_segments, max_segments)),
        seed=draw(seeds),
        gates=draw(st.sampled_from(gates)),
        dtype=draw(st.sampled_from(dtypes or (subject.widest,))),
        with_state=draw(st.booleans()) if with_state is None else with_state,
    )


@dataclass(frozen=True)
class RoutingCase:
    """Choices of T tokens, made from a few drawn numbers.

    pattern: "random", "collapsed" (every token on the same memories) or "in turn". reads: choices that only read, on
    top of `choices` that then only write; None has every choice do both.
    """

    num_tokens: int
    num_memories: int
    choices: int
    reads: int | None
    pattern: str
    seed: int

    @cached_property
    def routing(self) -> Routing:
        generator = torch.Generator().manual_seed(self.seed)
        memory_ids = self.ids(self.choices, generator)
        weights = self.weights(self.choices, generator)
        writes = None
        if self.reads is not None:
            memory_ids = torch.cat([memory_ids, self.ids(self.reads, generator)], -1)
            weights = torch.cat([torch.zeros_like(weights), self.weights(self.reads, generator)], -1)
            writes = (torch.arange(self.choices + self.reads) < self.choices).repeat(self.num_tokens, 1)
        logits = torch.randn(self.num_tokens, self.num_memories, generator=generator, dtype=torch.float64)
        return Routing(weights, memory_ids, writes, weights.new_zeros(()), logits)

    def ids(self, count: int, generator: torch.Generator) -> Tensor:
        if self.pattern == "collapsed":
            return torch.randperm(self.num_memories, generator=generator)[:count].repeat(self.num_tokens, 1)
        if self.pattern == "in turn":
            return (torch.arange(self.num_tokens)[:, None] + torch.arange(count)) % self.num_memories
        return torch.rand(self.num_tokens, self.num_memories, generator=generator).argsort(-1)[:, :count]

    def weights(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(self.num_tokens, count, generator=generator, dtype=torch.float64).softmax(-1)


@st.composite
def routings(draw: st.DrawFn, num_tokens: int, num_memories: int) -> RoutingCase:
    """What a router may say: any number of choices, balanced or collapsed, some with slots that only read."""
    up_to_all = st.integers(1, num_memories)
    return RoutingCase(
        num_tokens,
        num_memories,
        choices=draw(up_to_all),
        reads=draw(st.one_of(up_to_all, st.none())),
        pattern=draw(st.sampled_from(("random", "collapsed", "in turn"))),
        seed=draw(seeds),
    )


@st.composite
def masks(draw: st.DrawFn, batch_size: int, length: int) -> Tensor:
    """`[B, T]`, False at padding: on the left, on the right, anywhere, or nowhere."""
    side = draw(st.sampled_from(("right", "left", "ragged", "none")))
    if side == "ragged":
        generator = torch.Generator().manual_seed(draw(seeds))
        return torch.rand(batch_size, length, generator=generator) < 0.7
    kept = torch.tensor([draw(st.integers(0, length)) for _ in range(batch_size)]).view(-1, 1)
    positions = torch.arange(length)
    if side == "none":
        return torch.ones(batch_size, length, dtype=torch.bool)
    return positions < kept if side == "right" else positions >= length - kept
