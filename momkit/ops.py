"""The steps around a scan in plain torch: grouped linear, short convolution, normalisation, combine.

Letters: T packed tokens, J slots a token, R = T * J slots, N segments, C channels, W conv width, H heads, V value dim.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of group m times weight m: `x` `[R, D]`, `weight` `[M, out, D]`, `bias` `[M, out]`, `offsets` `[M + 1]`.

    Returns `[R, out]`; rows past `offsets[-1]` are zeros. One matmul a group: on a CPU `grouped_mm` loops as well, and
    refuses float64 and rows that are no multiple of 16 bytes.
    """
    bounds = offsets.tolist()
    parts = [
        nn.functional.linear(x[start:end], weight[m], None if bias is None else bias[m])
        for m, (start, end) in enumerate(pairwise(bounds))
    ]
    parts.append(parts[0].new_zeros(len(x) - bounds[-1], weight.shape[1]))
    return torch.cat(parts)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    history: Tensor,
    segment: Tensor,
    writes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution inside each segment: y_r = sum_w weight_w x_{r-W+1+w} + bias.

    x: `[R, C]` slots in segment order. weight: `[C, W]`. history: `[N, W-1, C]`, what came before each segment.
    segment: `[R]` the segment of each row, N for rows of none; these come out as zeros.
    writes: `[R]` bool; a row where it is False sees the history and itself, and never enters the history.
    Returns y `[R, C]` and the new history.
    """
    width = weight.shape[1] - 1
    num_segments, num_rows = len(history), len(x)
    cu = cu_seqlens.long()
    covered = segment < num_segments
    enters = covered if writes is None else covered & writes
    # each segment's writing rows stand behind its history in one buffer; rows that do not enter share a last row
    before = nn.functional.pad(enters.long().cumsum(0), (1, 0))
    start = before[cu[:-1]] + width * torch.arange(num_segments, device=x.device)
    lane = segment.clamp_max(max(0, num_segments - 1))
    window = before[:-1] - before[cu[:-1]][lane] + start[lane] if num_segments else before[:-1]
    window = torch.where(covered, window, 0)
    last = num_segments * width + num_rows
    target = torch.where(enters, window + width, last)
    end = start + before[cu[1:]] - before[cu[:-1]]
    kept = torch.arange(width, device=x.device)

    buffer = x.new_zeros(last + 1, x.shape[1])
    buffer = buffer.index_copy(0, (start[:, None] + kept).reshape(-1), history.to(x.dtype).reshape(-1, x.shape[1]))
    buffer = buffer.index_copy(0, target, x)
    y = x * weight[:, width]
    if width:
        span = last - width + 1
        past = buffer[:span] * weight[:, 0]
        for w in range(1, width):
            past = past + buffer[w : w + span] * weight[:, w]
        y = y + past.index_select(0, window)
    if bias is not None:
        y = y + bias
    y = torch.where(covered[:, None], y, 0.0)
    return y, buffer[end[:, None] + kept]


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


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis, times silu(gate): `x` `[T, H, V]` fp32 or float64, `weight` `[V]`, `gate` as x."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return normed if gate is None else normed * nn.functional.silu(gate.to(x.dtype))
