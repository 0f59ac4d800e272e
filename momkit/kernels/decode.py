"""Decoding: one token of each row of a batch, on matrix states that stay where they lie in a pool.

A program holds all keys of a few columns of one head's state: every element is read once and written once, neighbours
along V together, and what a column's update needs to know of it is a sum inside the program.

    D = decay(S);  S' = D + b (a^T E) + k w^T, E = D or S;  o = scale q^T S', or scale q^T (S + Diag(u) k w^T)

Delta rules write w = beta v and erase with a = -beta k, b = k; others write w = v.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.kernels.tuning import multiprocessors, padded

# columns of a program's tile at most: rows of 256 keys then still fit in registers
MOST_COLUMNS = 64
# floats of the state that one warp holds
WARP_SHARE = 1024
# programs wanted on each multiprocessor, that loads of some hide behind work of others
OCCUPANCY = 4


@torch.library.custom_op("momkit::decode", mutates_args=("pool",))
def decode_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    gv: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    u: Tensor | None,
    pool: Tensor,
    state_index: Tensor,
    scale: float,
    erase_previous: bool,
    read_before: bool,
) -> Tensor:
    """Update pool rows `state_index` `[B]` in place by one token each; a negative index gives zeros and moves nothing.

    q, k, gk, a, b `[B, G, K]`, v, gv `[B, H, V]`, g, beta `[B, H]`, u `[B, H, K]`, bf16, fp16 or fp32, any row stride;
    those left out are None: beta is there for a delta rule, a and b for an erase of low rank. pool `[P, H, K, V]` fp32,
    contiguous; ids in state_index (int32 or int64) are distinct. B is 1 or more, K at most 256. Output `[B, H, V]` in
    the dtype of v.
    """
    (B, H, V), (G, K) = v.shape, q.shape[1:]
    output = v.new_empty((B, H, V))
    block, num_warps = tile_of(B * H, K, V, v.device)
    rows = [None if x is None else packed_rows(x) for x in (q, k, v, g, gk, gv, beta, a, b, u)]
    strides = [0 if x is None else x.stride(0) for x in rows]
    with torch.cuda.device_of(v):
        decode_kernel[(B * H * triton.cdiv(V, block),)](
            *rows,
            pool,
            state_index.contiguous(),
            output,
            *strides,
            scale,
            H=H,
            G=G,
            K=K,
            V=V,
            BK=padded(K),
            BV=block,
            ERASE_PREVIOUS=erase_previous,
            READ_BEFORE=read_before,
            num_warps=num_warps,
        )
    return output


@decode_rows.register_fake
def decode_rows_fake(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    """The shape of the output."""
    return v.new_empty(v.shape)


def tile_of(heads: int, keys: int, values: int, device: torch.device) -> tuple[int, int]:
    """Columns of a tile and warps of a program: wide tiles, unless too few of them would leave a GPU idle."""
    block = min(MOST_COLUMNS, padded(values))
    while block > 16 and heads * triton.cdiv(values, block) < OCCUPANCY * multiprocessors(device):
        block //= 2
    return block, min(8, max(1, padded(keys) * block // WARP_SHARE))


def packed_rows(x: Tensor) -> Tensor:
    """`x` with each row contiguous; parts of a wide projection and constants expanded along rows stay as they are."""
    return x if x[0].is_contiguous() else x.contiguous()


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    g,
    gk,
    gv,
    beta,
    a,
    b,
    u,
    pool,
    state_index,
    output,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    gk_stride,
    gv_stride,
    beta_stride,
    a_stride,
    b_stride,
    u_stride,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ERASE_PREVIOUS: tl.constexpr,
    READ_BEFORE: tl.constexpr,
):
    """One tile of columns of one head of one row; grid B * H * ceil(V / BV), tiles fastest, then heads."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    place = tl.program_id(0)
    head = place // TILES % H
    row = (place // (TILES * H)).to(tl.int64)
    key_head = head // (H // G)
    keys = tl.arange(0, BK)
    columns = place % TILES * BV + tl.arange(0, BV)
    to = output + (row * H + head) * V + columns

    index = tl.load(state_index + row).to(tl.int64)
    if index < 0:
        tl.store(to, tl.zeros([BV], output.dtype.element_ty), mask=columns < V)
        return

    at = pool + (index * H + head) * (K * V) + keys[:, None] * V + columns[None, :]
    inside = (keys[:, None] < K) & (columns[None, :] < V)
    S = tl.load(at, mask=inside, other=0.0)
    kt = load_vector(k + row * k_stride, key_head, keys, K)
    qt = load_vector(q + row * q_stride, key_head, keys, K)
    written = load_vector(v + row * v_stride, head, columns, V)

    after = S
    if g is not None:
        after = after * tl.exp(load_scalar(g + row * g_stride, head))
    if gk is not None:
        after = after * tl.exp(load_vector(gk + row * gk_stride, key_head, keys, K))[:, None]
    if gv is not None:
        after = after * tl.exp(load_vector(gv + row * gv_stride, head, columns, V))[None, :]

    seen = S if ERASE_PREVIOUS else after
    if beta is not None:
        strength = load_scalar(beta + row * beta_stride, head)
        written = strength * written
        erased = -strength * tl.sum(kt[:, None] * seen, 0)
        after += kt[:, None] * (written + erased)[None, :]
    else:
        if a is not None:
            erased = tl.sum(load_vector(a + row * a_stride, key_head, keys, K)[:, None] * seen, 0)
            after += load_vector(b + row * b_stride, key_head, keys, K)[:, None] * erased[None, :]
        after += kt[:, None] * written[None, :]

    if READ_BEFORE:
        out = tl.sum(qt[:, None] * S, 0)
        if u is not None:
            out += tl.sum(qt * load_vector(u + row * u_stride, head, keys, K) * kt, 0) * written
    else:
        out = tl.sum(qt[:, None] * after, 0)
    tl.store(at, after, mask=inside)
    tl.store(to, (scale * out).to(output.dtype.element_ty), mask=columns < V)


@triton.jit
def load_vector(row, head, offsets, SIZE: tl.constexpr):
    """One head's vector of a row `[heads, SIZE]`, float32, zero past its end."""
    return tl.load(row + head * SIZE + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)


@triton.jit
def load_scalar(row, head):
    """One head's number of a row `[heads]`, float32."""
    return tl.load(row + head).to(tl.float32)
