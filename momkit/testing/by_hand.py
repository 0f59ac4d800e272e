"""A Mixture-of-Memories block by its definition: memory by memory, sequence by sequence, no dispatch.

It reads a block's weights and uses its `prepare`, `freeze`, `finish` and reference scan; all else is written out anew.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from momkit.block import MoMBlock
from momkit.mechanisms.base import Inputs, Projection, State
from momkit.routing.base import Routing
from momkit.scan import run

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def weight_of(block: MoMBlock, p: Projection, memory: int) -> Tensor:
    """`[width, D]` of one projection, as memory `memory` has it."""
    group = block.project.shared if p.shared else block.project.per_memory
    start = sum(q.width for q in group[: group.index(p)])
    stacked = block.project.shared_weight if p.shared else block.project.memory_weight[memory]
    return stacked[start : start + p.width]


def conv_by_hand(block: MoMBlock, p: Projection, x: Tensor, writes: list[bool]) -> Tensor:
    """Each row sees itself and the last rows before it that write."""
    weight = block.project.get_parameter(f"{p.name}_conv_weight")
    past = [x.new_zeros(p.width)] * (weight.shape[1] - 1)
    rows = []
    for row, enters in zip(x, writes, strict=True):
        window = torch.stack([*past, row], -1)
        rows.append((window * weight).sum(-1))
        if enters:
            past = [*past, row][1:]
    y = torch.stack(rows) if rows else x
    return y + block.project.get_parameter(f"{p.name}_conv_bias") if p.conv_bias else y


def project_by_hand(block: MoMBlock, x: Tensor, memory: int, writes: list[bool]) -> Inputs:
    """Projections of the tokens `x` `[t, D]` that one memory of one sequence gets."""
    projected: Inputs = {}
    for p in block.project.order:
        y = x @ weight_of(block, p, memory).T
        if p.bias:
            bias = block.project.get_parameter(f"{p.name}_bias")
            y = y + bias[memory if len(bias) > 1 else 0]
        if p in block.project.convolved:
            y = conv_by_hand(block, p, y, writes)
        y = ACTIVATIONS[p.activation](y).reshape(-1, *p.shape)
        projected[p.name] = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() if p.l2 else y
    return projected


def memory_by_hand(block: MoMBlock, x: Tensor, memory: int, writes: list[bool]) -> tuple[Tensor, State]:
    """Outputs `[t, H, V]` and final state of one memory, from its initial state, for the tokens it gets."""
    rule = block.mechanism
    projected = project_by_hand(block, x, memory, writes)
    inputs = rule.prepare(projected)
    if not all(writes):
        inputs = rule.freeze(inputs, ~torch.tensor(writes))
    start = {name: tensor[:1] for name, tensor in rule.initial_state(1).items()}
    out = run(rule, inputs, torch.tensor([0, len(x)]), initial_state=start, backend="reference")
    return rule.finish(out.output, inputs, projected).reshape(-1, *block.output_shape), out.final_state


def block_by_hand(block: MoMBlock, x: Tensor, lengths: tuple[int, ...], routing: Routing) -> tuple[Tensor, State]:
    """`x` `[T, D]` packed -> hidden states `[T, D]` and final states `[B, M(+1), ...]`."""
    heads, dim = block.output_shape
    mixed = [x.new_zeros(heads, dim) for _ in range(len(x))]
    finals: dict[str, list[Tensor]] = {}
    start = 0
    for length in lengths:
        for memory in range(block.num_groups):
            got = choices_of(block, routing, memory, range(start, start + length))
            tokens = torch.tensor([t for t, _, _ in got], dtype=torch.long)
            output, final = memory_by_hand(block, x[tokens], memory, [enters for _, _, enters in got])
            for (t, weight, _), o in zip(got, output, strict=True):
                mixed[t] = mixed[t] + weight * o
            for name, tensor in final.items():
                finals.setdefault(name, []).append(tensor[0])
        start += length
    o = torch.stack(mixed) if mixed else x.new_zeros(0, heads, dim)
    o = o / (o.square().mean(-1, keepdim=True) + block.spec.norm_eps).sqrt() * block.norm_weight
    if block.gate_proj is not None:
        o = o * F.silu(block.gate_proj(x)).reshape(o.shape)
    shape = (len(lengths), block.num_groups)
    return block.out_proj(o.flatten(1)), {n: torch.stack(rows).unflatten(0, shape) for n, rows in finals.items()}


def choices_of(block: MoMBlock, routing: Routing, memory: int, tokens: range) -> list[tuple[int, Tensor | float, bool]]:
    """(token, weight, writes) of every slot of one memory, in the order of time."""
    if memory == block.spec.num_memories:
        return [(t, 1.0, True) for t in tokens]
    ids = routing.memory_ids.tolist()
    writes = routing.writes.tolist() if routing.writes is not None else [[True] * len(row) for row in ids]
    return [(t, routing.weights[t, j], writes[t][j]) for t in tokens for j in range(len(ids[t])) if ids[t][j] == memory]
