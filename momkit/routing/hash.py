"""Hash routing: fixed random projections, nothing learned."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from momkit.routing.base import Router, RouterContext, Routing
from momkit.routing.softmax_topk import TopKSpec, router_logits


class HashRouterSpec(TopKSpec):
    """`seed` and the layer's index decide the projections."""

    kind: Literal["hash"] = "hash"
    seed: int = Field(default=0, ge=0, lt=2**32)


def hash_projection(seed: int, context: RouterContext) -> Tensor:
    """Gaussian directions `[M, D]` that depend on seed and layer alone, not on torch's global generator."""
    # the generator keeps 32 bits of its seed; a large odd step sets layers far apart in them
    mixed = (seed + 0x9E3779B1 * context.layer_index) % 2**32
    generator = torch.Generator("cpu").manual_seed(mixed)
    shape = (context.num_memories, context.hidden_size)
    directions = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    # rounded now, so that `module.bfloat16()` later sends no token elsewhere
    rounded = (directions / math.sqrt(context.hidden_size)).bfloat16().to(torch.get_default_dtype())
    device: torch.device = torch.get_default_device()
    return rounded.to(device)


class HashRouter(Router):
    """Similar tokens go to the same memories, by a locality-sensitive hash that is never trained.

    m_1 ... m_k the k largest of x R, R fixed and Gaussian;  w_j = 1 / k;  no auxiliary loss

    Roller et al. 2021, arXiv 2106.04426 (hash layers); Andoni et al. 2015, arXiv 1509.02897 (hashing by the largest
    of random projections).
    """

    Spec = HashRouterSpec
    spec: HashRouterSpec
    projection: Tensor

    def __init__(self, spec: HashRouterSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.register_buffer("projection", hash_projection(spec.seed, context))

    @property
    def slots(self) -> int:
        return self.spec.top_k

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = router_logits(x, self.projection)
        memory_ids = logits.topk(self.spec.top_k, dim=-1).indices
        weights = logits.new_full(memory_ids.shape, 1 / self.spec.top_k)
        return Routing(weights, memory_ids, None, logits.new_zeros(()), logits)
