"""RWKV-6 (Finch)."""

from typing import Literal

import torch
from pydantic import PositiveInt
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
from momkit.mechanisms.heads import depth, expand_low_rank


class RWKV6Spec(HeadSpec):
    """gate_low_rank: rank of the map to the decays. Reads are not scaled unless `scale` says so."""

    kind: Literal["rwkv6"] = "rwkv6"
    gate_low_rank: PositiveInt = 64


class RWKV6(Mechanism):
    """Read before writing, the current token by a bonus of its own, then forget by a rate a key channel.

    o_t = scale q_t^T (S_{t-1} + Diag(u) k_t v_t^T)      S_t = Diag(e^{gk_t}) S_{t-1} + k_t v_t^T
    gk_t = -exp(w0 + W2 tanh(W1 x_t)); q is the receptance; scale is 1

    Peng et al. 2024, arXiv 2404.05892. The segment's short conv stands in for token shift.
    """

    Spec = RWKV6Spec
    spec: RWKV6Spec
    structure = Structure(decay="key", read="before")

    wide = ("w0",)

    def make_parameters(self) -> None:
        H, K = self.sizes["H"], self.sizes["K"]
        height = depth(self.context)
        channel = torch.arange(H * K, dtype=torch.get_default_dtype())
        position = channel / max(1, H * K - 1)
        self.w0 = nn.Parameter((5 * position ** (0.7 + 1.3 * height) - 6).view(H, K))
        self.decay_weight = nn.Parameter(torch.empty(H * K, self.spec.gate_low_rank).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((channel + 1) % 3 - 1)
        self.u = nn.Parameter((height * (1 - position) + zigzag).view(H, K))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True),
            Projection("k", (H, K), conv=True),
            Projection("v", (H, V), conv=True),
            Projection("gk", (self.spec.gate_low_rank,), conv=True, activation="tanh"),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        gk = -torch.exp(expand_low_rank(projected["gk"], self.decay_weight, self.w0))
        return projected | {"gk": gk, "u": gate_dtype(self.u)}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "gk": Domain("T G K", high=0.0),
            "u": Domain("H K"),
        }

    def scale_for(self, q: Tensor) -> float:
        return 1.0 if self.spec.scale is None else self.spec.scale

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, gk, u = take(inputs, "q k v gk u")
        S, write = state["S"], outer(k, v)
        output = self.scale_for(q) * read(S + u.unsqueeze(-1) * write, q)
        return {"S": S * torch.exp(gk).unsqueeze(-1) + write}, output

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "gk": where_frozen(inputs["gk"], where, 0.0),
            "k": where_frozen(inputs["k"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }
