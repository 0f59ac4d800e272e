"""Causal softmax attention over packed sequences: the other kind of layer in a hybrid model.

Letters: T packed tokens, B sequences, L longest sequence, P tokens remembered, D hidden size, H heads, d head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from momkit.routing.dispatch import sequence_of_token


@dataclass
class KVState:
    """Keys and values `[B, P, H, d]` of every token seen, and the number seen of each sequence `[B]`.

    It grows by one row a token, unlike a `MoMState`: memory is constant only in models without attention layers.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def _map(self, change: Callable[[Tensor], Tensor]) -> "KVState":
        return KVState(change(self.keys), change(self.values), change(self.lengths))

    def select(self, index: Tensor) -> "KVState":
        """The sequences `index` `[B']`, repeats allowed."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def clone(self) -> "KVState":
        return self._map(torch.Tensor.clone)

    def detach(self) -> "KVState":
        return self._map(torch.Tensor.detach)

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))


class CausalAttention(nn.Module):
    """Softmax attention of each token over its sequence so far, without position embedding.

    o_t = softmax(q_t K_{<=t}^T / sqrt(d)) V_{<=t};  the recurrent layers of a hybrid carry the order of tokens

    Vaswani et al. 2017, arXiv 1706.03762.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def initial_state(self, batch_size: int) -> KVState:
        weight = self.out_proj.weight
        empty = weight.new_zeros(batch_size, 0, self.num_heads, self.head_dim)
        return KVState(empty, empty, torch.zeros(batch_size, dtype=torch.long, device=weight.device))

    def forward(self, x: Tensor, state: KVState, cu_seqlens: Tensor) -> tuple[Tensor, KVState]:
        """`x` `[T, D]` packed, continuing `state`, which stays as it is; sequences are padded side by side inside."""
        if len(x) == 0:
            return self.out_proj(x), state
        sequence = sequence_of_token(cu_seqlens, len(x))
        position = torch.arange(len(x), device=x.device) - cu_seqlens.long()[sequence]
        qkv = self.qkv_proj(x).unflatten(1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.to(state.keys.dtype).unbind(1)  # under autocast the state is wider than what is projected

        lengths = state.lengths + cu_seqlens.long().diff()
        capacity = int(lengths.max())
        place = (sequence, state.lengths[sequence] + position)
        keys = widen(state.keys, capacity).index_put(place, k)
        values = widen(state.values, capacity).index_put(place, v)
        queries = q.new_zeros(len(lengths), int(position.max()) + 1, *q.shape[1:]).index_put((sequence, position), q)

        # padding stands behind the tokens of its sequence, where causal attention never looks from a real one
        first = state.keys.shape[1] == 0
        output = nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if first else visible(state.lengths, queries.shape[1], capacity),
            is_causal=first,
        )
        mixed = output.transpose(1, 2)[sequence, position].flatten(1)
        return self.out_proj(mixed), KVState(keys, values, lengths)


def widen(tensor: Tensor, capacity: int) -> Tensor:
    """`[B, P, H, d]` with zeros up to `capacity` rows."""
    return nn.functional.pad(tensor, (0, 0, 0, 0, 0, capacity - tensor.shape[1]))


def visible(seen: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """`[B, 1, L, P]`: key j is visible to query i of a sequence that had seen s tokens when j <= s + i."""
    i = torch.arange(num_queries, device=seen.device)[:, None]
    j = torch.arange(num_keys, device=seen.device)
    return (j <= seen[:, None, None] + i)[:, None]
