"""Gated slot attention."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from momkit.mechanisms.base import (
    Affine,
    AffineScan,
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


class GatedSlotAttentionSpec(HeadSpec):
    """Settings of gated slot attention; forget gates are sigmoids to the power 1 / `gate_logit_normalizer`."""

    kind: Literal["gsa"] = "gsa"
    axes: ClassVar[dict[str, str]] = HeadSpec.axes | {"num_slots": "slots"}
    num_slots: PositiveInt = 64
    gate_logit_normalizer: float = Field(default=8.0, gt=0, allow_inf_nan=False)

    def sizes(self, hidden_size: int) -> Sizes:
        return super().sizes(hidden_size) | {"slots": self.num_slots}


class GatedSlotAttention(Mechanism):
    """Softmax attention over a fixed number of slots, each a gated average of keys and of values.

    Kt_t = Kt_{t-1} Diag(e^{gs_t}) + k_t s_t^T      Vt_t = Diag(e^{gs_t}) Vt_{t-1} + s_t v_t^T
    o_t = softmax(scale q_t^T Kt_t) Vt_t

    Zhang et al. 2024, arXiv 2409.07146. There s = 1 - e^gs.
    """

    Spec = GatedSlotAttentionSpec
    spec: GatedSlotAttentionSpec

    def projections(self) -> tuple[Projection, ...]:
        H, K, V, slots = (self.sizes[a] for a in ("H", "K", "V", "slots"))
        return (
            Projection("q", (H, K), shared=True, conv=True, activation="silu"),
            Projection("k", (H, K), conv=True, activation="silu"),
            Projection("v", (H, V), conv=True, activation="silu"),
            Projection("f", (H, slots)),
        )

    def prepare(self, projected: Inputs) -> Inputs:
        q, k, v, f = take(projected, "q k v f")
        gs = nn.functional.logsigmoid(gate_dtype(f)) / self.spec.gate_logit_normalizer
        return {"q": q, "k": k, "v": v, "s": -torch.expm1(gs), "gs": gs}

    def state_axes(self) -> dict[str, str]:
        return {"Kt": "H K slots", "Vt": "H slots V"}

    def inputs_domain(self) -> dict[str, Domain]:
        return {
            "q": Domain("T G K"),
            "k": Domain("T G K"),
            "v": Domain("T H V"),
            "s": Domain("T H slots", low=0.0, high=1.0),
            "gs": Domain("T H slots", high=0.0),
        }

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        q, k, v, s, gs = take(inputs, "q k v s gs")
        decay = gs.exp()
        Kt = state["Kt"] * decay[..., None, :] + outer(k, s)
        Vt = state["Vt"] * decay[..., None] + outer(s, v)
        p = (self.scale_for(q) * read(Kt, q)).softmax(-1)
        return {"Kt": Kt, "Vt": Vt}, read(Vt, p)

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        return inputs | {name: where_frozen(inputs[name], where, 0.0) for name in ("s", "gs")}

    def structures(self) -> tuple[Structure, ...]:
        return Structure(decay="value"), Structure(decay="key")

    def compose(self, inputs: Inputs, state: State, affine: AffineScan) -> tuple[Tensor, State]:
        q, k, v, s, gs = take(inputs, "q k v s gs")
        by_value, by_key = self.structures()
        over_keys = Affine(q=q, k=k, v=s, gv=gs, scale=self.scale_for(q))
        logits, Kt = affine(by_value, over_keys, state["Kt"])
        over_slots = Affine(q=logits.softmax(-1), k=s, v=v, gk=gs)
        output, Vt = affine(by_key, over_slots, state["Vt"])
        return output, {"Kt": Kt, "Vt": Vt}
