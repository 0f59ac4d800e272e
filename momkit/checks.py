"""What public entries refuse: names, types, devices, shapes always, values where looking costs no synchronisation."""

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.mechanisms.base import Inputs, Mechanism, Sizes, State, axes_of
from momkit.routing.base import Routing

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def checking_values(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: on a CPU, or under MOMKIT_CHECK=1; a compiler has none to show."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or checking_data())


def checking_data() -> bool:
    """Whether MOMKIT_CHECK=1 asks to look for NaN and infinities, and for what would synchronise with a GPU."""
    return not torch.compiler.is_compiling() and os.environ.get("MOMKIT_CHECK") == "1"


def check_finite(tensor: Tensor, what: str) -> None:
    """Under MOMKIT_CHECK=1, refuse NaN and infinities."""
    if checking_data() and not bool(tensor.isfinite().all()):
        raise InputError(f"{what} holds NaN or inf")


def check_inputs(mechanism: Mechanism, inputs: Inputs) -> Sizes:
    """Names, types, devices and shapes of a rule's inputs; returns the size of each axis."""
    domain = mechanism.inputs_domain()
    what = f"{mechanism.name} inputs"
    check_input_names(mechanism, inputs)
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{what}: {name} must be a tensor, got {type(tensor).__name__}")
    device = inputs[mechanism.value_input].device
    sizes: Sizes = {}
    origin: dict[str, str] = {}
    for name, entry in domain.items():
        tensor = inputs[name]
        if tensor.dtype not in FLOATS:
            raise InputError(f"{what}: {name} is {tensor.dtype}; allowed: float32, float64, bfloat16, float16")
        if tensor.device != device:
            raise InputError(f"{what}: {name} is on {tensor.device}, {mechanism.value_input} on {device}")
        axes = axes_of(entry.axes, tensor)
        if tensor.ndim != len(axes):
            raise InputError(f"{what}: {name} has shape {tuple(tensor.shape)}; allowed: [{', '.join(axes)}]")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis in sizes and sizes[axis] != size:
                raise InputError(
                    f"{what}: {name} has {axis} = {size} in shape {tuple(tensor.shape)}, "
                    f"{origin[axis]} has {sizes[axis]}"
                )
            if axis != "T" and size == 0:
                raise InputError(f"{what}: {name} has {axis} = 0; allowed: 1 or more")
            sizes[axis] = size
            origin.setdefault(axis, name)
        if not entry.is_gate:
            check_finite(tensor, f"{what}: {name}")
    return check_sizes(mechanism, sizes)


def check_input_names(mechanism: Mechanism, inputs: Inputs) -> None:
    """The inputs must be those that `inputs_domain` names."""
    domain = mechanism.inputs_domain()
    what = f"{mechanism.name} inputs"
    if missing := [name for name in domain if name not in inputs]:
        raise InputError(f"{what}: {', '.join(missing)} missing; it takes {', '.join(domain)}")
    if unknown := [name for name in inputs if name not in domain]:
        raise InputError(f"{what}: {', '.join(unknown)} unknown; it takes {', '.join(domain)}")


def check_sizes(mechanism: Mechanism, sizes: Sizes) -> Sizes:
    """Sizes read off the inputs against those of the module and its spec; what only the module knows is added."""
    what = f"{mechanism.name} inputs"
    sizes.setdefault("G", sizes.get("H", 1))
    sizes.setdefault("H", sizes["G"])
    if sizes["H"] % sizes["G"]:
        raise InputError(f"{what}: H = {sizes['H']} is not a multiple of the number of key heads G = {sizes['G']}")
    for axis, size in mechanism.sizes.items():
        if axis not in "GT" and sizes.get(axis, size) != size:
            raise InputError(f"{what}: {axis} = {sizes[axis]} in the inputs, {size} in the module")
    for field in mechanism.spec.model_fields_set:
        axis, wanted = mechanism.spec.axes.get(field, ""), getattr(mechanism.spec, field)
        if wanted is not None and sizes.get(axis, wanted) != wanted:
            raise InputError(f"{what}: {axis} = {sizes[axis]}, but {field} = {wanted} in its spec")
    sizes = mechanism.sizes | sizes
    for name, axes in mechanism.state_axes().items():
        if unknown := [axis for axis in axes.split() if axis not in sizes]:
            raise InputError(f"{what}: no input has axis {unknown[0]} of state {name}; build the rule with a Context")
    return sizes


def check_routing(routing: Routing, num_tokens: int, slots: int, num_memories: int) -> None:
    """What a router returned: shapes and types always, ids where looking at them costs no synchronisation."""
    shape = (num_tokens, slots)
    for name, dtypes in (("weights", (torch.float32, torch.float64)), ("memory_ids", (torch.int64,))):
        tensor: Tensor = getattr(routing, name)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise InputError(f"routing.{name} is {got}; allowed: [T, slots] = {shape} of {dtypes}")
    writes = routing.writes
    if writes is not None and (tuple(writes.shape) != shape or writes.dtype != torch.bool):
        raise InputError(f"routing.writes is {tuple(writes.shape)} of {writes.dtype}; allowed: {shape} of torch.bool")
    check_finite(routing.logits, "routing.logits")
    ids = routing.memory_ids
    if not ids.numel() or not checking_values(ids):
        return
    if int(ids.min()) < 0 or int(ids.max()) >= num_memories:
        raise InputError(
            f"routing.memory_ids hold {int(ids.min())} to {int(ids.max())}; allowed: 0 to {num_memories - 1}"
        )
    kinds = ids if writes is None else 2 * ids + writes
    if slots > 1 and bool((kinds.sort(1).values.diff(dim=1) == 0).any()):
        raise InputError(
            "routing.memory_ids name a memory twice for one token; allowed: distinct ids among its writes, "
            "and among its reads"
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    """Bounds of packed sequences: int32 or int64, rising from 0 to T."""
    if not isinstance(cu_seqlens, Tensor):
        raise InputError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(f"cu_seqlens is {cu_seqlens.dtype}; allowed: int32, int64")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise InputError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; allowed: [N + 1]")
    if cu_seqlens.device != device:
        raise InputError(f"cu_seqlens is on {cu_seqlens.device}, the tokens are on {device}")
    if not checking_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise InputError(f"cu_seqlens starts at {bounds[0]}; allowed: 0")
    if any(b < a for a, b in pairwise(bounds)):
        raise InputError(f"cu_seqlens decreases: {bounds}")
    if bounds[-1] != num_tokens:
        raise InputError(f"cu_seqlens ends at {bounds[-1]}; allowed: T = {num_tokens}")


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """A mask over tokens of some shape, as `[T]` bool; 0 and 1 of any integer type are taken too."""
    if not isinstance(mask, Tensor):
        raise InputError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != shape:
        raise InputError(f"mask has shape {tuple(mask.shape)}; allowed: {tuple(shape)}, as the tokens")
    if mask.device != device:
        raise InputError(f"mask is on {mask.device}, the tokens are on {device}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise InputError(f"mask is {mask.dtype}; allowed: bool, or integers 0 and 1")
    if mask.dtype != torch.bool and checking_values(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("mask holds values other than 0 and 1")
    return mask.reshape(-1).bool()


def check_state(
    mechanism: Mechanism,
    sizes: Sizes,
    num_segments: int,
    initial_state: Mapping[str, Tensor] | None,
    state_index: Tensor | None,
    device: torch.device,
) -> State | None:
    """The initial state of each segment, picked from a pool where `state_index` says so."""
    if initial_state is None:
        if state_index is not None:
            raise InputError("state_index needs an initial_state to pick from")
        return None
    shapes = mechanism.state_spec(sizes)
    if not isinstance(initial_state, Mapping):
        raise InputError(f"initial_state must be a dict of tensors, got {type(initial_state).__name__}")
    if set(initial_state) != set(shapes):
        raise InputError(f"initial_state has {sorted(initial_state)}; allowed: {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = initial_state[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            raise InputError(f"initial_state[{name!r}] must be a floating point tensor")
        check_finite(tensor, f"initial_state[{name!r}]")
        if tensor.device != device:
            raise InputError(f"initial_state[{name!r}] is on {tensor.device}, the inputs are on {device}")
        if tuple(tensor.shape[1:]) != shape or tensor.ndim != len(shape) + 1:
            allowed = ["N" if state_index is None else "P", *mechanism.state_axes()[name].split()]
            raise InputError(
                f"initial_state[{name!r}] has shape {tuple(tensor.shape)}; allowed: [{', '.join(allowed)}] = [.., "
                f"{', '.join(map(str, shape))}]"
            )
        if state_index is None and len(tensor) != num_segments:
            raise InputError(f"initial_state[{name!r}] has {len(tensor)} rows; allowed: N = {num_segments}")
    if state_index is None:
        return {name: initial_state[name] for name in shapes}
    if not isinstance(state_index, Tensor) or state_index.dtype not in (torch.int32, torch.int64):
        raise InputError("state_index must be an int32 or int64 tensor")
    if state_index.shape != (num_segments,) or state_index.device != device:
        raise InputError(
            f"state_index has shape {tuple(state_index.shape)} on {state_index.device}; allowed: [N] = "
            f"[{num_segments}] on {device}"
        )
    rows = min(len(initial_state[name]) for name in shapes)
    if checking_values(state_index) and not all(0 <= row < rows for row in state_index.tolist()):
        raise InputError(f"state_index holds {state_index.tolist()}; allowed: 0 to {rows - 1}")
    return {name: initial_state[name].index_select(0, state_index) for name in shapes}
