"""The generated scan: any rule on kernels written from its step.

This file knows rules; the kernels take plain tensors and a key that names a rule's module.
"""

import torch
from torch import Tensor

from momkit.kernels.available import why_no_kernels
from momkit.mechanisms.base import Inputs, Mechanism, Sizes, State
from momkit.mechanisms.reference import has_time


def kernel_source(mechanism: Mechanism, sizes: Sizes) -> str:
    """The Triton source of a rule's kernels for axes of these sizes, whatever T and the inputs' dtypes.

    Raises UnsupportedStep, which names the operation and its line, where there can be none.
    """
    from momkit.mechanisms.step_program import generate

    return generate(mechanism, sizes)


def module_key(mechanism: Mechanism, inputs: Inputs, sizes: Sizes) -> str:
    """The key of the kernels that serve a rule on such inputs."""
    from momkit.mechanisms.step_program import key_for

    key: str = key_for(type(mechanism), mechanism.spec, known(sizes), timed_constants(mechanism, inputs))
    return key


def known(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    """Sizes as a constant; kernels serve any number of tokens."""
    return tuple(sorted((axis, size) for axis, size in sizes.items() if axis != "T"))


def timed_constants(mechanism: Mechanism, inputs: Inputs) -> tuple[str, ...]:
    """Constants that were given for each token."""
    domain = mechanism.inputs_domain()
    return tuple(n for n in domain if not domain[n].axes.startswith("T") and has_time(domain[n].axes, inputs[n]))


def why_not_generated(
    mechanism: Mechanism,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> str | None:
    """Why a rule can't run on generated kernels on tensors like these, None if it can; what is not given may be any."""
    # nothing is multiplied in bfloat16, which an interpreter does wrongly
    if (reason := why_no_kernels(device, dtype if dtype == torch.float64 else None)) is not None:
        return reason
    from momkit.mechanisms.step_program import why_no_source

    axes = {a for domain in mechanism.inputs_domain().values() for a in domain.axes.split()}
    axes |= {a for names in (*mechanism.state_axes().values(), mechanism.output_axes) for a in names.split()}
    given = dict.fromkeys(axes | {"G", "H"}, 4) | (sizes or {})
    if sizes and "G" not in sizes:
        given["G"] = given["H"]
    reason = why_no_source(type(mechanism), mechanism.spec, known(given))
    return reason


def scan_generated(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State | None, sizes: Sizes
) -> tuple[Tensor, State]:
    """Run a rule's step over every segment in one kernel; rows that no segment covers come out as zeros."""
    from momkit.kernels.generated.ops import forward

    key = module_key(mechanism, inputs, sizes)
    names = list(mechanism.inputs_domain())
    tensors = [inputs[name] for name in names]
    states = list(mechanism.state_axes())
    initial = [] if initial_state is None else [initial_state[name].float() for name in states]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *initial))
    output, *rest = forward(key, tensors, initial, cu_seqlens, names.index(mechanism.value_input), save)
    return output, dict(zip(states, rest, strict=False))


def decode_generated(mechanism: Mechanism, inputs: Inputs, pool: State, state_index: Tensor, sizes: Sizes) -> Tensor:
    """Run a rule's step once for each row of a batch, on states that stay where they lie in a pool."""
    from momkit.kernels.generated.ops import decode

    key = module_key(mechanism, inputs, sizes)
    names = list(mechanism.inputs_domain())
    tensors = [inputs[name] for name in names]
    pools = [pool[name] for name in mechanism.state_axes()]
    output: Tensor = decode(key, tensors, pools, state_index, names.index(mechanism.value_input))
    return output
