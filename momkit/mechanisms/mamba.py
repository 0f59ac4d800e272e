"""Mamba's selective scan."""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Domain,
    Inputs,
    Mechanism,
    MechanismSpec,
    Projection,
    Sizes,
    State,
    gate_dtype,
    take,
    where_frozen,
)
from momkit.mechanisms.heads import expand_low_rank
from momkit.mechanisms.init import step_bias


class MambaSpec(MechanismSpec):
    """Settings of Mamba.

    Left out: `channels` is expand * hidden_size, `dt_rank` is hidden_size / 16, rounded up.
    """

    kind: Literal["mamba"] = "mamba"
    axes: ClassVar[dict[str, str]] = {"channels": "channels", "state_dim": "N"}
    expand: PositiveInt = 2
    channels: PositiveInt | None = None
    state_dim: PositiveInt = 16
    dt_rank: PositiveInt | None = None

    def sizes(self, hidden_size: int) -> Sizes:
        return {
            "channels": self.channels or self.expand * hidden_size,
            "N": self.state_dim,
            "rank": self.dt_rank or -(-hidden_size // 16),
        }


class Mamba(Mechanism):
    """A state space model of N numbers a channel, whose step size, write and read depend on the token.

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T      o_t = h_t C_t + D x_t      (e^{dt A} elementwise, A < 0)

    Gu, Dao 2023, arXiv 2312.00752. As there, dt, B and C are maps of x after its short convolution.
    """

    Spec = MambaSpec
    output_axes = "channels"
    value_input = "x"

    kernel_limits: ClassVar[dict[str, int]] = {"N": 256}

    def make_parameters(self) -> None:
        channels, N, rank = (self.sizes[a] for a in ("channels", "N", "rank"))
        self.x_proj = nn.Linear(channels, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_bias = nn.Parameter(step_bias(channels))
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    def projections(self) -> tuple[Projection, ...]:
        return (Projection("x", (self.sizes["channels"],), conv=True, conv_bias=True, activation="silu"),)

    def prepare(self, projected: Inputs) -> Inputs:
        x = projected["x"]
        N, rank = self.sizes["N"], self.sizes["rank"]
        dt, B, C = self.x_proj(x).split([rank, N, N], dim=-1)
        dt = nn.functional.softplus(expand_low_rank(dt, self.dt_proj.weight, self.dt_bias))
        return {"x": x, "dt": dt, "A": -gate_dtype(self.A_log).exp(), "B": B, "C": C, "D": self.D}

    def state_axes(self) -> dict[str, str]:
        return {"h": "channels N"}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "x": Domain("T channels"),
            "dt": Domain("T channels", low=0.0),
            # finite: the gate is dt A, and no step at all, dt = 0, must leave the state as it is
            "A": Domain("channels N", low=-1e4, high=0.0),
            "B": Domain("T N"),
            "C": Domain("T N"),
            "D": Domain("channels"),
        }

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Inputs:
        inputs = super().sample(generator, sizes)
        return inputs | {"A": -torch.randn(inputs["A"].shape, generator=generator, dtype=torch.float64).exp()}

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        x, dt, A, B, C, D = take(inputs, "x dt A B C D")
        h = state["h"] * (dt[..., None] * A).exp() + (dt * x)[..., None] * B[..., None, :]
        return {"h": h}, (h * C[..., None, :]).sum(-1) + D * x

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        # x stays: its way past the state, D x, belongs to the read
        return inputs | {"dt": where_frozen(inputs["dt"], where, 0.0)}

    def scan_kernel(self, inputs: Inputs, cu_seqlens: Tensor, state: State | None) -> tuple[Tensor, State]:
        from momkit.kernels.selective_scan import selective_scan

        x, dt, A, B, C, D = take(inputs, "x dt A B C D")
        output, h = selective_scan(x, dt, A.float(), B, C, D, cu_seqlens, None if state is None else state["h"])
        return output, {"h": h}

    def decode_kernel(self, inputs: Inputs, pool: State, state_index: Tensor) -> Tensor:
        from momkit.kernels.mamba_decode import decode_channels

        x, dt, A, B, C, D = take(inputs, "x dt A B C D")
        output: Tensor = decode_channels(x, dt, A.float(), B, C, D, pool["h"], state_index)
        return output
