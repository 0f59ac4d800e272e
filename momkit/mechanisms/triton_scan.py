"""The Triton scan: affine rules on the fused kernels of their family, chosen by the structure they declare; others on
a kernel of their own.

This file knows rules and families; the kernels take plain tensors and know neither.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.available import why_no_kernels
from momkit.mechanisms.base import Affine, Inputs, Mechanism, Sizes, State, Structure

MAX_DIM = 256


def family_of(structure: Structure) -> str | None:
    """The kernel family that serves a structure, None if none does."""
    if structure.decay in ("key", "value"):
        # a bonus of what is read before belongs to key channels
        served = structure.erase == "none" and (structure.decay == "key" or structure.read == "after")
        return "channel" if served else None
    if structure.read != "after":
        return None
    if structure.erase == "none":
        return "scalar"
    return "delta" if structure.erase == "delta" and structure.erase_sees == "decayed" else None


def why_not_triton(
    mechanism: Mechanism,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> str | None:
    """Why the Triton kernels can't run a rule on tensors like these, None if they can; what is not given may be any."""
    limits = mechanism.kernel_limits
    if not mechanism.has_scan_kernel:
        structures = mechanism.structures()
        if not structures:
            return "the rule declares no affine structure, and has no kernel of its own"
        if missing := [s for s in structures if family_of(s) is None]:
            return f"no kernel family serves {missing[0]}"
        limits = {"K": MAX_DIM, "V": MAX_DIM - mechanism.extra_columns, "slots": MAX_DIM}
    return why_no_kernels(device, dtype) or why_too_large(sizes, limits)


def why_too_large(sizes: Sizes | None, limits: Mapping[str, int]) -> str | None:
    """Which size is more than kernels take, None if none is; sizes that are not given may be any."""
    wide = [axis for axis, most in limits.items() if sizes and sizes.get(axis, 1) > most]
    return f"{wide[0]} = {sizes[wide[0]]} is more than {limits[wide[0]]}" if sizes and wide else None


def scan_triton(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State | None, sizes: Sizes
) -> tuple[Tensor, State]:
    """Run a rule over every segment; rows that no segment covers come out as zeros."""
    if mechanism.has_scan_kernel:
        start = None if initial_state is None else {name: tensor.float() for name, tensor in initial_state.items()}
        return mechanism.scan_kernel(inputs, cu_seqlens.contiguous(), start)
    if initial_state is None:
        nothing = torch.zeros((), device=cu_seqlens.device)
        shapes = mechanism.state_spec(sizes)
        state = {name: nothing.expand(len(cu_seqlens) - 1, *shape) for name, shape in shapes.items()}
        zeros = list(state.values())
    else:
        state, zeros = {name: tensor.float() for name, tensor in initial_state.items()}, []

    def affine(structure: Structure, x: Affine, S0: Tensor) -> tuple[Tensor, Tensor]:
        # states that are known to be zeros need not be read
        return affine_scan(structure, x, cu_seqlens, None if any(S0 is z for z in zeros) else S0, dtype)

    dtype = inputs[mechanism.value_input].dtype
    output, final = mechanism.compose(inputs, state, affine)
    return output.to(dtype), final


def affine_scan(
    structure: Structure, x: Affine, cu_seqlens: Tensor, S0: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One affine scan on its family's kernels.

    q, k and v are multiplied in the widest of their dtypes; where a rule makes some of them from gates, which are
    float32, in `dtype`, that of the rule's values.
    """
    family = family_of(structure)
    if family != "channel":
        dtype = torch.promote_types(torch.promote_types(x.q.dtype, x.k.dtype), x.v.dtype)
    q, k, v, gk = x.q.to(dtype), x.k.to(dtype), x.v.to(dtype), x.gk if structure.decay == "key" else None
    if q.shape[1] != k.shape[1]:
        heads = max(q.shape[1], k.shape[1])
        q, k = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (q, k))
        gk = None if gk is None else gk.repeat_interleave(heads // gk.shape[1], 1)
    cu_seqlens = cu_seqlens.contiguous()
    g = x.need("g").float() if structure.decay in ("constant", "head") else None
    result: tuple[Tensor, Tensor]
    if family == "scalar":
        from momkit.kernels.scalar_decay import scalar_scan

        result = scalar_scan(q, k, v, g, cu_seqlens, S0, x.scale)
    elif family == "delta":
        from momkit.kernels.delta import delta_scan

        beta = x.need("beta")
        result = delta_scan(q, k, v, g, beta.expand(v.shape[:2]), cu_seqlens, S0, x.scale)
    elif family == "channel":
        from momkit.kernels.channel_decay import channel_scan

        gv = x.need("gv") if structure.decay == "value" else None
        result = channel_scan(q, k, v, gk, gv, x.u, cu_seqlens, S0, x.scale, structure.read == "before")
    else:
        raise BackendError(f"backend = 'triton': no kernel family serves {structure}, which structures() must state")
    return result
