"""HGRN2."""

from typing import Literal

import torch
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Affine,
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
from momkit.mechanisms.heads import depth


class HGRN2Spec(HeadSpec):
    kind: Literal["hgrn2"] = "hgrn2"


class HGRN2(Mechanism):
    """Write to a key channel exactly what it forgets.

    S_t = Diag(e^{gk_t}) S_{t-1} + k_t v_t^T      k_t = 1 - e^{gk_t}      o_t = scale q_t^T S_t
    e^{gk_t} = lower + (1 - lower) sigmoid(f_t)      lower = layer_index / num_layers

    Qin et al. 2024, arXiv 2404.07904. The lower bound, which HGRN2 learns as a cumulative softmax over the layers, is
    the constant that this softmax gives when it is uniform: the first layer may forget all, higher ones ever less.
    """

    Spec = HGRN2Spec
    structure = Structure(decay="key")

    def make_parameters(self) -> None:
        assert self.context is not None
        self.lower_bound = depth(self.context) * (1 - 1 / self.context.num_layers)

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu"),
            Projection("f", (H, K), conv=True),
            Projection("v", (H, V), conv=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, f, v = take(projected, "q f v")
        return {"q": q, "v": v, "gk": self.log_forget(gate_dtype(f))}

    def log_forget(self, f: Tensor) -> Tensor:
        """log(lower + (1 - lower) sigmoid(f)), never above 0 and never minus infinity."""
        if self.lower_bound == 0:
            return nn.functional.logsigmoid(f)
        return torch.log1p((self.lower_bound - 1) * torch.sigmoid(-f))

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "v": Domain("T H V"),
            "gk": Domain("T G K", high=0.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, v, gk = take(inputs, "q v gk")
        k = -torch.expm1(gk)
        S = state["S"] * torch.exp(gk).unsqueeze(-1) + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "gk": where_frozen(inputs["gk"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }

    def lower(self, inputs: Inputs) -> Affine:
        return super().lower(inputs | {"k": -torch.expm1(inputs["gk"])})
