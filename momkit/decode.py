"""The door to decoding: one token for each row of a batch, on states that stay where they lie in a pool.

Letters: B rows of the batch, P rows of the pool.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from momkit.checks import check_inputs, checking_values
from momkit.errors import BackendError, InputError
from momkit.kernels.available import why_no_kernels
from momkit.mechanisms.base import Inputs, Mechanism, MechanismSpec, Sizes, State
from momkit.mechanisms.generated_scan import decode_generated, why_not_generated
from momkit.mechanisms.reference import repeat_key_heads, scan_state_dtype
from momkit.mechanisms.triton_scan import MAX_DIM, why_too_large
from momkit.scan import BackendChoice, as_mechanism, log_choice, read_sizes

DecodeBackend = Literal["auto", "reference", "triton", "generated"]
DecodeFunction = Callable[[Mechanism, Inputs, State, Tensor, Sizes], Tensor]

# what a structure calls for, in the letters of `Affine`
DECAY_INPUTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "constant": ("g",),
    "head": ("g",),
    "key": ("gk",),
    "value": ("gv",),
}
ERASE_INPUTS: dict[str, tuple[str, ...]] = {"none": (), "delta": ("beta",), "low_rank": ("a", "b")}
# inputs of key heads
KEYED = ("q", "k", "gk", "a", "b")


def decode(
    mechanism: str | MechanismSpec | Mechanism,
    inputs: Mapping[str, Tensor],
    pool: Mapping[str, Tensor],
    state_index: Tensor,
    *,
    backend: DecodeBackend = "auto",
) -> Tensor:
    """Run one step of an update rule for each row of a batch, and update the rows' states in place.

    S_b, o_b = step(S_b, x_b) with S_b = pool[state_index[b]]

    mechanism: a registered name, a spec, or a module.
    inputs: as for `scan`, with row b, the one token of row b, where scan has token t; constants are as they were.
    pool: name -> `[P, *shape]`, contiguous, float32, or float64 with float64 inputs; updated in place.
    state_index: `[B]` int32 or int64, the pool row of each row, distinct; -1 is a padding row: its output is zeros and
        it changes no state.
    backend: "reference" (the rule's step), "triton" (one fused kernel on a GPU), "generated" (one made from its step),
        or "auto"; one that can't run the rule is a BackendError.
    Returns the output `[B, *output_axes]` in the dtype of the values. It never synchronises with a GPU, and gives no
    gradients.
    Raises InputError for a wrong argument, naming it; UnknownNameError for an unknown mechanism.
    """
    rule = as_mechanism(mechanism)
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs must be a dict of tensors, got {type(inputs).__name__}")
    tensors = dict(inputs)
    sizes = check_inputs(rule, tensors)
    device = tensors[rule.value_input].device
    states = check_pool(rule, sizes, pool, scan_state_dtype(rule, tensors), device)
    check_state_index(state_index, sizes["T"], len(next(iter(states.values()))), device)
    return run_decode(rule, tensors, states, state_index, backend=backend, sizes=sizes)


@torch.no_grad()
def run_decode(
    mechanism: Mechanism,
    inputs: Inputs,
    pool: State,
    state_index: Tensor,
    *,
    backend: DecodeBackend = "auto",
    sizes: Sizes | None = None,
) -> Tensor:
    """`decode` without its checks."""
    if sizes is None:
        sizes = read_sizes(mechanism, inputs)
    value, dtype = inputs[mechanism.value_input], scan_state_dtype(mechanism, inputs)
    choice = choose_decode_backend(mechanism, backend, device=value.device, dtype=dtype, sizes=sizes)
    if len(state_index) == 0:
        return value.new_zeros((0, *(sizes[axis] for axis in mechanism.output_axes.split())))
    # states are float32 or float64, whatever autocast says
    with torch.autocast(value.device.type, enabled=False):
        return BACKENDS[choice.backend](mechanism, inputs, pool, state_index, sizes)


def choose_decode_backend(
    mechanism: Mechanism,
    backend: str = "auto",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes | None = None,
) -> BackendChoice:
    """The backend that decodes with a rule, and why; BackendError when the one asked for can't.

    device, sizes: of the inputs, as far as they are known; a device that is not is a CPU. dtype: of the states.
    """
    device = device or torch.device("cpu")
    if backend == "auto":
        choice = best_decode_backend(mechanism, device, dtype, sizes)
        if not torch.compiler.is_compiling():
            log_choice(f"{mechanism.name} (decoding)", choice)
        return choice
    if backend not in BACKENDS:
        raise BackendError(f"backend = {backend!r} is unknown; known: {', '.join(get_args(DecodeBackend))}")
    if backend in KERNELS and (reason := KERNELS[backend](mechanism, device, dtype, sizes)):
        raise BackendError(f"backend = {backend!r} can't decode {mechanism.name!r}: {reason}")
    return BackendChoice(backend, "asked for")


def best_decode_backend(
    mechanism: Mechanism, device: torch.device, dtype: torch.dtype, sizes: Sizes | None
) -> BackendChoice:
    """Kernels on a GPU where there can be any, else the rule's step."""
    if device.type != "cuda":
        return BackendChoice("reference", f"its step decodes, not triton, since tensors are on {device.type}")
    reason = why_no_kernel(mechanism, device, dtype, sizes)
    if reason is None:
        return BackendChoice("triton", "one kernel decodes all rows")
    other = why_not_generated_step(mechanism, device, dtype, sizes)
    if other is None:
        return BackendChoice("generated", f"a kernel is made from its step; not triton, since {reason}")
    return BackendChoice("reference", f"its step decodes, not triton, since {reason}; not generated, since {other}")


def why_no_kernel(mechanism: Mechanism, device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> str | None:
    """Why the kernel can't decode with a rule on tensors like these, None if it can."""
    limits = mechanism.kernel_limits
    if not mechanism.has_decode_kernel:
        if mechanism.structure is None:
            return "the rule declares no affine structure, and has no kernel of its own"
        if type(mechanism).compose is not Mechanism.compose:
            return "the rule composes its scans itself"
        limits = {"K": MAX_DIM, "V": MAX_DIM}
    return why_no_kernels(device, dtype) or why_too_large(sizes, limits)


def why_not_generated_step(
    mechanism: Mechanism, device: torch.device, dtype: torch.dtype, sizes: Sizes | None
) -> str | None:
    """Why a kernel made from its step can't decode with a rule on tensors like these, None if it can."""
    with_heads = ["H" in axes.split() for axes in mechanism.state_axes().values()]
    if any(with_heads) and not all(with_heads):
        return "programs of several heads would change a state that has none"
    return why_not_generated(mechanism, device, dtype, sizes)


def decode_reference(mechanism: Mechanism, inputs: Inputs, pool: State, state_index: Tensor, sizes: Sizes) -> Tensor:
    """`mechanism.step` lifted over rows, for any rule, on any device."""
    domain = mechanism.inputs_domain()
    dtype = scan_state_dtype(mechanism, inputs)
    wide = {name: repeat_key_heads(domain[name].axes, x.to(dtype), sizes) for name, x in inputs.items()}
    padding = state_index < 0
    rows = state_index.clamp_min(0).long()
    old = {name: states.index_select(0, rows) for name, states in pool.items()}
    new, output = mechanism.step(old, wide)
    if new.keys() != pool.keys():
        raise InputError(f"{mechanism.name}: step returned states {list(new)}; allowed: {list(pool)}")

    for name, states in pool.items():
        write_rows(states, (rows,), new[name], ~padding)
    value = inputs[mechanism.value_input]
    return output.masked_fill(along(padding, output), 0).to(value.dtype)


def write_rows(states: Tensor, rows: tuple[Tensor, ...], new: Tensor, live: Tensor | None) -> None:
    """states[rows] = new, in place, but where `live` is False; None: everywhere. Rows that are live are distinct."""
    if live is not None and len(live):
        # shapes must not depend on padding, so it writes once more what a live row writes, or, without one, what it was
        source = torch.where(live, torch.arange(len(live), device=live.device), live.int().argmax())
        new = torch.where(along(live, new), new, states[rows])[source]
        rows = tuple(row[source] for row in rows)
    states[rows] = new


def along(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over rows, shaped to be broadcast over the other axes of `x`."""
    return mask.view(-1, *[1] * (x.ndim - 1))


def decode_triton(mechanism: Mechanism, inputs: Inputs, pool: State, state_index: Tensor, sizes: Sizes) -> Tensor:
    """One launch for all rows, for a rule that is one affine scan or has a kernel of its own."""
    if mechanism.has_decode_kernel:
        return mechanism.decode_kernel(inputs, pool, state_index)
    from momkit.kernels.decode import decode_rows

    (structure,) = mechanism.structures()
    # what a rule computes in `lower` it computes as its step would, in float32
    own = type(mechanism).lower is not Mechanism.lower
    x = mechanism.lower({name: tensor.float() for name, tensor in inputs.items()} if own else inputs)
    names = ["q", "k", "v", *DECAY_INPUTS[structure.decay], *ERASE_INPUTS[structure.erase]]
    if structure.read == "before" and x.u is not None:
        names.append("u")
    rows = {name: by_row(name, x.need(name), sizes["T"]) for name in names}
    if len({rows[name].shape[1] for name in KEYED if name in rows}) > 1:
        heads = x.v.shape[1]
        rows |= {n: rows[n].repeat_interleave(heads // rows[n].shape[1], 1) for n in KEYED if n in rows}
    output: Tensor = decode_rows(
        *(rows.get(name) for name in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u")),
        pool["S"],
        state_index,
        x.scale,
        structure.erase_sees == "previous",
        structure.read == "before",
    )
    return output.to(inputs[mechanism.value_input].dtype)


def by_row(name: str, x: Tensor, num_rows: int) -> Tensor:
    """An input with a row for each token, which a constant need not have."""
    ndim = 2 if name in ("g", "beta") else 3
    return x if x.ndim == ndim else x.expand(num_rows, *x.shape)


def check_pool(
    mechanism: Mechanism, sizes: Sizes, pool: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> State:
    """States `[P, *shape]` that can be updated in place."""
    shapes = mechanism.state_spec(sizes)
    if not isinstance(pool, Mapping):
        raise InputError(f"pool must be a dict of tensors, got {type(pool).__name__}")
    if set(pool) != set(shapes):
        raise InputError(f"pool has {sorted(pool)}; allowed: {sorted(shapes)}")
    num_rows: int | None = None
    for name, shape in shapes.items():
        what, tensor = f"pool[{name!r}]", pool[name]
        if not isinstance(tensor, Tensor):
            raise InputError(f"{what} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise InputError(f"{what} is {tensor.dtype}; allowed for these inputs: {dtype}")
        if tensor.device != device:
            raise InputError(f"{what} is on {tensor.device}, the inputs are on {device}")
        if tensor.ndim != len(shape) + 1 or tuple(tensor.shape[1:]) != shape or len(tensor) == 0:
            axes, dims = ", ".join(["P", *mechanism.state_axes()[name].split()]), ", ".join(map(str, shape))
            raise InputError(f"{what} has shape {tuple(tensor.shape)}; allowed: [{axes}] = [1 or more, {dims}]")
        if num_rows not in (None, len(tensor)):
            raise InputError(f"{what} has P = {len(tensor)} rows, other states have {num_rows}")
        if not tensor.is_contiguous():
            raise InputError(f"{what} has strides {tensor.stride()}; allowed: contiguous, since it changes in place")
        if tensor.requires_grad:
            raise InputError(f"{what} requires a gradient; allowed: none, since it changes in place")
        num_rows = len(tensor)
    return {name: pool[name] for name in shapes}


def check_state_index(state_index: Tensor, batch_size: int, num_rows: int, device: torch.device) -> None:
    """Type, shape and device always; values where looking at them costs no synchronisation."""
    if not isinstance(state_index, Tensor) or state_index.dtype not in (torch.int32, torch.int64):
        kind = state_index.dtype if isinstance(state_index, Tensor) else type(state_index).__name__
        raise InputError(f"state_index is {kind}; allowed: an int32 or int64 tensor")
    if state_index.shape != (batch_size,) or state_index.device != device:
        got = f"{tuple(state_index.shape)} on {state_index.device}"
        raise InputError(f"state_index has shape {got}; allowed: [B] = [{batch_size}] on {device}")
    if torch.compiler.is_compiling() or not checking_values(state_index):
        return
    rows = state_index.tolist()
    if not all(-1 <= row < num_rows for row in rows):
        raise InputError(f"state_index holds {rows}; allowed: 0 to {num_rows - 1}, and -1 for padding")
    written = [row for row in rows if row >= 0]
    if len(set(written)) < len(written):
        raise InputError(f"state_index holds {rows}; allowed: no pool row twice")


KERNELS = {"triton": why_no_kernel, "generated": why_not_generated_step}
BACKENDS: dict[str, DecodeFunction] = {
    "reference": decode_reference,
    "triton": decode_triton,
    "generated": decode_generated,
}
