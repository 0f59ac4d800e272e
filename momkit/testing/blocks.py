"""Blocks to check, the tokens they are given, and a router that routes as it is told."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from momkit.block import MoMBlock, MoMOutput
from momkit.routing.base import Router, RouterContext, RouterSpec, Routing
from momkit.testing.drawing import Draw
from momkit.testing.strategies import bounds, ragged, routings, seeds
from momkit.testing.subjects import HIDDEN_SIZE, BlockSubject


@dataclass(frozen=True)
class BlockCase:
    """A block and the packed tokens it is given, made from a few drawn numbers."""

    subject: BlockSubject
    lengths: tuple[int, ...]
    seed: int
    num_memories: int
    shared_memory: bool = True
    conv_size: int | None = 4

    def __repr__(self) -> str:
        return (
            f"BlockCase({self.subject.id}, lengths={self.lengths}, seed={self.seed}, num_memories={self.num_memories}, "
            f"shared_memory={self.shared_memory}, conv_size={self.conv_size})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @cached_property
    def block(self) -> MoMBlock:
        spec = self.subject.spec(self.num_memories, self.shared_memory, self.conv_size)
        return self.subject.build(spec, self.seed)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def x(self) -> Tensor:
        return self.random(self.seed + 1, self.num_tokens, HIDDEN_SIZE)

    @property
    def cu_seqlens(self) -> Tensor:
        return bounds(self.lengths)

    def random(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def sequence(self, b: int) -> slice:
        start = sum(self.lengths[:b])
        return slice(start, start + self.lengths[b])


@st.composite
def block_cases(
    draw: st.DrawFn, subject: BlockSubject, max_tokens: int = 40, min_sequences: int = 1, max_sequences: int = 3
) -> BlockCase:
    return BlockCase(
        subject,
        lengths=draw(ragged(max_tokens, min_sequences, max_sequences)),
        seed=draw(seeds),
        num_memories=draw(st.sampled_from(subject.legal_memories())),
        shared_memory=draw(st.booleans()),
        conv_size=draw(st.sampled_from((4, 2, 1, None))),
    )


class Scripted(Router):
    """Routes as it is told; for tests."""

    def __init__(self, num_memories: int, routing: Routing) -> None:
        nn.Module.__init__(self)
        self.spec, self.context = RouterSpec(kind="scripted"), RouterContext(HIDDEN_SIZE, num_memories)
        self.routing = routing
        self.at = 0

    @property
    def slots(self) -> int:
        return self.routing.memory_ids.shape[1]

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        rows = slice(self.at, self.at + len(x))
        self.at += len(x)
        writes = None if self.routing.writes is None else self.routing.writes[rows]
        parts = (self.routing.weights[rows], self.routing.memory_ids[rows], writes)
        return Routing(*parts, self.routing.aux_loss, self.routing.logits[rows])


def scripted_case(subject: BlockSubject, draw: Draw, max_tokens: int, most: int = 3) -> tuple[BlockCase, Routing]:
    """A block that is told where to route: anything a router may say, slots that only read among it."""
    case = draw(block_cases(subject, max_tokens, 1, most), "case")
    routing = draw(routings(case.num_tokens, case.num_memories), "routing").routing
    case.block.router = scripted(case, routing)
    return case, routing


def scripted(case: BlockCase, routing: Routing) -> Scripted:
    """A router that hands out the rows of a routing, one for each token it is asked about."""
    return Scripted(case.num_memories, routing)


def reordered(routing: Routing, order: Tensor) -> Routing:
    """The same choices, for tokens in another order."""
    writes = None if routing.writes is None else routing.writes[order]
    return Routing(routing.weights[order], routing.memory_ids[order], writes, routing.aux_loss, routing.logits[order])


def is_noisy(block: MoMBlock) -> bool:
    """Whether the router, in training, routes the same tokens differently the second time."""
    x = torch.ones(4, block.spec.hidden_size, dtype=torch.float64)
    training = block.router.training
    block.router.train()
    first, second = block.router.route(x), block.router.route(x)
    block.router.train(training)
    return not torch.equal(first.logits, second.logits)


def hidden_states(case: BlockCase, x: Tensor) -> Tensor:
    """Forward of packed tokens, any noise of the router drawn anew from the case's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        out: MoMOutput = case.block(x, cu_seqlens=case.cu_seqlens)
        return out.hidden_states
