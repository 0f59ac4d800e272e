"""The projections of a block: every weight that turns tokens into a mechanism's inputs, for all memories at once."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from momkit.errors import InputError
from momkit.mechanisms.base import Inputs, Projection
from momkit.ops import Windows, activate, l2_normalize, on_kernels, project_slots, short_conv
from momkit.routing.dispatch import DispatchPlan

if TYPE_CHECKING:
    from momkit.kernels.short_conv import Part


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
        per_token = nn.functional.linear(x, self.shared_weight) if self.shared else None
        order = (plan.memory_offsets, plan.slot_token, plan.token_slot)
        per_slot = project_slots(x, self.memory_weight, *order) if self.per_memory else None
        # kernels take slots that all write
        if on_kernels(x) and plan.writes is None:
            return self.convolve_fused(per_token, per_slot, plan, history)
        tokens = {} if per_token is None else split(per_token, self.shared)
        slots = {} if per_slot is None else split(per_slot, self.per_memory)
        for p in self.order:
            if p.bias:
                bias = self.get_parameter(f"{p.name}_bias")
                if p.shared:
                    tokens[p.name] = tokens[p.name] + bias
                else:
                    slots[p.name] = slots[p.name] + bias.index_select(0, plan.memory)
        return self.convolve(tokens, slots, plan, history)

    def convolve(
        self, per_token: Inputs, per_slot: Inputs, plan: DispatchPlan, history: Inputs
    ) -> tuple[Inputs, Inputs]:
        """Short convolution, activation and l2 norm in plain torch."""
        parts = {name: rows.index_select(0, plan.slot_token) for name, rows in per_token.items()} | per_slot
        new_history: Inputs = {}
        if self.convolved:
            windows = Windows.of(plan.cu_seqlens, plan.segment, plan.writes, self.width)
            for p in self.convolved:
                weight, bias = self.conv_parameters(p)
                assert weight is not None
                y, new_history[p.name] = short_conv(parts[p.name], weight, bias, history[p.name], windows)
                parts[p.name] = y
        projected: Inputs = {}
        for p in self.order:
            value = activate(parts[p.name], p.activation).view(-1, *p.shape)
            projected[p.name] = l2_normalize(value) if p.l2 else value
        return projected, new_history

    def convolve_fused(
        self, per_token: Tensor | None, per_slot: Tensor | None, plan: DispatchPlan, history: Inputs
    ) -> tuple[Inputs, Inputs]:
        """The same in kernels, and biases before it; rows of tokens `[T, all widths]` are gathered there."""
        from momkit.kernels.short_conv import conv_act_norm

        projected: Inputs = {}
        new_history: Inputs = {}
        gather = (plan.slot_token, plan.token_slot)
        for rows, projections, source in ((per_token, self.shared, gather), (per_slot, self.per_memory, ())):
            if rows is None:
                continue
            parts = self.parts(projections, history)
            values, histories = conv_act_norm(rows, parts, plan.cu_seqlens, plan.segment, *source)
            for p, value, kept in zip(projections, values, histories, strict=True):
                projected[p.name] = value.view(-1, *p.shape)
                if kept is not None:
                    new_history[p.name] = kept
        return projected, new_history

    def step_linear(
        self, x: Tensor, memory_ids: Tensor, shared_id: int | None, beside: Sequence[Tensor]
    ) -> tuple[Inputs, list[Tensor]]:
        """Linear maps of one token of each sequence, `x` `[B, D]`, in memories `[B, choices]` and `shared_id`.

        In one kernel: projections name -> `[B, width]`, or `[B, J, width]` of those per memory; and, since they read x
        as well, products with the weights beside.
        """
        from momkit.kernels.step_linear import step_linear

        weights = [*beside]
        if self.shared:
            weights.append(self.shared_weight)
        if self.per_memory:
            weights.append(self.memory_weight)
        products = step_linear(x, [weight.to(x.dtype) for weight in weights], memory_ids, shared_id)
        values = split(products[-1], self.per_memory) if self.per_memory else {}
        if self.shared:
            values |= split(products[len(beside)], self.shared)
        return values, products[: len(beside)]

    def step(
        self, values: Inputs, history: Inputs, memory_ids: Tensor, shared_id: int | None, writes: Tensor | None,
        state_index: Tensor | None, sequence_stride: int, memory_stride: int,
    ) -> tuple[Inputs, Tensor, Tensor]:  # fmt: skip
        """What follows linear maps, in one kernel: projections name -> `[B * J, *shape]`, rows and slots.

        History name -> `[P * M, W-1, width]` changes in place; arguments and what is returned are `step_conv`'s.
        """
        from momkit.kernels.step_conv import step_conv

        ys, rows, token_slot = step_conv(
            [values[p.name] for p in self.order], self.parts(self.order, history), memory_ids, shared_id, writes,
            state_index, sequence_stride, memory_stride,
        )  # fmt: skip
        projected = {p.name: y.view(-1, *p.shape) for p, y in zip(self.order, ys, strict=True)}
        return projected, rows, token_slot

    def parts(self, projections: tuple[Projection, ...], history: Inputs) -> list["Part"]:
        """What follows the linear map of some projections, as kernels take it."""
        from momkit.kernels.short_conv import Part

        return [
            Part(
                p.width,
                self.get_parameter(f"{p.name}_bias") if p.bias else None,
                *self.conv_parameters(p),
                history.get(p.name),
                p.activation,
                p.shape[-1] if p.l2 else 0,
            )
            for p in projections
        ]

    def conv_parameters(self, p: Projection) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of a projection's convolution, as far as it has them."""
        if p not in self.convolved:
            return None, None
        bias = self.get_parameter(f"{p.name}_conv_bias") if p.conv_bias else None
        return self.get_parameter(f"{p.name}_conv_weight"), bias

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
