"""RWKV-7."""

import math
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
    Sizes,
    State,
    Structure,
    gate_dtype,
    outer,
    read,
    take,
    where_frozen,
)
from momkit.mechanisms.heads import depth, expand_low_rank

# the steepest log decay of one token: w = exp(-e^{-1/2} sigmoid(.)) stays above 0.545
STEEPEST = -math.exp(-0.5)


class RWKV7Spec(HeadSpec):
    """Settings of RWKV-7; `decay_low_rank` and `gate_low_rank` are the ranks of the maps to the decays and to the
    in-context learning rates, 1.8 sqrt(hidden_size) to the nearest 32 when left out. `scale` is 1 when left out."""

    kind: Literal["rwkv7"] = "rwkv7"
    decay_low_rank: PositiveInt | None = None
    gate_low_rank: PositiveInt | None = None

    def sizes(self, hidden_size: int) -> Sizes:
        rank = max(32, 32 * round(1.8 * hidden_size**0.5 / 32))
        ranks = {"decay_low_rank": self.decay_low_rank or rank, "gate_low_rank": self.gate_low_rank or rank}
        return super().sizes(hidden_size) | ranks


class RWKV7(Mechanism):
    """Forget each key channel at its own pace, and replace what is held along one direction at a rate of its own.

    S_t = Diag(e^{gk_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      o_t = scale q_t^T S_t

    Peng et al. 2025, arXiv 2503.14456. Here a = -kappa and b = kappa * rate with kappa of unit norm; the segment's
    short convolution stands in for token shift, and there is no value residual.
    """

    Spec = RWKV7Spec
    spec: RWKV7Spec
    structure = Structure(decay="key", erase="low_rank", erase_sees="previous")

    wide = ("decay_bias",)

    def make_parameters(self) -> None:
        H, K = self.sizes["H"], self.sizes["K"]
        self.decay_weight = nn.Parameter(low_rank_up(self.sizes["decay_low_rank"], H * K))
        self.gate_weight = nn.Parameter(low_rank_up(self.sizes["gate_low_rank"], H * K))
        self.decay_bias = nn.Parameter(decay_ramp(H * K, depth(self.context)).view(H, K))
        self.gate_bias = nn.Parameter(torch.zeros(H, K))
        self.k_k = nn.Parameter(torch.full((H, K), 0.85))
        self.k_a = nn.Parameter(torch.ones(H, K))
        self.r_k = nn.Parameter(torch.zeros(H, K))

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        return (
            Projection("q", (H, K), shared=True, conv=True),
            Projection("k", (H, K), conv=True),
            Projection("v", (H, V), conv=True),
            Projection("decay", (self.sizes["decay_low_rank"],), conv=True, activation="tanh"),
            Projection("gate", (self.sizes["gate_low_rank"],), conv=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, decay, gate = take(projected, "q k v decay gate")
        decay = expand_low_rank(decay, self.decay_weight, self.decay_bias)
        rate = expand_low_rank(gate, self.gate_weight, self.gate_bias).sigmoid()
        kappa = nn.functional.normalize(gate_dtype(k) * self.k_k, dim=-1)
        return {
            "q": q,
            "gk": STEEPEST * decay.sigmoid(),
            "k": (k * (1 + (rate - 1) * self.k_a)).to(k.dtype),
            "v": v,
            "a": (-kappa).to(k.dtype),
            "b": (kappa * rate).to(k.dtype),
        }

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "gk": Domain("T G K", high=0.0),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "a": Domain("T G K", unit_norm=True),
            "b": Domain("T G K"),
        }

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Inputs:
        # independent a and b, or a rate above what the decay leaves, make the state explode
        inputs = super().sample(generator, sizes)
        a, b, gk = take(inputs, "a b gk")
        return inputs | {"gk": STEEPEST * (-gk).tanh(), "b": -a * b.sigmoid()}

    def scale_for(self, q: Tensor) -> float:
        return 1.0 if self.spec.scale is None else self.spec.scale

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, gk, k, v, a, b = take(inputs, "q gk k v a b")
        S = state["S"]
        S = S * gk.exp()[..., None] + outer(b, read(S, a)) + outer(k, v)
        return {"S": S}, self.scale_for(q) * read(S, q)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {name: where_frozen(inputs[name], where, 0.0) for name in ("gk", "k", "a", "b")}

    def finish(self, output: Tensor, inputs: Inputs, projected: Inputs) -> Tensor:
        # a token's bonus on its own value; none in a slot that only reads, where k is 0
        q, k, v = take(inputs, "q k v")
        return output + ((q * k * self.r_k).sum(-1, keepdim=True) * v).to(output.dtype)


def low_rank_up(rank: int, width: int) -> Tensor:
    """The second half `[width, rank]` of a low-rank map, orthogonal and small."""
    weight = torch.empty(width, rank)
    nn.init.orthogonal_(weight, gain=0.1 * max(1.0, (rank / width) ** 0.5))
    return weight


def decay_ramp(width: int, depth: float) -> Tensor:
    """Decay biases that rise over the channels, from long memory to short, and more steeply further up a model."""
    ramp: Tensor = torch.linspace(0, 1, width) ** (0.85 + depth**0.5)
    return 5 * ramp - 6.5
