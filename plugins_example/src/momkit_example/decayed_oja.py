"""Oja's rule with a decay."""

from typing import Literal

import torch
from torch import Tensor, nn

from momkit import Mechanism
from momkit.mechanisms.base import (
    Domain,
    HeadSpec,
    Inputs,
    Projection,
    State,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)


class DecayedOjaSpec(HeadSpec):
    kind: Literal["decayed_oja"] = "decayed_oja"


class DecayedOja(Mechanism):
    """Forget, then replace the key that the memory holds for this value.

    S_t = e^{g_t} S_{t-1} (I - beta_t v_t v_t^T) + beta_t k_t v_t^T      o_t = scale q_t^T S_t,   |v_t| = 1

    Oja 1982, Journal of Mathematical Biology 15, in matrix form, where the output of the neurons is the given value.
    The decay is this example's; where a delta rule erases along the key, this one erases along the value.
    """

    Spec = DecayedOjaSpec

    # no `structure`: an erase along the value is none of those that have a chunked form, so the step is lifted

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu", l2=True),
            Projection("k", (H, K), conv=True, activation="silu", l2=True),
            Projection("v", (H, V), conv=True, l2=True),
            Projection("beta", (H,), activation="sigmoid"),
            Projection("forget", (H,), bias=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, beta, forget = take(projected, "q k v beta forget")
        # forget = 0 keeps 0.96 of the memory a token
        g = nn.functional.logsigmoid(gate_dtype(forget)) / 16
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V", unit_norm=True),
            "g": Domain("T H", high=0.0),
            "beta": Domain("T H", low=0.0, high=1.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, g, beta = take(inputs, "q k v g beta")
        S = state["S"] * torch.exp(g)[..., None, None]
        held = read(S.mT, v)
        S = S + outer(beta[..., None] * (k - held), v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "g": where_frozen(inputs["g"], where, 0.0),
            "beta": where_frozen(inputs["beta"], where, 0.0),
        }
