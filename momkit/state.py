"""What a MoM block remembers of each sequence: the memories, and the last inputs of their short convolutions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.errors import InputError


@dataclass(eq=False)
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
        return len(next(iter((*self.recurrent.values(), *self.conv.values()))))

    def select(self, index: Tensor) -> "MoMState":
        """The sequences `index` `[B']`, repeats allowed: beam search, prefix reuse."""
        self._check_index(index)
        return self._map(lambda tensor: tensor.index_select(0, index))

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Replace, in place, each sequence by sequence `index` `[B]`."""
        if index.shape != (self.batch_size,):
            raise InputError(f"index has shape {tuple(index.shape)}; allowed: [B] = [{self.batch_size}]")
        self._check_index(index)
        self.cut()
        for tensor in (*self.recurrent.values(), *self.conv.values()):
            tensor.copy_(tensor.index_select(0, index))

    def clone(self) -> "MoMState":
        return self._map(torch.Tensor.clone)

    def detach(self) -> "MoMState":
        """The same values, cut from the graph: truncated backpropagation through time."""
        return self._map(torch.Tensor.detach)

    def cut(self) -> None:
        """Forget the graph that made this state, in place: what changes values in place has no gradient."""
        for part in (self.recurrent, self.conv):
            for name, tensor in part.items():
                part[name] = tensor.detach()

    @torch.no_grad()
    def reset(self, where: Tensor, initial: "MoMState") -> None:
        """Set, in place, the sequences `where` `[B]` bool back to `initial`, as from `block.initial_state(B)`."""
        if where.dtype != torch.bool or where.shape != (self.batch_size,):
            raise InputError(
                f"where is {where.dtype} of shape {tuple(where.shape)}; allowed: bool, [B] = [{self.batch_size}]"
            )
        if initial.batch_size != self.batch_size:
            raise InputError(f"initial has {initial.batch_size} sequences; allowed: B = {self.batch_size}")
        self.cut()
        for mine, fresh in ((self.recurrent, initial.recurrent), (self.conv, initial.conv)):
            for name, tensor in mine.items():
                picked = where.view(-1, *[1] * (tensor.ndim - 1))
                tensor.copy_(torch.where(picked, fresh[name].to(tensor.dtype), tensor))

    def _check_index(self, index: Tensor) -> None:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise InputError("index must be an int32 or int64 tensor [B']")
        if index.device.type == "cpu" and not all(0 <= row < self.batch_size for row in index.tolist()):
            raise InputError(f"index holds {index.tolist()}; allowed: 0 to {self.batch_size - 1}")

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.recurrent.values(), *self.conv.values()))
