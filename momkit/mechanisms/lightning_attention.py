"""Lightning attention, the recurrence of TransNormerLLM and MiniMax-01."""

from typing import Literal

import torch
from torch import Tensor

from momkit.mechanisms.base import HeadSpec
from momkit.mechanisms.heads import depth
from momkit.mechanisms.retention import Retention


class LightningAttentionSpec(HeadSpec):
    kind: Literal["lightning_attention"] = "lightning_attention"


class LightningAttention(Retention):
    """Retention whose heads forget more slowly the higher their layer stands.

    S_t = e^g S_{t-1} + k_t v_t^T      o_t = scale q_t^T S_t
    g = -2^{-8 (h+1) / H} (1 - layer_index / (num_layers - 1) + 1e-5) for head h of H

    Qin et al. 2024, arXiv 2401.04658; slopes as in MiniMax-01, arXiv 2501.08313, by this formula for every H.
    """

    Spec = LightningAttentionSpec
    activation = "silu"

    def make_parameters(self) -> None:
        self.slope_scale = 1 - depth(self.context) + 1e-5

    def log_decay(self, heads: Tensor) -> Tensor:
        return -self.slope_scale * torch.exp2(-8.0 * (heads + 1) / len(heads))
