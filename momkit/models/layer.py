"""One layer of a language model: a mixer, which is a MoM block or attention, and an MLP, each behind a norm.

Letters: B sequences, T packed tokens, D hidden size.
"""

from typing import cast

import torch
from torch import Tensor, nn

from momkit.block import MoMBlock
from momkit.models.attention import CausalAttention, KVState
from momkit.models.spec import LMSpec
from momkit.routing.base import Routing
from momkit.scan import Backend
from momkit.state import MoMState


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up_proj(x).chunk(2, -1)
        return cast(Tensor, self.down_proj(nn.functional.silu(gate) * up))


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is a MoM block or attention."""

    def __init__(self, spec: LMSpec, index: int, backend: Backend) -> None:
        super().__init__()
        D = spec.hidden_size
        self.mixer_norm = nn.RMSNorm(D, spec.norm_eps)
        self.mixer: MoMBlock | CausalAttention
        if index in spec.attention_layers:
            self.mixer = CausalAttention(D, spec.attention_heads)
        else:
            self.mixer = spec.block.build(index, spec.num_layers, backend)
        self.mlp: SwiGLU | None = None
        if spec.mlp_ratio:
            self.mlp_norm = nn.RMSNorm(D, spec.norm_eps)
            self.mlp = SwiGLU(D, max(1, round(spec.mlp_ratio * D)))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self, x: Tensor, state: MoMState | KVState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, MoMState | KVState, Routing | None, Tensor | None]:
        """`x` `[T, D]` packed; returns x, the state, and the routing and its aux_loss where there is one."""
        normed = self.mixer_norm(x)
        if isinstance(self.mixer, MoMBlock):
            out = self.mixer(normed, cast(MoMState | None, state), cu_seqlens=cu_seqlens)
            return self.finish(x, out.hidden_states), out.state, out.routing, out.aux_loss
        kv = self.mixer.initial_state(len(cu_seqlens) - 1) if state is None else cast(KVState, state)
        mixed, kv = self.mixer(normed, kv, cu_seqlens)
        return self.finish(x, mixed), kv, None, None

    def step(self, x: Tensor, state: MoMState | KVState) -> tuple[Tensor, MoMState | KVState]:
        """One token of each sequence, `x` `[B, D]`; a MoM layer's state changes in place, attention's grows."""
        normed = self.mixer_norm(x)
        if isinstance(self.mixer, MoMBlock):
            out = self.mixer.step(normed, cast(MoMState, state))
            return self.finish(x, out.hidden_states), out.state
        mixed, kv = self.mixer(normed, cast(KVState, state), torch.arange(len(x) + 1, device=x.device))
        return self.finish(x, mixed), kv

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x
