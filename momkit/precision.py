"""Parameters that stay in float32 when a module is narrowed."""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


class StaysWide(nn.Module):
    """A module of which `module.bfloat16()` and its like leave some parameters and buffers in float32.

    wide: their names. In 16 bits a decay rate is off by what adds up over thousands of tokens, and a bias stops moving
    once it outgrows its steps.
    """

    wide: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        before = {n: (x.data, x.grad) for n, x in own.items() if n in self.wide}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (data, grad) in before.items():
            now = getattr(self, name)
            if now.dtype in NARROW and data.dtype not in NARROW:
                now.grad = None
                now.data = data.to(now.device, torch.float32)
                now.grad = None if grad is None else grad.to(now.device, torch.float32)
        return self
