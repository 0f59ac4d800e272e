"""Retention, the recurrence of RetNet."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from momkit.mechanisms.base import (
    Activation,
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    Projection,
    State,
    Structure,
    outer,
    read,
    take,
    where_frozen,
)


class RetentionSpec(HeadSpec):
    kind: Literal["retention"] = "retention"


class Retention(Mechanism):
    """Forget at a fixed rate, one a head.

    S_t = e^g S_{t-1} + k_t v_t^T      o_t = scale q_t^T S_t      e^g = 1 - 2^{-5-h} for head h

    Sun et al. 2023, arXiv 2307.08621, without its rotation of queries and keys: a memory's time is the order of its
    tokens, and the segment's short conv gives the neighbourhood.
    """

    Spec: ClassVar[type[HeadSpec]] = RetentionSpec
    structure = Structure(decay="constant")
    activation: ClassVar[Activation] = "none"

    def log_decay(self, heads: Tensor) -> Tensor:
        """g of the heads numbered `heads` `[H]`."""
        return torch.log1p(-torch.exp2(-5.0 - heads))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation=self.activation),
            Projection("k", (H, K), conv=True, activation=self.activation),
            Projection("v", (H, V), conv=True, activation=self.activation),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v = take(projected, "q k v")
        # made here and not kept in a buffer, which module.to(bfloat16) would round
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        heads = torch.arange(self.sizes["H"], dtype=dtype, device=v.device)
        return {"q": q, "k": k, "v": v, "g": self.log_decay(heads)}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "g": Domain("H", high=0.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, g = take(inputs, "q k v g")
        S = state["S"] * torch.exp(g)[..., None, None] + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        g = inputs["g"].expand(len(where), inputs["g"].shape[-1])  # a constant that now varies along time
        return inputs | {
            "g": where_frozen(g, where, 0.0),
            "k": where_frozen(inputs["k"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }
