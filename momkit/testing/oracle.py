"""The truth: a rule's own step, token by token, segment by segment, with nothing clever in between."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from momkit.mechanisms.base import Affine, Inputs, Mechanism, Sizes, State, Structure
from momkit.testing.affine import affine_step


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


def affine_steps(structure: Structure, inputs: Affine, S: Tensor) -> tuple[Tensor, Tensor]:
    """The generic affine step over the tokens of one segment: an `AffineScan` for `compose`."""
    num_tokens, num_heads = inputs.v.shape[:2]
    by_token: dict[str, Tensor] = {}
    constant: dict[str, Tensor] = {}
    for name, axes in {"q": 3, "k": 3, "v": 3, "gk": 3, "gv": 3, "a": 3, "b": 3, "g": 2, "beta": 2, "u": 3}.items():
        x: Tensor | None = getattr(inputs, name)
        if x is not None:
            heads = x.shape[1 if x.ndim == axes else 0]
            wide = x.repeat_interleave(num_heads // heads, dim=1 if x.ndim == axes else 0)
            (by_token if x.ndim == axes else constant)[name] = wide
    outputs, state = [], S[0]
    for t in range(num_tokens):
        token = Affine(**{name: x[t] for name, x in by_token.items()}, **constant, scale=inputs.scale)
        state, output = affine_step(structure, state, token)
        outputs.append(output)
    return torch.stack(outputs) if outputs else torch.zeros_like(inputs.v), state[None]


def weighted_sum(tensors: Iterable[Tensor], seed: int) -> Tensor:
    """The float64 sum of all elements of some tensors, each times a random weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = ((x, torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in tensors)
    return torch.stack([(x.double() * weight).sum() for x, weight in weights]).sum()


def results_of(named: Mapping[str, Tensor], leaves: Mapping[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """What a scan gave, by name, and the gradient, by every leaf, of a random weighting of the parts named."""
    gradients = gradients_of(weighted_sum((named[part] for part in parts), seed=7), leaves)
    return {**named, **{f"gradient of {name}": x for name, x in gradients.items()}}


def gradients_of(total: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a scalar by every leaf, by name; zeros where it does not depend on one."""
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
