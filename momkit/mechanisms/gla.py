"""Gated linear attention."""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from momkit.mechanisms.base import (
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
from momkit.mechanisms.heads import expand_low_rank


class GLASpec(HeadSpec):
    """gate_low_rank: rank of the map to the gates. gate_logit_normalizer: the gate is its sigmoid to the power of
    1 / gate_logit_normalizer, so that memory starts out long."""

    kind: Literal["gla"] = "gla"
    gate_low_rank: PositiveInt = 16
    gate_logit_normalizer: float = Field(default=16.0, gt=0, allow_inf_nan=False)


class GLA(Mechanism):
    """Forget by a data-dependent rate, one a key channel.

    S_t = Diag(e^{gk_t}) S_{t-1} + k_t v_t^T      o_t = scale q_t^T S_t
    gk_t = log sigmoid(W2 W1 x_t + b) / gate_logit_normalizer

    Yang, Wang, Shen, Panda, Kim 2024, arXiv 2312.06635.
    """

    Spec = GLASpec
    spec: GLASpec
    structure = Structure(decay="key")

    def make_parameters(self) -> None:
        H, K = self.sizes["H"], self.sizes["K"]
        self.gate_weight = nn.Parameter(torch.empty(H * K, self.spec.gate_low_rank))
        self.gate_bias = nn.Parameter(torch.zeros(H, K))
        nn.init.xavier_uniform_(self.gate_weight, gain=2**-2.5)

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu"),
            Projection("k", (H, K), conv=True, activation="silu"),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("gk", (self.spec.gate_low_rank,)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        logits = expand_low_rank(projected["gk"], self.gate_weight, self.gate_bias)
        return projected | {"gk": nn.functional.logsigmoid(logits) / self.spec.gate_logit_normalizer}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "gk": Domain("T G K", high=0.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, gk = take(inputs, "q k v gk")
        S = state["S"] * torch.exp(gk).unsqueeze(-1) + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "gk": where_frozen(inputs["gk"], where, 0.0),
            "k": where_frozen(inputs["k"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }
