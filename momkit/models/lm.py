"""A small causal language model over MoM blocks, some of whose layers may be softmax attention.

Letters: B sequences, T packed tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from momkit.block import MoMBlock, parameter_groups
from momkit.checks import check_cu_seqlens, check_mask, checking_values
from momkit.errors import InputError
from momkit.models.attention import KVState
from momkit.models.layer import Layer
from momkit.models.spec import LMSpec
from momkit.routing.base import Routing
from momkit.scan import Backend
from momkit.state import MoMState
from momkit.tasks.base import IGNORE


@dataclass
class LMState:
    """The state of B sequences, one entry a layer."""

    layers: list[MoMState | KVState]

    def select(self, index: Tensor) -> "LMState":
        """The sequences `index` `[B']`, repeats allowed: beam search, prefix reuse."""
        return LMState([layer.select(index) for layer in self.layers])

    def clone(self) -> "LMState":
        return LMState([layer.clone() for layer in self.layers])

    def detach(self) -> "LMState":
        """The same values, cut from the graph."""
        return LMState([layer.detach() for layer in self.layers])

    def nbytes(self) -> int:
        """Bytes of all layers; constant during decoding unless there are attention layers."""
        return sum(layer.nbytes() for layer in self.layers)


@dataclass(frozen=True)
class LMOutput:
    """hidden_states: as tokens, with an axis D. aux_loss: mean over MoM layers. routings: by layer, None: attention."""

    hidden_states: Tensor
    state: LMState
    aux_loss: Tensor
    routings: tuple[Routing | None, ...]


@dataclass(frozen=True)
class LMLoss:
    """loss = cross_entropy + aux_loss_scale * aux_loss; cross_entropy is the mean over the targets, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    aux_loss: Tensor
    num_targets: int
    routings: tuple[Routing | None, ...]


