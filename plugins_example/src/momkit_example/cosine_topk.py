"""Top-k routing by direction, at a learned temperature."""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from momkit import Router, RouterSpec, Routing
from momkit.routing.balance import load_balance_loss
from momkit.routing.base import RouterContext


class CosineTopKSpec(RouterSpec):
    """`top_k` memories a token; `temperature` is where the learned one starts."""

    kind: Literal["cosine_topk"] = "cosine_topk"
    top_k: PositiveInt = 2
    temperature: float = Field(default=0.2, gt=0, allow_inf_nan=False)

    def check(self, num_memories: int) -> None:
        if self.top_k > num_memories:
            raise ValueError(f"router.top_k = {self.top_k} is more than num_memories = {num_memories}")


class CosineTopK(Router):
    """A token goes to the memories nearest to it in direction, however long it is.

    s_m = cos(x, e_m) / tau;  w_j = softmax of s over the k largest m_1 ... m_k;  e_m and tau > 0 learned

    Scores as in Chi et al. 2022, arXiv 2204.09179, without its projection to fewer dimensions; weights are
    renormalised as momkit's softmax_topk does.
    """

    Spec = CosineTopKSpec
    spec: CosineTopKSpec

    def __init__(self, spec: CosineTopKSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.directions = nn.Parameter(torch.randn(context.num_memories, context.hidden_size))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(spec.temperature)))

    @property
    def slots(self) -> int:
        return self.spec.top_k

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        # fp32, or float64 in a float64 module, even under autocast: near ties must not flip
        dtype = torch.float64 if self.directions.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            token = nn.functional.normalize(x.to(dtype), dim=-1)
            direction = nn.functional.normalize(self.directions.to(dtype), dim=-1)
            logits = token @ direction.T * torch.exp(-self.log_temperature.to(dtype))
        top, memory_ids = logits.topk(self.spec.top_k, dim=-1)
        aux_loss = load_balance_loss(logits.softmax(-1), memory_ids, mask)
        return Routing(top.softmax(-1), memory_ids, None, aux_loss, logits)
