"""TTT-Linear: test-time training of a linear model."""

from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
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


class TTTLinearSpec(HeadSpec):
    """Settings of TTT-Linear; `base_lr` is the largest inner learning rate, before its division by K, and `norm_eps`
    the inner norm's. `scale` is 1 when left out."""

    kind: Literal["ttt_linear"] = "ttt_linear"
    base_lr: PositiveFloat = Field(default=1.0, allow_inf_nan=False)
    norm_eps: PositiveFloat = Field(default=1e-6, allow_inf_nan=False)

    @model_validator(mode="after")
    def square(self) -> Self:
        if self.head_v_dim not in (None, self.head_dim):
            raise ValueError(
                f"ttt_linear: head_v_dim = {self.head_v_dim} must equal head_dim = {self.head_dim}, or be left out"
            )
        return self


class TTTLinear(Mechanism):
    """A linear model with a norm and a residual, trained by one gradient step a token to turn keys into values.

    f(x) = x + LN(W^T x + b)      (W_t, b_t) = (W, b)_{t-1} - eta_t grad 1/2 |LN(W^T k_t + b) - (v_t - k_t)|^2
    o_t = scale f_t(q_t)

    Sun et al. 2024, arXiv 2407.04620, with mini-batches of one token. Values have the keys' dim, hence one axis K.
    """

    Spec = TTTLinearSpec
    spec: TTTLinearSpec
    output_axes = "H K"

    def make_parameters(self) -> None:
        H, K = self.sizes["H"], self.sizes["K"]
        self.W0 = nn.Parameter(torch.randn(H, K, K) * 0.02)
        self.b0 = nn.Parameter(torch.zeros(H, K))
        self.ln_w = nn.Parameter(torch.ones(H, K))
        self.ln_b = nn.Parameter(torch.zeros(H, K))

    def projections(self) -> tuple[Projection, ...]:
        H, K = self.sizes["H"], self.sizes["K"]
        return (
            Projection("q", (H, K), shared=True, conv=True),
            Projection("k", (H, K), conv=True),
            Projection("v", (H, K)),
            Projection("eta", (H,), bias=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, eta = take(projected, "q k v eta")
        eta = gate_dtype(eta).sigmoid() * (self.spec.base_lr / self.sizes["K"])
        return {"q": q, "k": k, "v": v, "eta": eta, "ln_w": self.ln_w, "ln_b": self.ln_b}

    def state_axes(self) -> dict[str, str]:
        return {"W": "H K K", "b": "H K"}

    def initial_state(self, n: int) -> State:
        return {"W": gate_dtype(self.W0).repeat(n, 1, 1, 1), "b": gate_dtype(self.b0).repeat(n, 1, 1)}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H K"),
            "eta": Domain("T H", low=0.0, high=1.0),
            "ln_w": Domain("H K"),
            "ln_b": Domain("H K"),
        }

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Inputs:
        # as `prepare` gives it, at most about 1 / |k|^2: larger steps overshoot
        inputs = super().sample(generator, sizes)
        return inputs | {"eta": inputs["eta"] / sizes["K"]}

    def scale_for(self, q: Tensor) -> float:
        return 1.0 if self.spec.scale is None else self.spec.scale

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, eta, ln_w, ln_b = take(inputs, "q k v eta ln_w ln_b")
        W, b = take(state, "W b")
        grad = self.inner_gradient(read(W, k) + b, v - k, ln_w, ln_b)
        b = b - eta[..., None] * grad
        W = W - outer(k, eta[..., None] * grad)
        normed, _ = self.normalise(read(W, q) + b)
        return {"W": W, "b": b}, self.scale_for(q) * (q + normed * ln_w + ln_b)

    def normalise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z with mean 0 and variance 1 over its last axis, and the factor that took it there."""
        z = z - z.mean(-1, keepdim=True)
        factor = (z.square().mean(-1, keepdim=True) + self.spec.norm_eps).rsqrt()
        return z * factor, factor

    def inner_gradient(self, z: Tensor, target: Tensor, ln_w: Tensor, ln_b: Tensor) -> Tensor:
        """The gradient of 1/2 |LN(z) - target|^2 by z, in closed form, so that a step can itself be differentiated."""
        normed, factor = self.normalise(z)
        d = ln_w * (normed * ln_w + ln_b - target)
        return factor * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {"eta": where_frozen(inputs["eta"], where, 0.0)}
