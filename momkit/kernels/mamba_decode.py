"""Decoding with Mamba: one token of each row of a batch, on states that stay where they lie in a pool.

    h' = e^{dt A} h + dt x B^T,  o = h' C + D x

Every element of a state is read once and written once; a program holds all N numbers of a few channels of one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.kernels.decode import packed_rows
from momkit.kernels.launch import cdiv, launch
from momkit.kernels.selective_kernels import load_rate
from momkit.kernels.tuning import padded

# elements of the state that a program holds, in one warp
TILE = 256


@torch.library.custom_op("momkit::mamba_decode", mutates_args=("pool",))
def decode_channels(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, pool: Tensor, state_index: Tensor
) -> Tensor:
    """Update pool rows `state_index` `[B]` in place by one token each; a negative index gives zeros and moves nothing.

    x, dt `[B, channels]`, B, C `[B, N]`, D `[channels]`, bf16, fp16 or fp32, A `[channels, N]` fp32, or A and D with a
    row for each of B, any row stride; pool `[P, channels, N]` fp32, contiguous; ids in state_index (int32 or int64) are
    distinct. Output `[B, channels]` in the dtype of x.
    """
    A, D = A.expand(len(x), *A.shape[-2:]), D.expand(len(x), *D.shape[-1:])
    output, (channels, N) = x.new_empty(x.shape), A.shape[1:]
    rows = [packed_rows(tensor) for tensor in (x, dt, B, C, A, D)] if len(x) else [x, dt, B, C, A, D]
    block = max(1, TILE // padded(N))
    launch(
        decode_kernel, len(x) * cdiv(channels, block),
        (*rows, pool, state_index.contiguous(), output),
        tuple(tensor.stride(0) for tensor in rows), channels, N, block, padded(N),
        num_warps=1,
    )  # fmt: skip
    return output


@decode_channels.register_fake
def decode_channels_fake(x: Tensor, *others: object) -> Tensor:
    """The shape of the output."""
    return x.new_empty(x.shape)


@triton.jit(do_not_specialize=["x_stride", "dt_stride", "B_stride", "C_stride", "A_stride", "D_stride"])
def decode_kernel(
    x, dt, B, C, A, D, pool, state_index, output, x_stride, dt_stride, B_stride, C_stride, A_stride, D_stride,
    CHANNELS: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BC channels of one row; grid B * ceil(channels / BC), channels fastest."""
    TILES: tl.constexpr = (CHANNELS + BC - 1) // BC
    pid = tl.program_id(0)
    row = (pid // TILES).to(tl.int64)
    cols, states = pid % TILES * BC + tl.arange(0, BC), tl.arange(0, BN)
    there, held = cols < CHANNELS, states < N
    to = output + row * CHANNELS + cols
    index = tl.load(state_index + row).to(tl.int64)
    if index < 0:
        tl.store(to, tl.zeros([BC], output.dtype.element_ty), mask=there)
        return
    spot = cols[:, None] * N + states[None, :]
    inside = there[:, None] & held[None, :]
    at = pool + index * (CHANNELS * N) + spot
    h = tl.load(at, mask=inside, other=0.0)
    rate = load_rate(A + row * A_stride, spot, inside)
    new = tl.load(x + row * x_stride + cols, mask=there, other=0.0).to(tl.float32)
    step = tl.load(dt + row * dt_stride + cols, mask=there, other=0.0).to(tl.float32)
    write = tl.load(B + row * B_stride + states, mask=held, other=0.0).to(tl.float32)
    read = tl.load(C + row * C_stride + states, mask=held, other=0.0).to(tl.float32)
    skip = tl.load(D + row * D_stride + cols, mask=there, other=0.0).to(tl.float32)
    h = h * tl.exp2(step[:, None] * rate) + (step * new)[:, None] * write[None, :]
    tl.store(at, h, mask=inside)
    tl.store(to, (tl.sum(h * read[None, :], 1) + skip * new).to(output.dtype.element_ty), mask=there)
