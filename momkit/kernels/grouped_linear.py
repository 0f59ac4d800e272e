"""One linear map a group of rows: y_r = W_m x_source(r) for every row r of group m, and its gradients.

On a Hopper GPU torch's grouped_mm multiplies bf16; the kernels here multiply all else, and gather rows as they read.
Rows past the last group come out as zeros, forward and backward.

Letters: T tokens, J rows of a token, R = T J rows, M groups, D input width, N output width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.layout import Pieces, piece_of
from momkit.kernels.tiles import load_tile, store_tile


class Tile(NamedTuple):
    """A program's tile of a product, what it contracts at a time, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# by bytes of an element; both fit in the 99 KB of shared memory of small cards
TILES = {2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3)}
# a tile of kernels that only move rows
ROWS, COLUMNS = 16, 256
# bytes that widths must be multiples of for grouped_mm
ALIGNMENT = 16


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None = None, token_slot: Tensor | None = None
) -> Tensor:
    """y_r = W_m x_source(r), m the group of row r: offsets_m <= r < offsets_{m+1}.

    x `[T, D]`, weight `[M, N, D]`, both bf16, fp16 or fp32. offsets `[M + 1]` int32 or int64, ascending from 0; rows
    past its end are zeros. source `[R]`: the token that each row reads, and its inverse token_slot `[T, J]`, the rows
    of each token; both None where row r reads token r. Returns `[R, N]` in the dtype of x. Sums are float32, those over
    rows of a token in the order of j. Raises InputError where shapes or dtypes don't fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise InputError(f"x, weight have shapes {tuple(x.shape)}, {tuple(weight.shape)}; allowed: [T, D], [M, N, D]")
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"x is {x.dtype}, weight is {weight.dtype}; allowed: both bfloat16, float16 or float32")
    if offsets.shape != (len(weight) + 1,):
        raise InputError(f"offsets has shape {tuple(offsets.shape)}; allowed: [M + 1] = [{len(weight) + 1}]")
    if source is None or token_slot is None:
        if source is not token_slot:
            raise InputError("one of source and token_slot is None; allowed: both or neither")
    elif token_slot.ndim != 2 or len(token_slot) != len(x) or source.shape != (token_slot.numel(),):
        shapes = f"{tuple(source.shape)}, {tuple(token_slot.shape)}"
        raise InputError(f"source, token_slot have shapes {shapes}; allowed: [T * J], [T, J] with T = {len(x)}")
    y: Tensor = forward(x, weight, offsets, source, token_slot)
    return y


def uses_grouped_mm(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies: bf16 on Hopper, and on a CPU, where the interpreter's own bf16 products are wrong."""
    if dtype != torch.bfloat16:
        return False
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


