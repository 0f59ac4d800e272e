"""The truth: a rule's own step, token by token, segment by segment, with nothing clever in between."""

import torch
from torch import Tensor

from momkit.mechanisms.base import Inputs, Mechanism, Sizes, State


def is_token_input(axes: str, tensor: Tensor) -> bool:
    """Whether an input has a row for each token; a constant may have been given one."""
    names = axes.split()
    return names[0] == "T" or tensor.ndim == len(names) + 1


def wide_heads(axes: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Head h uses key head h // r."""
    names = axes.split()
    if "G" not in names:
        return tensor
    heads = torch.arange(sizes["H"], device=tensor.device) // (sizes["H"] // sizes["G"])
    return tensor.index_select(names.index("G") - len(names), heads)


def step_by_step(
    rule: Mechanism, inputs: Inputs, lengths: tuple[int, ...], state: State, sizes: Sizes, dtype: torch.dtype
) -> tuple[Tensor, State]:
    """Outputs `[T, ...]` and final states `[N, ...]` of `rule.step` in `dtype`; differentiable."""
    domain = rule.inputs_domain()
    wide = {name: wide_heads(domain[name].axes, tensor.to(dtype), sizes) for name, tensor in inputs.items()}
    by_token = {name for name, tensor in inputs.items() if is_token_input(domain[name].axes, tensor)}
    outputs: list[Tensor] = []
    finals: dict[str, list[Tensor]] = {name: [] for name in state}
    start = 0
    for n, length in enumerate(lengths):
        current = {name: tensor[n].to(dtype) for name, tensor in state.items()}
        for t in range(start, start + length):
            current, output = rule.step(current, {k: x[t] if k in by_token else x for k, x in wide.items()})
            outputs.append(output)
        for name, tensor in current.items():
            finals[name].append(tensor)
        start += length
    shape = tuple(sizes[axis] for axis in rule.output_axes.split())
    packed = torch.stack(outputs) if outputs else torch.zeros((0, *shape), dtype=dtype)
    final = {name: torch.stack(rows) if rows else state[name].to(dtype) for name, rows in finals.items()}
    return packed, final
