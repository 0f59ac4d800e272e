"""Separate choices of where to write and where to read."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from momkit.routing.balance import load_balance_loss
from momkit.routing.base import Router, RouterContext, RouterSpec, Routing
from momkit.routing.softmax_topk import check_choices, router_logits, router_weight, top_k_softmax


class ReadWriteSpec(RouterSpec):
    """`k_write` memories take a token, `k_read` memories answer it; the two choices may overlap."""

    kind: Literal["read_write"] = "read_write"
    k_write: PositiveInt = 2
    k_read: PositiveInt = 2

    def check(self, num_memories: int) -> None:
        check_choices("k_write", self.k_write, num_memories)
        check_choices("k_read", self.k_read, num_memories)


class ReadWrite(Router):
    """A token is stored in some memories and answered by others, each choice with a router of its own.

    writes: the k_write largest of x W_write, w = 0;  reads: the k_read largest of x W_read, w = their softmax;
    aux_loss = switch(x W_write) + switch(x W_read)

    Top-k and weights as in Du et al. 2025, arXiv 2502.13685, for reads; separate write and read addresses as in
    Graves, Wayne, Danihelka 2014, arXiv 1410.5401.
    """

    # a write is all or nothing: a gate on it would mean another thing in every rule, and break `freeze`. So W_write has
    # no weight to learn from; its gradient is the balance loss, and it vanishes at k_write = M, where nothing is chosen
    Spec = ReadWriteSpec
    spec: ReadWriteSpec

    def __init__(self, spec: ReadWriteSpec, context: RouterContext) -> None:
        super().__init__(spec, context)
        self.write_weight = router_weight(context)
        self.read_weight = router_weight(context)

    @property
    def slots(self) -> int:
        return self.spec.k_write + self.spec.k_read

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """The routing's `logits` are those of the reads."""
        write_logits = router_logits(x, self.write_weight)
        read_logits = router_logits(x, self.read_weight)
        write_ids = write_logits.topk(self.spec.k_write, dim=-1).indices
        read_weights, read_ids = top_k_softmax(read_logits, self.spec.k_read)
        aux_loss = load_balance_loss(write_logits.softmax(-1), write_ids, mask)
        aux_loss = aux_loss + load_balance_loss(read_logits.softmax(-1), read_ids, mask)
        weights = torch.cat([read_weights.new_zeros(write_ids.shape), read_weights], dim=-1)
        writes = (torch.arange(self.slots, device=x.device) < self.spec.k_write).repeat(len(x), 1)
        return Routing(weights, torch.cat([write_ids, read_ids], dim=-1), writes, aux_loss, read_logits)
