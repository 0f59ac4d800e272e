"""DeltaNet."""

from typing import Literal

from torch import Tensor

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


class DeltaNetSpec(HeadSpec):
    """Settings of DeltaNet; `allow_neg_eigval` doubles beta, so that a write may overshoot (arXiv 2411.12537)."""

    kind: Literal["deltanet"] = "deltanet"
    allow_neg_eigval: bool = False


class DeltaNet(Mechanism):
    """Correct what the memory holds for this key.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      o_t = scale q_t^T S_t

    Schlag, Irie, Schmidhuber 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484.
    """

    Spec = DeltaNetSpec
    spec: DeltaNetSpec
    structure = Structure(decay="none", erase="delta")

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu", l2=True),
            Projection("k", (H, K), conv=True, activation="silu", l2=True),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("beta", (H,), activation="sigmoid"),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, beta = take(projected, "q k v beta")
        return {"q": q, "k": k, "v": v, "beta": 2 * beta if self.spec.allow_neg_eigval else beta}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K", unit_norm=True),
            "v": Domain("T H V"),
            "beta": Domain("T H", low=0.0, high=2.0 if self.spec.allow_neg_eigval else 1.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, beta = take(inputs, "q k v beta")
        S = state["S"]
        S = S + outer(k, beta[..., None] * (v - read(S, k)))
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {"beta": where_frozen(inputs["beta"], where, 0.0)}
