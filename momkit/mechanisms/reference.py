"""The reference scan: one step of a rule, lifted to packed segments of any length.

Segments are sorted by length and walked in step, the finished ones dropping out, so that no padded token is ever
computed and nothing of one segment can reach another. Differentiable, any dtype, any device; O(longest segment) steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.mechanisms.base import Inputs, Mechanism, Sizes, State, axes_of


@dataclass(frozen=True)
class Lanes:
    """Where each packed row goes when segments run side by side, the longest first.

    `order` `[covered]` packed rows, time-major; `counts[t]` segments still alive at time t; `segments` `[N]` the
    segment in each lane.
    """

    order: Tensor
    counts: list[int]
    segments: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor) -> "Lanes":
        cu = cu_seqlens.long()
        lengths = cu[1:] - cu[:-1]
        sorted_lengths, segments = torch.sort(lengths, descending=True, stable=True)
        longest = int(sorted_lengths[0]) if len(lengths) else 0
        alive = torch.arange(longest, device=cu.device)[:, None] < sorted_lengths
        time, lane = alive.nonzero(as_tuple=True)
        return Lanes(cu[segments[lane]] + time, alive.sum(1).tolist(), segments)


def scan_state_dtype(mechanism: Mechanism, inputs: Inputs) -> torch.dtype:
    """States are float32, or float64 when any input of the tokens is."""
    axes = {name: domain.axes for name, domain in mechanism.inputs_domain().items()}
    wide = any(x.dtype == torch.float64 and has_time(axes[name], x) for name, x in inputs.items())
    return torch.float64 if wide else torch.float32


def start_state(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State | None, sizes: Sizes
) -> State:
    """The states that segments start from: those given, or zeros."""
    if initial_state is not None:
        return initial_state
    device, dtype, N = cu_seqlens.device, scan_state_dtype(mechanism, inputs), len(cu_seqlens) - 1
    shapes = mechanism.state_spec(sizes)
    return {name: torch.zeros((N, *shape), dtype=dtype, device=device) for name, shape in shapes.items()}


def has_time(axes: str, tensor: Tensor) -> bool:
    """Whether an input varies over tokens."""
    return axes_of(axes, tensor)[0] == "T"


def repeat_key_heads(axes: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Axis G repeated to H, so that head h uses key head h // r."""
    names = axes.split()
    if "G" not in names or sizes["G"] == sizes["H"]:
        return tensor
    axis = names.index("G") - len(names)
    return tensor.repeat_interleave(sizes["H"] // sizes["G"], dim=axis)


def scan_reference(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State | None, sizes: Sizes
) -> tuple[Tensor, State]:
    """Run `mechanism.step` over every segment; rows that no segment covers come out as zeros."""
    domain = mechanism.inputs_domain()
    dtype = scan_state_dtype(mechanism, inputs)
    lanes = Lanes.of(cu_seqlens)
    constants: Inputs = {}
    columns: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in inputs.items():
        wide = repeat_key_heads(domain[name].axes, tensor.to(dtype), sizes)
        if has_time(domain[name].axes, tensor):
            columns[name] = wide.index_select(0, lanes.order).split(lanes.counts)
        else:
            constants[name] = wide

    start = start_state(mechanism, inputs, cu_seqlens, initial_state, sizes)
    state = {name: tensor.to(dtype)[lanes.segments] for name, tensor in start.items()}
    outputs: list[Tensor] = []
    retired: dict[str, list[Tensor]] = {name: [] for name in state}
    alive = len(lanes.segments)
    for t, count in enumerate(lanes.counts):
        for name, tensor in state.items():
            retired[name].append(tensor[count:alive])
        state = {name: tensor[:count] for name, tensor in state.items()}
        alive = count
        new_state, output = mechanism.step(state, constants | {name: column[t] for name, column in columns.items()})
        if new_state.keys() != state.keys():
            raise InputError(f"{mechanism.name}: step returned states {list(new_state)}; allowed: {list(state)}")
        state = {name: new_state[name] for name in state}
        outputs.append(output)

    back = torch.empty_like(lanes.segments)
    back[lanes.segments] = torch.arange(len(back), device=back.device)
    final = {name: torch.cat([state[name], *reversed(retired[name])])[back] for name in state}
    value = inputs[mechanism.value_input]
    shape = tuple(sizes[axis] for axis in mechanism.output_axes.split())
    packed = torch.zeros((len(value), *shape), dtype=dtype, device=value.device)
    if outputs:
        packed = packed.index_copy(0, lanes.order, torch.cat(outputs))
    return packed.to(value.dtype), final
