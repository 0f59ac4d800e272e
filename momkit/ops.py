"""The steps around a scan: grouped linear, short convolution, normalisation, combine; fused on a GPU.

The forms in plain torch define them, and run where kernels can't: on a CPU, in float64, for slots that only read.

Letters: T packed tokens, J slots a token, R = T * J slots, N segments, C channels, W conv width, H heads, V value dim.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from momkit.kernels.available import why_no_kernels


def on_kernels(x: Tensor) -> bool:
    """Whether the steps around a scan run fused on tensors like `x`."""
    return why_no_kernels(x.device, x.dtype) is None


def project_slots(x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor, token_slot: Tensor) -> Tensor:
    """`grouped_linear` of the token that each slot reads.

    x: `[T, D]`. source: `[R]`, the token of each slot. token_slot: `[T, J]`, its inverse.
    On a GPU one grouped matrix product, in the dtype that autocast asks for.
    """
    if not on_kernels(x):
        return grouped_linear(x.index_select(0, source), weight, offsets)
    from momkit.kernels.grouped_linear import grouped_linear as kernel

    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return kernel(x, weight, offsets, source, token_slot)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of group m times weight m: `x` `[R, D]`, `weight` `[M, out, D]`, `bias` `[M, out]`, `offsets` `[M + 1]`.

    Returns `[R, out]`; rows past `offsets[-1]` are zeros. One matmul a group: on a CPU `grouped_mm` loops as well, and
    refuses float64 and rows that are no multiple of 16 bytes.
    """
    bounds = offsets.tolist()
    sizes = [end - start for start, end in pairwise(bounds)]
    *groups, rest = x.split([*sizes, len(x) - bounds[-1]])  # split, not slices: its backward is one concatenation
    biases = [None] * len(groups) if bias is None else bias.unbind()
    linear = nn.functional.linear
    parts = [linear(rows, W, b) for rows, W, b in zip(groups, weight.unbind(), biases, strict=True)]
    return torch.cat([*parts, rest.new_zeros(len(rest), weight.shape[1], dtype=parts[0].dtype)])


@dataclass(frozen=True)
class Windows:
    """What a causal convolution of some width sees at each slot: the writing slots of its segment before it.

    Each segment's writing slots stand behind its history in one buffer, with a spare row after them for slots that do
    not enter. rows: `[N, W-1]` buffer rows of the histories. target: `[R]` buffer row of each slot. start: `[R]` first
    buffer row of each slot's window. kept: `[N, W-1]` buffer rows of the new histories. covered: `[R]`.
    """

    rows: Tensor
    target: Tensor
    start: Tensor
    kept: Tensor
    covered: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, segment: Tensor, writes: Tensor | None, width: int) -> "Windows":
        """cu_seqlens `[N + 1]`; segment `[R]`, N for slots of none; writes `[R]`, None where every slot enters."""
        cu, past = cu_seqlens.long(), width - 1
        num_segments = len(cu) - 1
        covered = segment < num_segments
        enters = covered if writes is None else covered & writes
        before = nn.functional.pad(enters.long().cumsum(0), (1, 0))
        first = before[cu[:-1]] + past * torch.arange(num_segments, device=cu.device)
        # a slot of no segment looks at the first one's rows; its output is discarded
        home = nn.functional.pad(first - before[cu[:-1]], (0, 1))[segment]
        start = torch.where(covered, before[:-1] + home, 0)
        spare = num_segments * past + len(segment)
        step = torch.arange(past, device=cu.device)
        return Windows(
            rows=first[:, None] + step,
            target=torch.where(enters, start + past, spare),
            start=start,
            kept=(first + before[cu[1:]] - before[cu[:-1]])[:, None] + step,
            covered=covered,
        )


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution inside each segment: y_r = sum_w weight_w x_{r-W+1+w} + bias.

    x: `[R, C]` slots in segment order. weight: `[C, W]`. history: `[N, W-1, C]`, what came before each segment.
    A read-only slot sees the history and itself, and never enters the history; slots of no segment come out as zeros.
    Returns y `[R, C]` and the new history.
    """
    channels, past = x.shape[1], weight.shape[1] - 1
    # the history keeps its own precision: under autocast it is wider than x
    wide = torch.promote_types(x.dtype, history.dtype)
    # a spare row, and enough of them for one window where there is neither segment nor slot
    buffer = x.new_zeros(windows.rows.numel() + len(x) + max(1, past), channels, dtype=wide)
    buffer = buffer.index_copy(0, windows.rows.flatten(), history.to(wide).reshape(-1, channels))
    buffer = buffer.index_copy(0, windows.target, x.to(wide))
    y = x * weight[:, past]
    if past:
        seen = nn.functional.conv1d(buffer.to(weight.dtype).T[None], weight[:, None, :past], groups=channels)[0].T
        y = y + seen.index_select(0, windows.start)
    if bias is not None:
        y = y + bias
    return torch.where(windows.covered[:, None], y, 0.0), buffer[windows.kept]


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation a projection names."""
    match activation:
        case "none":
            return x
        case "silu":
            return nn.functional.silu(x)
        case "tanh":
            return x.tanh()
        case "sigmoid":
            return x.sigmoid()
    raise ValueError(f"activation = {activation!r}; allowed: none, silu, tanh, sigmoid")


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis, in at least float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def combine(slots: Tensor, token_slot: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """o_t = sum_j w_tj o_slot(t, j) + o_shared(t), added up in the order of j, in fp32 or float64.

    slots: `[R, H, V]`. token_slot: `[T, J]`; where J is one more than the columns of `weights` `[T, slots]`, the last
    is the shared memory's and has weight one. mask: `[T]`, tokens where it is False come out as zeros.
    """
    mixed = slots.new_zeros(len(token_slot), *slots.shape[1:], dtype=weights.dtype)
    for j in range(token_slot.shape[1]):
        picked = slots.index_select(0, token_slot[:, j]).to(weights.dtype)
        mixed = mixed + (picked * weights[:, j, None, None] if j < weights.shape[1] else picked)
    if mask is not None:
        mixed = torch.where(mask[:, None, None], mixed, 0.0)
    return mixed


def combine_norm(
    slots: Tensor,
    token_slot: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    gate: Tensor | None,
    eps: float,
) -> Tensor:
    """`gated_rms_norm` of what `combine` gives, `[T, H, V]`; on a GPU in one kernel, in the dtype of slots."""
    if not on_kernels(slots):
        return gated_rms_norm(combine(slots, token_slot, weights, mask), norm_weight, gate, eps)
    from momkit.kernels.combine import combine_norm as kernel

    return kernel(slots, token_slot, weights, mask, norm_weight, gate, eps)


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis, times silu(gate): `x` `[T, H, V]` fp32 or float64, `weight` `[V]`, `gate` as x."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return normed if gate is None else normed * nn.functional.silu(gate.to(x.dtype))
