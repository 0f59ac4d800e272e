"""Dense routing: every token goes to every memory."""

from typing import Literal

import torch
from torch import Tensor

from momkit.routing.base import Router, RouterContext, RouterSpec, Routing
from momkit.routing.softmax_topk import router_logits, router_weight


class DenseSpec(RouterSpec):
    kind: Literal["dense"] = "dense"


class Dense(Router):
    """All memories take every token, and are mixed by a softmax; the upper bound that sparse routing is held to.

    w = softmax(x W);  m_j = j;  no auxiliary loss: load is equal by construction, the Switch loss a constant M

    Jordan, Jacobs 1994, Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6(2).
    """

    Spec = DenseSpec

    def __init__(self, spec: DenseSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.weight = router_weight(context)

    @property
    def slots(self) -> int:
        return self.context.num_memories

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = router_logits(x, self.weight)
        memory_ids = torch.arange(self.slots, device=x.device).repeat(len(x), 1)
        return Routing(logits.softmax(-1), memory_ids, None, logits.new_zeros(()), logits)
