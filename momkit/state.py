"""What a MoM block remembers of each sequence: the memories, and the last inputs of their short convolutions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.errors import InputError


@dataclass
class MoMState:
    """The state of B sequences, batch-first, so that choosing sequences is indexing.

    recurrent: name -> `[B, M(+1), *shape]` fp32 or float64, the shared memory last.
    conv: projection name -> `[B, M(+1), W - 1, channels]`, values before the convolution, oldest first.
    """

    recurrent: dict[str, Tensor]
    conv: dict[str, Tensor]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MoMState":
        return MoMState(
            {name: change(tensor) for name, tensor in self.recurrent.items()},
            {name: change(tensor) for name, tensor in self.conv.items()},
        )

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.recurrent.values())))

    def select(self, index: Tensor) -> "MoMState":
        """The sequences `index` `[B']`, repeats allowed: beam search, prefix reuse."""
        return self._map(lambda tensor: tensor.index_select(0, index))

    def reorder(self, index: Tensor) -> None:
        """Replace, in place, each sequence by sequence `index` `[B]`."""
        if index.shape != (self.batch_size,):
            raise InputError(f"index has shape {tuple(index.shape)}; allowed: [B] = [{self.batch_size}]")
        for tensor in (*self.recurrent.values(), *self.conv.values()):
            tensor.copy_(tensor.index_select(0, index))

    def clone(self) -> "MoMState":
        return self._map(torch.Tensor.clone)

    def detach(self) -> "MoMState":
        """The same values, cut from the graph: truncated backpropagation through time."""
        return self._map(torch.Tensor.detach)

    def reset(self, where: Tensor, initial: "MoMState") -> None:
        """Set, in place, the sequences `where` `[B]` bool back to `initial`, as from `block.initial_state(B)`."""
        if where.dtype != torch.bool or where.shape != (self.batch_size,):
            raise InputError(
                f"where is {where.dtype} of shape {tuple(where.shape)}; allowed: bool, [B] = [{self.batch_size}]"
            )
        for mine, fresh in ((self.recurrent, initial.recurrent), (self.conv, initial.conv)):
            for name, tensor in mine.items():
                picked = where.view(-1, *[1] * (tensor.ndim - 1))
                tensor.copy_(torch.where(picked, fresh[name].to(tensor.dtype), tensor))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.recurrent.values(), *self.conv.values()))
