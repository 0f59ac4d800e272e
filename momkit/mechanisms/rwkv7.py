"""RWKV-7."""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Context,
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

# the steepest log decay of one token: w = exp(-e^{-1/2} sigmoid(.)) stays above 0.545
STEEPEST = -math.exp(-0.5)


class RWKV7Spec(HeadSpec):
    """Settings of RWKV-7; `decay_rank` and `gate_rank` are the ranks of the maps to decays and to in-context learning
    rates, 1.8 sqrt(hidden_size) to the nearest 32 when left out."""

    kind: Literal["rwkv7"] = "rwkv7"
    scale: float | None = Field(default=1.0, allow_inf_nan=False)
    decay_rank: PositiveInt | None = None
    gate_rank: PositiveInt | None = None

    def sizes(self, hidden_size: int) -> Sizes:
        rank = max(32, 32 * round(1.8 * hidden_size**0.5 / 32))
        ranks = {"decay_rank": self.decay_rank or rank, "gate_rank": self.gate_rank or rank}
        return super().sizes(hidden_size) | ranks


class RWKV7(Mechanism):
    """Forget each key channel at its own pace, and replace what is held along one direction at a rate of its own.

    S_t = Diag(e^{gk_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T      o_t = scale q_t^T S_t

    Peng et al. 2025, arXiv 2503.14456. Here a = -kappa and b = kappa * rate with kappa of unit norm; the segment's
    short convolution stands in for token shift, and there is no value residual.
    """

    Spec = RWKV7Spec
    structure = Structure(decay="key", erase="low_rank", erase_sees="previous")

    def make_parameters(self) -> None:
        assert self.context is not None
        H, K = self.sizes["H"], self.sizes["K"]
        self.decay_up = low_rank_up(self.sizes["decay_rank"], H * K)
        self.gate_up = low_rank_up(self.sizes["gate_rank"], H * K)
        self.decay_bias = nn.Parameter(decay_ramp(H * K, self.context).view(H, K))
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
            Projection("decay", (self.sizes["decay_rank"],), conv=True, activation="tanh"),
            Projection("gate", (self.sizes["gate_rank"],), conv=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, decay, gate = take(projected, "q k v decay gate")
        decay = gate_dtype(self.decay_up(decay)).unflatten(-1, self.decay_bias.shape) + self.decay_bias
        gate = gate_dtype(self.gate_up(gate)).unflatten(-1, self.gate_bias.shape) + self.gate_bias
        rate = gate.sigmoid()
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


def low_rank_up(rank: int, width: int) -> nn.Linear:
    """The second half of a low-rank map, orthogonal and small."""
    linear = nn.Linear(rank, width, bias=False)
    nn.init.orthogonal_(linear.weight, gain=0.1 * max(1.0, (rank / width) ** 0.5))
    return linear


def decay_ramp(width: int, context: Context) -> Tensor:
    """Decay biases that rise over the channels, from long memory to short, and more steeply in deeper layers."""
    depth = context.layer_index / max(1, context.num_layers - 1)
    return -6.5 + 5 * torch.linspace(0, 1, width) ** (0.85 + depth**0.5)
