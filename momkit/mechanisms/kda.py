"""Kimi Delta Attention."""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Domain,
    HeadSpec,
    Inputs,
    Mechanism,
    Projection,
    Sizes,
    State,
    Structure,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.mechanisms.heads import expand_low_rank
from momkit.mechanisms.init import decay_rate, step_bias


class KDASpec(HeadSpec):
    """Settings of KDA; `gate_low_rank` is the rank of the map to the decays, K when left out."""

    kind: Literal["kda"] = "kda"
    gate_low_rank: PositiveInt | None = None

    def sizes(self, hidden_size: int) -> Sizes:
        sizes = super().sizes(hidden_size)
        return sizes | {"rank": self.gate_low_rank or sizes["K"]}


class KDA(Mechanism):
    """Forget each key channel at its own pace, then correct what the memory holds for this key.

    S_t = (I - beta_t k_t k_t^T) Diag(e^{gk_t}) S_{t-1} + beta_t k_t v_t^T      o_t = scale q_t^T S_t

    Kimi Team 2025, arXiv 2510.26692.
    """

    Spec = KDASpec
    structure = Structure(decay="key", erase="delta", erase_sees="decayed")

    def make_parameters(self) -> None:
        H, K = self.sizes["H"], self.sizes["K"]
        self.dt_up = nn.Linear(self.sizes["rank"], H * K, bias=False)
        self.A_log = nn.Parameter(decay_rate(H, 1))
        self.dt_bias = nn.Parameter(step_bias(H, K))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu", l2=True),
            Projection("k", (H, K), conv=True, activation="silu", l2=True),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("beta", (H,), activation="sigmoid"),
            Projection("dt", (self.sizes["rank"],)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, beta, dt = take(projected, "q k v beta dt")
        dt = nn.functional.softplus(expand_low_rank(dt, self.dt_up.weight, self.dt_bias))
        gk = -gate_dtype(self.A_log).exp() * dt
        return {"q": q, "k": k, "v": v, "gk": gk, "beta": beta}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K", unit_norm=True),
            "v": Domain("T H V"),
            "gk": Domain("T G K", high=0.0),
            "beta": Domain("T H", low=0.0, high=1.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, gk, beta = take(inputs, "q k v gk beta")
        S = state["S"] * gk.exp()[..., None]
        S = S + outer(k, beta[..., None] * (v - read(S, k)))
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {name: where_frozen(inputs[name], where, 0.0) for name in ("gk", "beta")}
