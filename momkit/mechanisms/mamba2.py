"""Mamba-2."""

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


class Mamba2Spec(HeadSpec):
    """Reads are not scaled unless `scale` says so."""

    kind: Literal["mamba2"] = "mamba2"


class Mamba2(Mechanism):
    """Forget and write by one data-dependent step size a head.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T      o_t = scale q_t^T S_t + D x_t
    q = C, k = B, v_t = dt_t x_t, g_t = -e^{A_log} dt_t, dt_t = softplus(projected dt_t + dt_bias); scale is 1

    Dao, Gu 2024, arXiv 2405.21060. Every head has its own B and C; C, the query, is shared by all memories.
    """

    Spec = Mamba2Spec
    spec: Mamba2Spec
    structure = Structure(decay="head")

    def make_parameters(self) -> None:
        self.A_log = nn.Parameter(decay_rate(self.sizes["H"]))
        self.dt_bias = nn.Parameter(step_bias(self.sizes["H"]))
        self.D = nn.Parameter(torch.ones(self.sizes["H"]))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True, conv_bias=True, activation="silu"),
            Projection("k", (H, K), conv=True, conv_bias=True, activation="silu"),
            Projection("x", (H, V), conv=True, conv_bias=True, activation="silu"),
            Projection("dt", (H,)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, x, dt = take(projected, "q k x dt")
        dt = nn.functional.softplus(gate_dtype(dt) + gate_dtype(self.dt_bias))
        v = (dt.unsqueeze(-1) * x).to(x.dtype)
        return {"q": q, "k": k, "v": v, "g": -gate_dtype(self.A_log).exp() * dt}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "g": Domain("T H", high=0.0),
        }

    def scale_for(self, q: Tensor) -> float:
        return 1.0 if self.spec.scale is None else self.spec.scale

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, g = take(inputs, "q k v g")
        S = state["S"] * torch.exp(g)[..., None, None] + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "g": where_frozen(inputs["g"], where, 0.0),
            "k": where_frozen(inputs["k"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }

    def finish(self, output: Tensor, inputs: Inputs, projected: Inputs) -> Tensor:
        return (output + self.D.unsqueeze(-1) * projected["x"]).to(output.dtype)
