"""Load balance: the auxiliary loss of a layer, and figures that describe its routing."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.routing.base import Routing


def memory_load(memory_ids: Tensor, num_memories: int, mask: Tensor | None = None) -> Tensor:
    """Choices that fell on each memory: `[T, slots]` -> `[M]`, counted without a one-hot tensor."""
    weight = torch.ones_like(memory_ids) if mask is None else mask[:, None].expand_as(memory_ids).to(memory_ids.dtype)
    load = memory_ids.new_zeros(num_memories)
    return load.scatter_add(0, memory_ids.reshape(-1), weight.reshape(-1))


def load_balance_loss(probs: Tensor, memory_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The Switch loss of one layer: M * sum_m f_m p_m, equal to the number of choices a token makes when balanced.

    f_m is the number of choices of memory m a token, p_m the mean probability of memory m; `probs` `[T, M]`,
    `memory_ids` `[T, slots]`, `mask` `[T]` (padding is left out of both means; no token at all gives 0).
    Fedus, Zoph, Shazeer 2021, arXiv 2101.03961.
    """
    num_memories = probs.shape[-1]
    # a plain number where it can be: a tensor made from one is a copy from the host, which a CUDA graph can't hold
    tokens = max(1, len(probs)) if mask is None else mask.sum().clamp_min(1)
    if mask is not None:
        probs = torch.where(mask[:, None], probs, 0.0)
    f = memory_load(memory_ids, num_memories, mask).to(probs.dtype) / tokens
    p = probs.sum(0) / tokens
    return num_memories * (f * p).sum()


@dataclass(frozen=True)
class RoutingStats:
    """Figures of one layer's routing over its unmasked tokens.

    load: share of the choices that each memory got, `num_memories` numbers that sum to one (zeros without a token).
    entropy: of that share, over log M: 1 is balanced, 0 is collapsed to one memory; nan without a token or a choice.
    dropped: share of memories that got no token.
    margin: mean gap between the last chosen logit and the best one left out, over the slots that read; nan where
        nothing is left out.
    """

    load: tuple[float, ...]
    entropy: float
    dropped: float
    margin: float


def routing_stats(routing: Routing, mask: Tensor | None = None) -> RoutingStats:
    """Describe a routing; reads device values, so it synchronises: for logs, not for the training step."""
    num_memories = routing.logits.shape[-1]
    load = memory_load(routing.memory_ids, num_memories, mask).double()
    share = load / load.sum().clamp_min(1)
    describable = num_memories > 1 and bool(load.any())
    gap = choice_margin(routing)
    gap = gap[gap.isfinite() if mask is None else gap.isfinite() & mask]
    return RoutingStats(
        load=tuple(share.tolist()),
        entropy=float(torch.special.entr(share).sum()) / math.log(num_memories) if describable else math.nan,
        dropped=float((load == 0).double().mean()),
        margin=float(gap.mean()) if len(gap) else math.nan,
    )


def choice_margin(routing: Routing) -> Tensor:
    """Gap between the last chosen logit and the best one left out, `[T]`; infinite where nothing is left out."""
    logits = routing.logits.detach()
    # slots that only write, with weight 0, were chosen from other logits
    reads = torch.ones_like(routing.memory_ids)
    if routing.writes is not None:
        reads = (~routing.writes | (routing.weights != 0)).long()
    chosen = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, routing.memory_ids, reads) > 0
    return logits.masked_fill(~chosen, torch.inf).amin(1) - logits.masked_fill(chosen, -torch.inf).amax(1)