class MoMLM(nn.Module):
    """A pre-norm causal language model.

    x = E[tokens];  N times: x += mixer(norm(x)), x += mlp(norm(x));  logits = norm(x) W^T, W = E when tied
    """

    def __init__(self, spec: LMSpec, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(Layer(spec, i, backend) for i in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = None if spec.tie_embeddings else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self, std: float = 0.02) -> None:
        """Matrices of the model N(0, std^2), those that write to the residual stream / sqrt(2 num_layers).

        What a block learns inside it starts as the block drew it.
        """
        for name, module in self.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("out_proj", "down_proj"):
                nn.init.normal_(cast(Tensor, module.weight), std=std * (2 * self.spec.num_layers) ** -0.5)
            elif leaf in ("embedding", "head", "qkv_proj", "up_proj"):
                nn.init.normal_(cast(Tensor, module.weight), std=std)

    def forward(
        self,
        tokens: Tensor,
        state: LMState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LMOutput:
        """Hidden states after the final norm, and the state behind the last token of each sequence.

        tokens: `[B, T]`, or packed `[T]` with `cu_seqlens` `[B + 1]` (left out: one sequence). mask: `[B, T]`, False at
        padding, left or right; hidden states are zeros there. state: what to start from; it is never changed.
        """
        packed, cu_seqlens = self.pack(tokens, cu_seqlens, mask)
        if state is not None:
            self.check_state(state, len(cu_seqlens) - 1)
        before = [None] * len(self.layers) if state is None else state.layers
        x = self.dropout(self.embedding(packed))
        after, routings, aux_losses = [], [], []
        for layer, layer_state in zip(self.layers, before, strict=True):
            x, layer_state, routing, aux_loss = layer(x, layer_state, cu_seqlens)
            after.append(layer_state)
            routings.append(routing)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        x = self.norm(x)
        if mask is not None:
            x = x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask.bool()[..., None], x)
        aux = torch.stack(aux_losses).mean() if aux_losses else x.new_zeros(())
        return LMOutput(x.view(*tokens.shape, self.spec.hidden_size), LMState(after), aux, tuple(routings))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden_states, weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        chunk_tokens: int = 1024,
    ) -> LMLoss:
        """Cross entropy of `targets` (as tokens, IGNORE where nothing is asked) plus the load-balance loss.

        Logits exist for `chunk_tokens` asked positions at a time, and are computed again in the backward pass.
        """
        if chunk_tokens < 1:
            raise InputError(f"chunk_tokens = {chunk_tokens}; allowed: 1 or more")
        self.check_tokens(targets, "targets", IGNORE)
        out = self(tokens, cu_seqlens=cu_seqlens, mask=mask)
        hidden, asked = pick_asked(out.hidden_states, targets.long())
        total = out.aux_loss.new_zeros(())
        chunks = list(zip(hidden.split(chunk_tokens), asked.split(chunk_tokens), strict=True))
        for part, target in chunks:
            if len(chunks) == 1:
                total = total + self.cross_entropy_sum(part, target)
            else:
                total = total + checkpoint(
                    self.cross_entropy_sum, part, target, use_reentrant=False, preserve_rng_state=False
                )
        cross_entropy = total / max(1, len(asked))
        loss = cross_entropy + self.spec.aux_loss_scale * out.aux_loss
        return LMLoss(loss, cross_entropy, out.aux_loss, len(asked), out.routings)

    def cross_entropy_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(wide, targets, reduction="sum")

    @torch.no_grad()
    def step(self, tokens: Tensor, state: LMState) -> Tensor:
        """Decode one token of each sequence: `[B]` -> logits `[B, V]`; `state` is updated in place."""
        self.check_tokens(tokens)
        if tokens.ndim != 1:
            raise InputError(f"tokens has shape {tuple(tokens.shape)}; allowed: [B]")
        self.check_state(state, len(tokens))
        x = self.dropout(self.embedding(tokens))
        for i, layer in enumerate(self.layers):
            x, state.layers[i] = cast(Layer, layer).step(x, state.layers[i])
        return self.logits(self.norm(x))

    def initial_state(self, batch_size: int) -> LMState:
        """The state of `batch_size` sequences that have seen nothing."""
        return LMState([cast(Layer, layer).mixer.initial_state(batch_size) for layer in self.layers])

    def blocks(self) -> list[MoMBlock | None]:
        """The MoM block of each layer, None where it is attention."""
        mixers = [cast(Layer, layer).mixer for layer in self.layers]
        return [mixer if isinstance(mixer, MoMBlock) else None for mixer in mixers]

    def parameter_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Two optimizer groups, as a block's."""
        return parameter_groups(self, weight_decay)

    def pack(self, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `[T]` and bounds `[B + 1]`; masked tokens are left out."""
        self.check_tokens(tokens)
        if tokens.ndim not in (1, 2):
            raise InputError(f"tokens has shape {tuple(tokens.shape)}; allowed: [B, T], or packed [T]")
        if cu_seqlens is not None:
            if mask is not None:
                raise InputError("mask can't be given with cu_seqlens: leave padding out of packed tokens")
            if tokens.ndim == 2 and len(tokens) != 1:
                raise InputError(f"tokens has B = {len(tokens)} with cu_seqlens; allowed: packed [T], or B = 1")
            check_cu_seqlens(cu_seqlens, tokens.numel(), tokens.device)
            return tokens.reshape(-1), cu_seqlens
        if mask is None:
            num_sequences, length = (1, len(tokens)) if tokens.ndim == 1 else tokens.shape
            return tokens.reshape(-1), torch.arange(num_sequences + 1, device=tokens.device) * length
        if tokens.ndim != 2:
            raise InputError(f"tokens has shape {tuple(tokens.shape)} with a mask; allowed: [B, T]")
        real = check_mask(mask, tokens.shape, tokens.device).view(tokens.shape)
        return tokens[real], nn.functional.pad(real.long().sum(1).cumsum(0), (1, 0))

    def check_tokens(self, tokens: Tensor, name: str = "tokens", ignored: int | None = None) -> None:
        """Integers of the vocabulary, or `ignored`, on the model's device."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"{name} must be int32 or int64, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
        if tokens.device != self.embedding.weight.device:
            raise InputError(f"{name} is on {tokens.device}, the model on {self.embedding.weight.device}")
        if checking_values(tokens):
            real = tokens if ignored is None else tokens[tokens != ignored]
            low, high = (int(x) for x in real.aminmax()) if real.numel() else (0, 0)
            if low < 0 or high >= self.spec.vocab_size:
                raise InputError(f"{name} holds {low} to {high}; allowed: 0 to {self.spec.vocab_size - 1}")

    def check_state(self, state: LMState, batch_size: int) -> None:
        """A state must have an entry of the right kind for each layer, with one row a sequence."""
        if not isinstance(state, LMState):
            raise InputError(f"state must be a LMState, got {type(state).__name__}")
        kinds = [KVState if block is None else MoMState for block in self.blocks()]
        if [type(layer) for layer in state.layers] != kinds:
            got = [type(layer).__name__ for layer in state.layers]
            raise InputError(f"state.layers are {got}; allowed: {[kind.__name__ for kind in kinds]}")
        for i, layer in enumerate(state.layers):
            if isinstance(layer, KVState) and len(layer.lengths) != batch_size:
                raise InputError(f"state.layers[{i}] has {len(layer.lengths)} sequences; allowed: B = {batch_size}")


def pick_asked(hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states `[n, D]` and targets `[n]` of the positions that ask something."""
    if targets.shape != hidden_states.shape[:-1]:
        raise InputError(
            f"targets has shape {tuple(targets.shape)}; allowed: {tuple(hidden_states.shape[:-1])}, as tokens"
        )
    at = (targets != IGNORE).reshape(-1).nonzero().flatten()
    return hidden_states.flatten(0, -2).index_select(0, at), targets.reshape(-1).index_select(0, at)
