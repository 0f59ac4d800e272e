"""Sigmoid top-k routing with loss-free balancing."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from momkit.errors import InputError
from momkit.routing.balance import load_balance_loss
from momkit.routing.base import Router, RouterContext, Routing
from momkit.routing.softmax_topk import TopKSpec, router_logits, router_weight


class SigmoidTopKSpec(TopKSpec):
    """`update_rate` is how far `update` moves a bias; 0 leaves balance to the auxiliary loss."""

    kind: Literal["sigmoid_topk"] = "sigmoid_topk"
    update_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)


class SigmoidTopK(Router):
    """Independent scores, the choice steered towards balance by a bias that no gradient and no weight sees.

    s = sigmoid(x W);  m_1 ... m_k the k largest of s + b;  w_j = s_{m_j} / sum_i s_{m_i};
    after a step, b_m += u sign(mean load - load_m)

    Wang et al. 2024, arXiv 2408.15664.
    """

    Spec = SigmoidTopKSpec
    spec: SigmoidTopKSpec
    bias: Tensor

    wide = ("bias",)

    def __init__(self, spec: SigmoidTopKSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.weight = router_weight(context)
        self.register_buffer("bias", torch.zeros(context.num_memories))

    @property
    def slots(self) -> int:
        return self.spec.top_k

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """The routing's `logits` are s + b, which the choice is made from."""
        log_scores = logsigmoid(router_logits(x, self.weight))
        biased = log_scores.exp() + self.bias
        memory_ids = biased.topk(self.spec.top_k, dim=-1).indices
        # a softmax of log scores divides by their sum, and holds where every score underflows
        weights = log_scores.gather(1, memory_ids).softmax(-1)
        return Routing(weights, memory_ids, None, load_balance_loss(log_scores.softmax(-1), memory_ids, mask), biased)

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Raise the bias of memories below the mean load `[M]`, lower the others; call it after backward.

        `load` is `memory_load` of the step's routing, summed over micro-batches and ranks.
        """
        if load.shape != self.bias.shape:
            raise InputError(f"load has shape {list(load.shape)}; it must be {list(self.bias.shape)}, one a memory")
        # in counts, where a balanced load is exactly zero away from its mean
        direction = (load.sum() - len(self.bias) * load).sign()
        self.bias.add_(direction.to(self.bias), alpha=self.spec.update_rate)
