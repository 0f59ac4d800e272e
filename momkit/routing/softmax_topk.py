"""Softmax top-k routing, the paper's."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from momkit.errors import InputError
from momkit.ops import on_kernels
from momkit.routing.balance import load_balance_loss
from momkit.routing.base import Router, RouterContext, RouterSpec, Routing


def check_choices(field: str, choices: int, num_memories: int) -> None:
    """Refuse more choices than there are memories, naming the router's field."""
    if choices > num_memories:
        raise InputError(f"router.{field} = {choices} is more than num_memories = {num_memories}")


class TopKSpec(RouterSpec):
    """Settings of a router that picks the `top_k` best memories."""

    top_k: PositiveInt = 2

    def check(self, num_memories: int) -> None:
        check_choices("top_k", self.top_k, num_memories)


class SoftmaxTopKSpec(TopKSpec):
    kind: Literal["softmax_topk"] = "softmax_topk"


def router_weight(context: RouterContext) -> nn.Parameter:
    """A learned map to one logit a memory, `[M, D]`, with logits of unit variance for a normalised token."""
    weight = torch.empty(context.num_memories, context.hidden_size)
    return nn.Parameter(nn.init.normal_(weight, std=context.hidden_size**-0.5))


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32 (float64 for a float64 module), whatever autocast says: near ties must not flip."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ weight.to(dtype).T


def top_k_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and ids `[T, top_k]` of the largest logits: their softmax, which is the renormalised full softmax."""
    # chosen by logit: probabilities that underflow to zero would tie
    top, memory_ids = logits.topk(top_k, dim=-1)
    return top.softmax(-1), memory_ids


class SoftmaxTopK(Router):
    """Softmax over all memories, the k largest kept and renormalised.

    p = softmax(x W);  w_j = p_{m_j} / sum_i p_{m_i} over the k largest m_1 ... m_k

    Du et al. 2025, arXiv 2502.13685.
    """

    Spec = SoftmaxTopKSpec
    spec: SoftmaxTopKSpec

    def __init__(self, spec: SoftmaxTopKSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.weight = router_weight(context)

    @property
    def slots(self) -> int:
        return self.spec.top_k

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        if on_kernels(x) and on_kernels(self.weight):
            from momkit.kernels.route import fits, route_top_k

            if fits(len(self.weight), self.spec.top_k):
                weights, memory_ids, logits, aux_loss = route_top_k(x, self.weight, mask, self.spec.top_k)
                return Routing(weights, memory_ids, None, aux_loss, logits)
        return self.route_in_torch(x, mask)

    def route_in_torch(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """The definition of `route`, and its form where no kernel can run."""
        logits = router_logits(x, self.weight)
        weights, memory_ids = top_k_softmax(logits, self.spec.top_k)
        return Routing(weights, memory_ids, None, load_balance_loss(logits.softmax(-1), memory_ids, mask), logits)
