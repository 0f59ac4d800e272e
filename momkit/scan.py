"""The door to every mechanism on every backend: `scan` checks and runs, `run` only runs.

Letters: T packed tokens, N segments, P rows of a state pool.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from momkit.checks import check_cu_seqlens, check_input_names, check_inputs, check_state
from momkit.errors import BackendError, InputError
from momkit.mechanisms.base import Inputs, Mechanism, MechanismSpec, Sizes, State, axes_of
from momkit.mechanisms.chunked import scan_chunked
from momkit.mechanisms.generated_scan import scan_generated, why_not_generated
from momkit.mechanisms.reference import scan_reference, scan_state_dtype
from momkit.mechanisms.triton_scan import scan_triton, why_not_triton
from momkit.registry import find_mechanism

Backend = Literal["auto", "reference", "chunked", "triton", "generated"]
ScanFunction = Callable[[Mechanism, Inputs, Tensor, State | None, Sizes], tuple[Tensor, State]]
BACKENDS: dict[str, ScanFunction] = {
    "reference": scan_reference,
    "chunked": scan_chunked,
    "triton": scan_triton,
    "generated": scan_generated,
}
KERNELS = {"triton": why_not_triton, "generated": why_not_generated}

logger = logging.getLogger("momkit")


@dataclass(frozen=True)
class ScanOutput:
    """output: `[T, *output_axes]` in the dtype of the values; final_state: name -> `[N, *shape]`."""

    output: Tensor
    final_state: State


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs a mechanism, and why."""

    backend: str
    reason: str


def scan(
    mechanism: str | MechanismSpec | Mechanism,
    inputs: Mapping[str, Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    initial_state: Mapping[str, Tensor] | None = None,
    state_index: Tensor | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """Run an update rule over packed segments.

    mechanism: a registered name, a spec, or a module.
    inputs: the rule's inputs by name, packed, time first, no batch axis (`momkit show NAME` lists their axes).
    cu_seqlens: `[N + 1]` int32 or int64, bounds of the segments; None is one segment. Segments may be empty.
    initial_state: name -> `[N, *shape]`, or `[P, *shape]` with `state_index` `[N]`, the pool rows to start from; None
        is zeros.
    backend: "reference" (steps), "chunked" (matmul form), "triton" (fused kernels of its family or its own, on a
        GPU), "generated" (a fused kernel made from its step), or "auto"; one that can't run the rule is a BackendError.
    Raises InputError for a wrong input, naming it; UnknownNameError for an unknown mechanism or backend.
    """
    rule = as_mechanism(mechanism)
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs must be a dict of tensors, got {type(inputs).__name__}")
    tensors = dict(inputs)
    sizes = check_inputs(rule, tensors)
    value = tensors[rule.value_input]
    if cu_seqlens is None:
        # made on the device, from a length that a compiler may not know
        cu_seqlens = torch.arange(2, device=value.device) * sizes["T"]
    check_cu_seqlens(cu_seqlens, sizes["T"], value.device)
    num_segments = len(cu_seqlens) - 1
    state = check_state(rule, sizes, num_segments, initial_state, state_index, value.device)
    return run(rule, tensors, cu_seqlens, initial_state=state, backend=backend, sizes=sizes)


def run(
    mechanism: Mechanism,
    inputs: Inputs,
    cu_seqlens: Tensor,
    *,
    initial_state: State | None = None,
    backend: Backend = "auto",
    sizes: Sizes | None = None,
) -> ScanOutput:
    """`scan` without its checks; `cu_seqlens[-1]` may be less than T, the rows past it come out as zeros."""
    if sizes is None:
        sizes = read_sizes(mechanism, inputs)
    value = inputs[mechanism.value_input]
    dtype = scan_state_dtype(mechanism, inputs)
    narrow = value.dtype if dtype == torch.float32 else dtype
    choice = choose_backend(mechanism, backend, device=value.device, dtype=narrow, sizes=sizes)
    # a scan keeps its state in float32 or float64, whatever autocast says
    with torch.autocast(cu_seqlens.device.type, enabled=False):
        output, final_state = BACKENDS[choice.backend](mechanism, inputs, cu_seqlens, initial_state, sizes)
    return ScanOutput(output, final_state)


def choose_backend(
    mechanism: Mechanism,
    backend: str = "auto",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> BackendChoice:
    """The backend for a rule, with the reason; BackendError when the one asked for can't run it.

    device, dtype, sizes: of the inputs, as far as they are known.
    """
    if backend == "auto":
        choice = best_backend(mechanism, device, dtype, sizes)
        if not torch.compiler.is_compiling():
            log_choice(mechanism.name, choice)
        return choice
    if backend not in BACKENDS:
        raise BackendError(f"backend = {backend!r} is unknown; known: {', '.join(get_args(Backend))}")
    if backend == "chunked" and not mechanism.has_chunked_form:
        raise BackendError(
            f"backend = 'chunked' can't run {mechanism.name!r}: it declares no affine structure that has one"
        )
    if backend in KERNELS and (reason := KERNELS[backend](mechanism, device, dtype, sizes)):
        raise BackendError(f"backend = {backend!r} can't run {mechanism.name!r}: {reason}")
    return BackendChoice(backend, "asked for")


def best_backend(
    mechanism: Mechanism, device: torch.device | None, dtype: torch.dtype | None, sizes: Sizes | None
) -> BackendChoice:
    """Kernels on a GPU where there can be any, else the matmul form where there is one, else steps."""
    unless = ""
    if device and device.type == "cuda":
        reason = why_not_triton(mechanism, device, dtype, sizes)
        if reason is None:
            return BackendChoice("triton", "a kernel family serves the rule's structure, or it has a kernel of its own")
        unless = f"; not triton, since {reason}"
        reason = why_not_generated(mechanism, device, dtype, sizes)
        if reason is None:
            return BackendChoice("generated", "a kernel is made from the rule's step" + unless)
        unless += f"; not generated, since {reason}"
    if mechanism.has_chunked_form:
        return BackendChoice("chunked", "the rule is affine in its state, so the chunked matmul form applies" + unless)
    reason = "the rule declares no affine structure with a chunked form, so its step is lifted"
    return BackendChoice("reference", reason + unless)


@cache
def log_choice(name: str, choice: BackendChoice) -> None:
    """Say once a process which backend a rule got."""
    logger.info("%s runs on %s: %s", name, choice.backend, choice.reason)


def as_mechanism(mechanism: str | MechanismSpec | Mechanism) -> Mechanism:
    """A module from a name, a spec or a module; from a name or spec it has no parameters and only scans."""
    if isinstance(mechanism, Mechanism):
        return mechanism
    if isinstance(mechanism, MechanismSpec):
        return find_mechanism(mechanism.kind)(mechanism)
    if isinstance(mechanism, str):
        cls = find_mechanism(mechanism)
        return cls(cls.Spec())
    raise InputError(f"mechanism must be a name, a spec or a Mechanism, got {type(mechanism).__name__}")


def read_sizes(mechanism: Mechanism, inputs: Inputs) -> Sizes:
    """The size of each axis, read off the inputs' shapes; nothing but their names is checked."""
    check_input_names(mechanism, inputs)
    sizes = dict(mechanism.sizes)
    for name, domain in mechanism.inputs_domain().items():
        sizes.update(zip(axes_of(domain.axes, inputs[name]), inputs[name].shape, strict=True))
    sizes.setdefault("G", sizes.get("H", 1))
    return sizes
