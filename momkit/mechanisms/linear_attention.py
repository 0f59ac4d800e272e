"""Linear attention."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from momkit.mechanisms.base import (
    AffineScan,
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

FeatureMap = Literal["none", "silu", "relu", "elu"]


class LinearAttentionSpec(HeadSpec):
    """normalize: divide each read by q^T z, z the sum of the keys, at least `eps`.

    feature_map: what queries and keys go through ("elu" is elu(x) + 1). Left out, it is "silu", or "elu" with
    `normalize`, which needs features that are not negative.
    """

    kind: Literal["linear_attention"] = "linear_attention"
    normalize: bool = False
    feature_map: FeatureMap | None = None
    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_feature_map(self) -> "LinearAttentionSpec":
        if self.normalize and self.feature_map in ("none", "silu"):
            raise ValueError(f"feature_map = {self.feature_map!r} can be negative; allowed with normalize: elu, relu")
        return self


class LinearAttention(Mechanism):
    """Add every key-value pair to the memory, and never forget.

    S_t = S_{t-1} + k_t v_t^T      o_t = scale q_t^T S_t
    With `normalize`: z_t = z_{t-1} + k_t      o_t = scale q_t^T S_t / max(q_t^T z_t, eps)

    Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236.
    """

    Spec = LinearAttentionSpec
    spec: LinearAttentionSpec
    structure = Structure(decay="none")

    @property
    def extra_columns(self) -> int:  # type: ignore[override]
        return int(self.spec.normalize)

    @property
    def feature_map(self) -> FeatureMap:
        return self.spec.feature_map or ("elu" if self.spec.normalize else "silu")

    def projections(self) -> tuple[Projection, ...]:
        H, K, V = (self.sizes[a] for a in "HKV")
        activation: Literal["silu", "none"] = "silu" if self.feature_map == "silu" else "none"
        return (
            Projection("q", (H, K), shared=True, conv=True, activation=activation),
            Projection("k", (H, K), conv=True, activation=activation),
            Projection("v", (H, V), conv=True),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v = take(projected, "q k v")
        if self.feature_map == "relu":
            q, k = q.relu(), k.relu()
        elif self.feature_map == "elu":
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        return {"q": q, "k": k, "v": v}

    def inputs_domain(self) -> dict[str, Domain]:
        features = Domain("T G K", low=0.0) if self.spec.normalize else Domain("T G K")
        return {"q": features, "k": features, "v": Domain("T H V")}

    def state_axes(self) -> dict[str, str]:
        return {"S": "H K V", "z": "H K"} if self.spec.normalize else {"S": "H K V"}

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v = take(inputs, "q k v")
        S = state["S"] + outer(k, v)
        output = self.scale_for(q) * read(S, q)
        if not self.spec.normalize:
            return {"S": S}, output
        z = state["z"] + k
        total = (q * z).sum(-1, keepdim=True)
        return {"S": S, "z": z}, output / total.clamp_min(self.spec.eps)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {
            "k": where_frozen(inputs["k"], where, 0.0),
            "v": where_frozen(inputs["v"], where, 0.0),
        }

    def compose(self, inputs: Inputs, state: State, affine: AffineScan) -> tuple[Tensor, State]:
        """With `normalize`, z is one more column of S, written by a value that is always one."""
        if not self.spec.normalize:
            return super().compose(inputs, state, affine)
        v = inputs["v"]
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        columns = torch.cat([state["S"], state["z"].unsqueeze(-1)], dim=-1)
        output, columns = affine(self.structure, replace(self.lower(inputs | {"v": values}), scale=1.0), columns)
        total = output[..., -1:].clamp_min(self.spec.eps)
        output = self.scale_for(inputs["q"]) * output[..., :-1] / total
        return output, {"S": columns[..., :-1], "z": columns[..., -1]}