def aligned(x: Tensor) -> Tensor:
    """x as grouped_mm takes it: widths, and those of a weight both ways, filled up with zeros to 16 bytes."""
    multiple = ALIGNMENT // x.element_size()
    missing = [-size % multiple for size in reversed(x.shape[1:])]
    if any(missing):
        return pad(x, [amount for after in missing for amount in (0, after)])
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def rows_product(x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None, transposed: bool) -> Tensor:
    """W_m x_source(r) of each row r, `[T, D]` -> `[R, N]`; transposed, W_m^T x_r, `[R, N]` -> `[R, D]`."""
    R, K, N = len(x if source is None else source), x.shape[1], weight.shape[2 if transposed else 1]
    if R and uses_grouped_mm(x.dtype, x.device):
        x, W = aligned(x if source is None else x.index_select(0, source)), aligned(weight)
        y = grouped_mm(x, W if transposed else W.transpose(1, 2), offs=offsets[1:].int())[:, :N].contiguous()
        launch(zero_tail_kernel, cdiv(R, ROWS), (y, offsets), (R, len(weight)), N, ROWS, COLUMNS)
        return y
    y, tile = x.new_empty((R, N)), TILES[x.element_size()]
    pieces = Pieces.of(offsets, R, tile.rows)
    launch(
        rows_kernel, pieces.count * cdiv(N, tile.columns),
        (x.contiguous(), weight.contiguous(), source, y, pieces.table), (pieces.count, pieces.segments),
        K, N, *tile[:3], transposed, precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


def weights_product(y: Tensor, x: Tensor, offsets: Tensor, source: Tensor | None) -> Tensor:
    """The sum of y_r x_source(r)^T over the rows r of each group: `[R, N]`, `[T, D]` -> `[M, N, D]`."""
    M, N, D = len(offsets) - 1, y.shape[1], x.shape[1]
    if len(y) and uses_grouped_mm(x.dtype, x.device):
        x = aligned(x if source is None else x.index_select(0, source))
        W = grouped_mm(aligned(y).t(), x, offs=offsets[1:].int())[:, :N, :D].contiguous()
        # what it leaves for a group without rows is nowhere documented
        return W.masked_fill_((offsets[1:] == offsets[:-1])[:, None, None], 0)
    W, tile = x.new_empty((M, N, D)), TILES[x.element_size()]
    launch(
        weights_kernel, M * cdiv(N, tile.rows) * cdiv(D, tile.columns),
        (y.contiguous(), x.contiguous(), source, W, offsets), (),
        N, D, *tile[:3], precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return W


def token_sums(rows: Tensor, token_slot: Tensor) -> Tensor:
    """The sum of each token's rows: `[R, D]`, `[T, J]` -> `[T, D]`."""
    (T, J), D = token_slot.shape, rows.shape[1]
    sums = rows.new_empty((T, D))
    launch(
        token_sums_kernel, cdiv(T, ROWS) * cdiv(D, COLUMNS),
        (rows, token_slot.contiguous(), sums), (T, J), D, ROWS, COLUMNS,
    )  # fmt: skip
    return sums


def packed(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.contiguous()


def precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


@torch.library.custom_op("momkit::grouped_linear", mutates_args=())
@compiled_together
def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None, token_slot: Tensor | None
) -> Tensor:  # fmt: skip
    """`grouped_linear` without its checks; only the backward pass looks at token_slot."""
    return rows_product(x, weight, offsets.contiguous(), packed(source), False)


@forward.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, source: Tensor | None, token_slot: Tensor | None) -> Tensor:
    return x.new_empty(((x if source is None else source).shape[0], weight.shape[1]))


@torch.library.custom_op("momkit::grouped_linear_backward", mutates_args=())
@compiled_together
def backward(
    d_output: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    source: Tensor | None,
    token_slot: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where not wanted."""
    offsets, dx, d_weight = offsets.contiguous(), x.new_empty(0), x.new_empty(0)
    if wants_x:
        dx = rows_product(d_output, weight, offsets, None, True)
        if token_slot is not None:
            dx = token_sums(dx, token_slot)
    if wants_weight:
        d_weight = weights_product(d_output, x, offsets, packed(source))
    return dx, d_weight


@backward.register_fake
def _(
    d_output: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    source: Tensor | None,
    token_slot: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if wants_x else 0), x.new_empty(weight.shape if wants_weight else 0)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, d_output):
    wanted = ctx.needs_input_grad[:2]
    gradients = backward(d_output, *ctx.saved_tensors, *wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None, None, None


forward.register_autograd(differentiate, setup_context=setup_context)


@triton.jit(do_not_specialize=["count", "groups"])
def rows_kernel(
    x, weight, source, y, table, count, groups,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x `[*, K]`, y `[R, N]`, weight `[M, N, K]`, TRANSPOSED `[M, K, N]`; one program a (piece of a group, BN columns).

    Tiles of the same rows are neighbours, so that the L2 cache serves all but the first.
    """
    TILES: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    group, begin, end, _ = piece_of(table, count, pid // TILES)
    if (group < 0) | (begin >= end):
        return
    rows, depth, columns = tl.arange(0, BM), tl.arange(0, BK), pid % TILES * BN + tl.arange(0, BN)
    live = rows < end - begin
    first = begin.to(tl.int64)
    sums = tl.zeros([BM, BN], tl.float32)
    if group < groups:
        # rows past the end read the last one once more
        read = first + tl.minimum(rows, end - begin - 1)
        if source is not None:
            read = tl.load(source + read).to(tl.int64)
        map = weight + group.to(tl.int64) * (N * K)
        for k in range(0, K, BK):
            b_x = load_tile(x + k, read, live, depth, K, K - k, K % BK == 0)
            if TRANSPOSED:
                b_w = load_tile(map + k * N, depth, depth < K - k, columns, N, N, N % BN == 0)
            else:
                b_w = tl.trans(load_tile(map + k, columns, columns < N, depth, K, K - k, K % BK == 0))
            sums = tl.dot(b_x, b_w, sums, input_precision=PRECISION)
    store_tile(y + first * N, sums, rows, live, columns, N, N, N % BN == 0)


@triton.jit
def weights_kernel(
    y, x, source, weight, offsets,
    N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y `[R, N]`, x `[*, D]`, weight `[M, N, D]`; one program a (group, tile of its weight), over all its rows."""
    TILES: tl.constexpr = (D + BD - 1) // BD
    BANDS: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    group = pid // (TILES * BANDS)
    n, d = pid // TILES % BANDS * BN + tl.arange(0, BN), pid % TILES * BD + tl.arange(0, BD)
    begin, end = tl.load(offsets + group).to(tl.int32), tl.load(offsets + group + 1).to(tl.int32)
    rows = tl.arange(0, BR)
    sums = tl.zeros([BN, BD], tl.float32)
    for at in range(begin, end, BR):
        live = rows < end - at
        own = tl.cast(at, tl.int64) + rows
        read = own if source is None else tl.load(source + own, mask=live, other=0).to(tl.int64)
        b_y = load_tile(y, own, live, n, N, N, N % BN == 0)
        b_x = load_tile(x, read, live, d, D, D, D % BD == 0)
        sums = tl.dot(tl.trans(b_y), b_x, sums, input_precision=PRECISION)
    store_tile(weight + group.to(tl.int64) * (N * D), sums, n, n < N, d, D, D, D % BD == 0)


@triton.jit(do_not_specialize=["T", "J"])
def token_sums_kernel(rows, token_slot, sums, T, J, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """rows `[R, D]`, token_slot `[T, J]`, sums `[T, D]`; one program a (BT tokens, BD columns)."""
    TILES: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tokens, columns = (pid // TILES).to(tl.int64) * BT + tl.arange(0, BT), pid % TILES * BD + tl.arange(0, BD)
    live = tokens < T
    total = tl.zeros([BT, BD], tl.float32)
    for j in range(J):
        slot = tl.load(token_slot + tokens * J + j, mask=live, other=0).to(tl.int64)
        total += load_tile(rows, slot, live, columns, D, D, D % BD == 0).to(tl.float32)
    store_tile(sums, total, tokens, live, columns, D, D, D % BD == 0)


@triton.jit(do_not_specialize=["R", "groups"])
def zero_tail_kernel(y, offsets, R, groups, N: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """Zero the rows of y `[R, N]` past the last group; a program that has none of them among its BR leaves at once."""
    covered = tl.load(offsets + groups).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BR
    if first + BR <= covered:
        return
    rows = first + tl.arange(0, BR)
    for n in range(0, N, BN):
        zeros = tl.zeros([BR, BN], tl.float32)
        store_tile(y, zeros, rows, (rows >= covered) & (rows < R), n + tl.arange(0, BN), N, N, N % BN == 0)
