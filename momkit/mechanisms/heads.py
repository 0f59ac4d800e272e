"""What rules with heads share: gates from a few numbers, and constants that depend on a layer's depth."""

import torch
from torch import Tensor, nn

from momkit.errors import InputError
from momkit.mechanisms.base import Context, gate_dtype


def expand_low_rank(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Second half of a low-rank map to heads, in gate precision, whatever autocast says.

    x `[T, rank]`, weight `[H * K, rank]`, bias `[H, K]` -> `[T, H, K]`.
    """
    with torch.autocast(x.device.type, enabled=False):
        flat = nn.functional.linear(gate_dtype(x), gate_dtype(weight), gate_dtype(bias).flatten())
    return flat.view(*x.shape[:-1], *bias.shape)


def depth(context: Context | None) -> float:
    """How far up a model a layer stands: 0 the first, 1 the last, 0 the only one."""
    if context is None:
        raise InputError("context = None: a rule whose constants depend on its layer needs a Context")
    return context.layer_index / max(1, context.num_layers - 1)
