"""The projections of a block: every weight that turns tokens into a mechanism's inputs, for all memories at once."""

import math

import torch
from torch import Tensor, nn

from momkit.errors import InputError
from momkit.mechanisms.base import Inputs, Projection
from momkit.ops import Windows, activate, grouped_linear, l2_normalize, short_conv
from momkit.routing.dispatch import DispatchPlan


class Projections(nn.Module):
    """Linear, short convolution, activation and l2 norm, in this order, as the mechanism's projections ask.

    shared_weight: `[out, D]`, applied once a token. memory_weight: `[M(+1), out, D]`, one grouped product of all
    per-memory projections. NAME_conv_weight: `[width, W]`, shared by all memories. NAME_bias, NAME_conv_bias: if asked.
    """

    def __init__(
        self, projections: tuple[Projection, ...], hidden_size: int, num_groups: int, conv_size: int | None
    ) -> None:
        super().__init__()
        names = [p.name for p in projections]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"projections {sorted(repeated)} are named twice")
        self.shared = tuple(p for p in projections if p.shared)
        self.per_memory = tuple(p for p in projections if not p.shared)
        self.convolved = tuple(p for p in projections if p.conv) if conv_size else ()
        self.order = projections
        bound = hidden_size**-0.5
        if self.shared:
            self.shared_weight = uniform(bound, sum(p.width for p in self.shared), hidden_size)
        if self.per_memory:
            self.memory_weight = uniform(bound, num_groups, sum(p.width for p in self.per_memory), hidden_size)
        self.width = conv_size or 1
        for p in projections:
            if p.bias:
                shape = (1 if p.shared else num_groups, p.width)
                self.register_parameter(f"{p.name}_bias", nn.Parameter(torch.zeros(shape)))
        for p in self.convolved:
            self.register_parameter(f"{p.name}_conv_weight", uniform(self.width**-0.5, p.width, self.width))
            if p.conv_bias:
                self.register_parameter(f"{p.name}_conv_bias", nn.Parameter(torch.zeros(p.width)))

    def forward(self, x: Tensor, plan: DispatchPlan, history: Inputs) -> tuple[Inputs, Inputs]:
        """`x` `[T, D]` and history name -> `[N, W-1, width]` to projections name -> `[R, *shape]` and new history."""
        parts: Inputs = {}
        if self.shared:
            per_token = nn.functional.linear(x, self.shared_weight).index_select(0, plan.slot_token)
            parts.update(split(per_token, self.shared))
        if self.per_memory:
            per_slot = grouped_linear(x.index_select(0, plan.slot_token), self.memory_weight, plan.memory_offsets)
            parts.update(split(per_slot, self.per_memory))
        for p in self.order:
            if p.bias:
                bias = self.get_parameter(f"{p.name}_bias")
                parts[p.name] = parts[p.name] + (bias if p.shared else bias.index_select(0, plan.memory))
        new_history: Inputs = {}
        if self.convolved:
            windows = Windows.of(plan.cu_seqlens, plan.segment, plan.writes, self.width)
            for p in self.convolved:
                weight = self.get_parameter(f"{p.name}_conv_weight")
                conv_bias = self.get_parameter(f"{p.name}_conv_bias") if p.conv_bias else None
                y, new_history[p.name] = short_conv(parts[p.name], weight, conv_bias, history[p.name], windows)
                parts[p.name] = y
        projected: Inputs = {}
        for p in self.order:
            value = activate(parts[p.name], p.activation).view(-1, *p.shape)
            projected[p.name] = l2_normalize(value) if p.l2 else value
        return projected, new_history

    def empty_history(self, n: int) -> Inputs:
        """The history of n segments that have seen nothing."""
        weights = {p: self.get_parameter(f"{p.name}_conv_weight") for p in self.convolved}
        return {p.name: weight.new_zeros(n, self.width - 1, p.width) for p, weight in weights.items()}


def uniform(bound: float, *shape: int) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def split(x: Tensor, projections: tuple[Projection, ...]) -> Inputs:
    """Cut the last axis into the projections it was joined from."""
    parts = x.split([math.prod(p.shape) for p in projections], dim=-1)
    return {p.name: part for p, part in zip(projections, parts, strict=True)}
