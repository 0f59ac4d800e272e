"""Noisy top-k routing."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from momkit.routing.balance import load_balance_loss
from momkit.routing.base import Router, RouterContext, Routing
from momkit.routing.softmax_topk import TopKSpec, router_logits, router_weight, top_k_softmax


class NoisyTopKSpec(TopKSpec):
    kind: Literal["noisy_topk"] = "noisy_topk"


class NoisyTopK(Router):
    """In training, noise of a learned size on each logit lets a token try other memories; none in evaluation.

    h = x W + eps softplus(x W_noise), eps ~ N(0, I);  w = softmax of the k largest of h

    Shazeer et al. 2017, arXiv 1701.06538; its two balance losses give way to the Switch loss on softmax(h).
    """

    Spec = NoisyTopKSpec
    spec: NoisyTopKSpec

    def __init__(self, spec: NoisyTopKSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.weight = router_weight(context)
        # zeros, as in the paper: the same noise on every memory at the start
        self.noise_weight = nn.Parameter(torch.zeros(context.num_memories, context.hidden_size))

    @property
    def slots(self) -> int:
        return self.spec.top_k

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = router_logits(x, self.weight)
        if self.training:
            # from torch's own generator, whose state activation checkpointing restores
            logits = logits + torch.randn_like(logits) * softplus(router_logits(x, self.noise_weight))
        weights, memory_ids = top_k_softmax(logits, self.spec.top_k)
        return Routing(weights, memory_ids, None, load_balance_loss(logits.softmax(-1), memory_ids, mask), logits)
