"""Gated DeltaNet."""

from typing import Literal

import torch
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    Projection,
    State,
    Structure,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.mechanisms.init import decay_rate, step_bias


class GatedDeltaNetSpec(HeadSpec):
    """Settings of Gated DeltaNet; `allow_neg_eigval` doubles beta, so that a write may overshoot (arXiv 2411.12537)."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    allow_neg_eigval: bool = False


class GatedDeltaNet(Mechanism):
    """Forget, then correct what the memory holds for this key.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      o_t = scale q_t^T S_t

    Yang, Kautz, Hatamizadeh 2025, arXiv 2412.06464.
    """

    Spec = GatedDeltaNetSpec
    spec: GatedDeltaNetSpec
    structure = Structure(decay="head", erase="delta", erase_sees="decayed")

    def make_parameters(self) -> None:
        self.A_log = nn.Parameter(decay_rate(self.sizes["H"]))
        self.dt_bias = nn.Parameter(step_bias(self.sizes["H"]))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu", l2=True),
            Projection("k", (H, K), conv=True, activation="silu", l2=True),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("beta", (H,), activation="sigmoid"),
            Projection("dt", (H,)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, beta, dt = take(projected, "q k v beta dt")
        g = -gate_dtype(self.A_log).exp() * nn.functional.softplus(gate_dtype(dt) + gate_dtype(self.dt_bias))
        return {"q": q, "k": k, "v": v, "g": g, "beta": 2 * beta if self.spec.allow_neg_eigval else beta}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K", unit_norm=True),
            "v": Domain("T H V"),
            "g": Domain("T H", high=0.0),
            "beta": Domain("T H", low=0.0, high=2.0 if self.spec.allow_neg_eigval else 1.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, g, beta = take(inputs, "q k v g beta")
        S = state["S"] * torch.exp(g)[..., None, None]
        u = beta[..., None] * (v - read(S, k))
        S = S + outer(k, u)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "g": where_frozen(inputs["g"], where, 0.0),
            "beta": where_frozen(inputs["beta"], where, 0.0),
        }
