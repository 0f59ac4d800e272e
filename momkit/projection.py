"""The projections of a block: every weight that turns tokens into a mechanism's inputs, for all memories at once."""

import math

import torch
from torch import Tensor, nn

from momkit.mechanisms.base import Inputs, Projection
from momkit.ops import Windows, activate, grouped_linear, l2_normalize, short_conv
from momkit.routing.dispatch import DispatchPlan


class Projections(nn.Module):
    """Linear, short convolution, activation and l2 norm, in this order, as the mechanism's projections ask.

    shared_weight: `[out, D]`, applied once a token. memory_weight: `[M(+1), out, D]`, one grouped product of all
    per-memory projections. conv_weight: name -> `[width, W]`, shared by all memories.
    """

    def __init__(
        self, projections: tuple[Projection, ...], hidden_size: int, num_groups: int, conv_size: int | None
    ) -> None:
        super().__init__()
        self.shared = tuple(p for p in projections if p.shared)
        self.per_memory = tuple(p for p in projections if not p.shared)
        self.convolved = tuple(p for p in projections if p.conv) if conv_size else ()
        self.order = projections
        bound = hidden_size**-0.5
        if self.shared:
            self.shared_weight = uniform(bound, sum(p.width for p in self.shared), hidden_size)
        if self.per_memory:
            self.memory_weight = uniform(bound, num_groups, sum(p.width for p in self.per_memory), hidden_size)
        self.bias = nn.ParameterDict(
            {p.name: nn.Parameter(torch.zeros(1 if p.shared else num_groups, p.width)) for p in projections if p.bias}
        )
        self.width = conv_size or 1
        self.conv_weight = nn.ParameterDict(
            {p.name: uniform(self.width**-0.5, p.width, self.width) for p in self.convolved}
        )
        self.conv_bias = nn.ParameterDict(
            {p.name: nn.Parameter(torch.zeros(p.width)) for p in self.convolved if p.conv_bias}
        )

    def forward(self, x: Tensor, plan: DispatchPlan, history: Inputs) -> tuple[Inputs, Inputs]:
        """`x` `[T, D]` and history name -> `[N, W-1, width]` to projections name -> `[R, *shape]` and new history."""
        parts: Inputs = {}
        if self.shared:
            per_token = nn.functional.linear(x, self.shared_weight).index_select(0, plan.slot_token)
            parts.update(split(per_token, self.shared))
        if self.per_memory:
            per_slot = grouped_linear(x.index_select(0, plan.slot_token), self.memory_weight, plan.memory_offsets)
            parts.update(split(per_slot, self.per_memory))
        for name, bias in self.bias.items():
            parts[name] = parts[name] + (bias if len(bias) == 1 else bias.index_select(0, plan.memory))
        new_history: Inputs = {}
        if self.convolved:
            windows = Windows.of(plan.cu_seqlens, plan.segment, plan.writes, self.width)
            for name, weight in self.conv_weight.items():
                bias = self.conv_bias.get(name)
                parts[name], new_history[name] = short_conv(parts[name], weight, bias, history[name], windows)
        projected: Inputs = {}
        for p in self.order:
            value = activate(parts[p.name], p.activation).view(-1, *p.shape)
            projected[p.name] = l2_normalize(value) if p.l2 else value
        return projected, new_history

    def empty_history(self, n: int) -> Inputs:
        """The history of n segments that have seen nothing."""
        return {name: weight.new_zeros(n, self.width - 1, len(weight)) for name, weight in self.conv_weight.items()}


def uniform(bound: float, *shape: int) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def split(x: Tensor, projections: tuple[Projection, ...]) -> Inputs:
    """Cut the last axis into the projections it was joined from."""
    parts = x.split([math.prod(p.shape) for p in projections], dim=-1)
    return {p.name: part for p, part in zip(projections, parts, strict=True)}
