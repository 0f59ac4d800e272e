"""Titans' neural memory, in its linear form."""

from typing import Literal

import torch
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    Projection,
    Sizes,
    State,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.mechanisms.init import step_bias


class TitansSpec(HeadSpec):
    kind: Literal["titans"] = "titans"


class Titans(Mechanism):
    """Gradient descent with momentum and weight decay on how well the memory maps keys to values.

    m_t = eta_t m_{t-1} - theta_t k_t (S_{t-1}^T k_t - v_t)^T      S_t = (1 - alpha_t) S_{t-1} + write_t m_t
    o_t = scale q_t^T S_t

    Behrouz, Zhong, Mirrokni 2025, arXiv 2501.00663, with a linear memory. There write = 1; it is 0 in slots that only
    read.
    """

    Spec = TitansSpec

    def make_parameters(self) -> None:
        # sigmoid(step_bias) = 1 - e^-dt: at the start a memory forgets 0.1 to 10 percent a token
        self.alpha_bias = nn.Parameter(step_bias(self.sizes["H"]))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu", l2=True),
            Projection("k", (H, K), conv=True, activation="silu", l2=True),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("eta", (H,)),
            Projection("theta", (H,)),
            Projection("alpha", (H,)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, eta, theta, alpha = take(projected, "q k v eta theta alpha")
        alpha = (gate_dtype(alpha) + self.alpha_bias).sigmoid()
        return {
            "q": q,
            "k": k,
            "v": v,
            "eta": gate_dtype(eta).sigmoid(),
            "theta": gate_dtype(theta).sigmoid(),
            "alpha": alpha,
            "write": torch.ones_like(alpha),
        }

    def state_axes(self) -> dict[str, str]:
        return {"S": "H K V", "m": "H K V"}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K", unit_norm=True),
            "v": Domain("T H V"),
            "eta": Domain("T H", low=0.0, high=1.0),
            "theta": Domain("T H", low=0.0, high=1.0),
            "alpha": Domain("T H", low=0.0, high=1.0),
            "write": Domain("T H", low=0.0, high=1.0),
        }

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Inputs:
        # momentum that hardly decays, fed with large steps, makes the state explode
        inputs = super().sample(generator, sizes)
        eta, theta, write = take(inputs, "eta theta write")
        return inputs | {"eta": 0.9 * eta, "theta": 0.2 * theta, "write": torch.ones_like(write)}

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, eta, theta, alpha, write = take(inputs, "q k v eta theta alpha write")
        S, m = take(state, "S m")
        surprise = outer(k, theta[..., None] * (read(S, k) - v))
        m = eta[..., None, None] * m - surprise
        S = (1 - alpha)[..., None, None] * S + write[..., None, None] * m
        return {"S": S, "m": m}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        still = {"eta": 1.0, "theta": 0.0, "alpha": 0.0, "write": 0.0}
        return inputs | {name: where_frozen(inputs[name], where, value) for name, value in still.items()}
