"""Short convolution, activation and l2 norm of projections that lie side by side in one tensor, as one op.

    u_r = x_r + bias_m,   z_r = sum_w weight_w u_{r-W+1+w} + conv_bias,   a = activation(z),
    y = a / sqrt(sum of a head's a^2 + 1e-6)

Slots are in memory order. Before the rows of a segment u is the segment's history. Each kernel reads and writes a row
once; the backward pass finds z again from x.

Letters: X rows of x, R slots, N segments, M memories, W conv width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.grouped_linear import token_sums
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.short_conv_kernels import backward_kernel, columns, forward_kernel, history_kernel, load_rows

ACTIVATIONS = ("none", "silu", "tanh", "sigmoid")
# columns of a block at least; elements of a warp's row in each pass; warps at most
FEWEST_LANES = 8
FORWARD_LANES = 256
BACKWARD_LANES = 128
MOST_WARPS = 8
# rows that are loaded before those in hand are worked on
FORWARD_AHEAD = 4
BACKWARD_AHEAD = 3
# rows of a strip: each reads W-1 rows of its neighbour again
FORWARD_STRIP = 32
BACKWARD_STRIP = 64
# programs of a block of columns at most, so that what each adds to gradients of parameters stays small
MOST_PROGRAMS = 512
# tiles of the small kernels
BLOCK = 512
ROWS, LANES = 32, 64
# programs a memory that add up the gradient of a bias
CUTS = 32


class Part(NamedTuple):
    """One projection: `width` columns of x, what they are convolved with, activation, and size of a norm's heads.

    bias: `[M, width]`, or `[1, width]`; segments n M / N, ... are memory n's. weight: `[width, W]`, conv_bias
    `[width]`, history `[N, W-1, width]`, None for zeros. activation: none, silu, tanh or sigmoid. norm_size: 0 for no
    norm.
    """

    width: int
    bias: Tensor | None = None
    weight: Tensor | None = None
    conv_bias: Tensor | None = None
    history: Tensor | None = None
    activation: str = "none"
    norm_size: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.bias, self.weight, self.conv_bias, self.history

    @property
    def conv_size(self) -> int:
        return 1 if self.weight is None else self.weight.shape[1]


def conv_act_norm(
    x: Tensor,
    parts: Sequence[Part],
    cu_seqlens: Tensor,
    segment: Tensor,
    source: Tensor | None = None,
    token_slot: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Cut x into its parts; convolve each segment behind its history, activate, l2-normalise groups of channels.

    x: `[X, sum of widths]`, any row stride; slot r reads row source[r] (`[R]` int64), or r itself where source is None.
    token_slot: `[X, J]` int64, with source: the slots that read a row, each once. cu_seqlens: `[N + 1]`. segment:
    `[R]`, N where there is none. All floats are bf16, fp16 or fp32, each its own; arithmetic is fp32.
    Returns for each part y `[R, width]` in x's dtype, zeros at slots of no segment, and the last W-1 inputs of
    (history, segment) `[N, W-1, width]` in the history's dtype (x's if None); None without a convolution. Raises
    InputError.
    """
    check(x, parts, cu_seqlens, segment, source, token_slot)
    tensors, layout = pack(parts)
    found = forward(x, tensors, source, token_slot, cu_seqlens, segment, layout)
    histories = iter(found[len(parts) :])
    return found[: len(parts)], [None if part.weight is None else next(histories) for part in parts]


def check(
    x: Tensor,
    parts: Sequence[Part],
    cu_seqlens: Tensor,
    segment: Tensor,
    source: Tensor | None,
    token_slot: Tensor | None,
) -> None:
    """InputError where arguments don't fit."""
    if (source is None) != (token_slot is None):
        raise InputError("source and token_slot belong together: both tensors, or both None")
    if source is None and x.shape[0] != segment.shape[0]:
        raise InputError(f"x has {x.shape[0]} rows; allowed without source: one for each of {segment.shape[0]} slots")
    if sum(part.width for part in parts) != x.shape[1]:
        raise InputError(f"parts have widths {[part.width for part in parts]}; allowed: {x.shape[1]} columns in all")
    for part in parts:
        if part.activation not in ACTIVATIONS:
            raise InputError(f"activation = {part.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
        if part.norm_size < 0 or (part.norm_size and part.width % part.norm_size):
            raise InputError(f"norm_size = {part.norm_size}; allowed: 0 and divisors of the width {part.width}")
        if part.weight is None and (part.history is not None or part.conv_bias is not None):
            raise InputError("history or conv_bias is given, weight is None; allowed: those of a convolution only")
        if part.bias is not None:
            N, M = cu_seqlens.shape[0] - 1, part.bias.shape[0]
            if source is not None and M != 1:
                raise InputError(f"bias has {M} rows; allowed with a source: 1")
            if N % M:
                raise InputError(f"bias has {M} rows; allowed: 1 and numbers that divide the {N} segments")


def pack(parts: Sequence[Part]) -> tuple[list[Tensor], list[int]]:
    """Tensors of all parts, and what is left of them: ops differentiate lists without None."""
    tensors = [tensor for part in parts for tensor in part.tensors if tensor is not None]
    layout: list[int] = []
    for part in parts:
        given = (tensor is not None for tensor in part.tensors)
        layout += (part.width, ACTIVATIONS.index(part.activation), part.norm_size, *given)
    return tensors, layout


def unpack(tensors: Sequence[Tensor], layout: Sequence[int]) -> Iterator[Part]:
    """The parts that were packed."""
    left = iter(tensors)
    # a number for each
    fields = len(Part._fields)
    for at in range(0, len(layout), fields):
        width, activation, norm_size, *given = layout[at : at + fields]
        yield Part(width, *(next(left) if there else None for there in given), ACTIVATIONS[activation], norm_size)


class Tile(NamedTuple):
    """A program's vectors: `blocks` of them make up the width; heads (if they matter) are padded to `group` lanes each;
    narrow ones take rows of several strips."""

    blocks: int
    group: int
    lanes: int
    strips: int
    num_warps: int

    @staticmethod
    def of(part: Part, most: int) -> "Tile":
        group = triton.next_power_of_2(part.norm_size) if part.norm_size else 0
        # longer convolutions hold more in registers
        most = most if part.conv_size <= 4 else most // 2
        heads = part.width // part.norm_size if part.norm_size else part.width
        lanes = max(FEWEST_LANES, group, min(most, max(1, group) * triton.next_power_of_2(heads)))
        blocks, num_warps = cdiv(heads, lanes // max(1, group)), min(MOST_WARPS, cdiv(lanes, most))
        return Tile(blocks, group, lanes, max(1, most // lanes), num_warps)


def rows_of_strips(R: int, rows: int, ahead: int, part: Part, tile: Tile) -> int:
    """Rows of a strip, in whole groups of those loaded ahead: `rows`, or fewer of few slots."""
    if part.conv_size == 1:
        # no strip reads rows of its neighbour: programs need not take more of a narrow part than of others
        rows = cdiv(rows, tile.strips)
    return ahead * max(1, cdiv(min(R, rows), ahead))


def history_like(x: Tensor, part: Part, N: int) -> Tensor:
    """Room for the new history of a part."""
    return (x if part.history is None else part.history).new_empty((N, part.conv_size - 1, part.width))


def edges_of(cu_seqlens: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Slots since the first, and until the last, of each slot's segment: `[R]` int32 both."""
    R = segment.shape[0]
    since, until = (segment.new_empty(R, dtype=torch.int32) for _ in range(2))
    launch(edges_kernel, cdiv(R, BLOCK), (cu_seqlens, segment, since, until), (R, cu_seqlens.shape[0] - 1), BLOCK)
    return since, until


def packed(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All contiguous."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


@torch.library.custom_op("momkit::conv_act_norm", mutates_args=())
@compiled_together
def forward(
    x: Tensor, tensors: Sequence[Tensor], source: Tensor | None, token_slot: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, layout: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """y of each part, then new histories of those with a convolution."""
    x = x if x.stride(1) == 1 else x.contiguous()
    source, cu_seqlens, segment = packed(source, cu_seqlens, segment)
    R, N = segment.shape[0], cu_seqlens.shape[0] - 1
    edges = edges_of(cu_seqlens, segment)
    ys, histories, offset = [], [], 0
    for part in unpack(tensors, layout):
        bias, weight, conv_bias, history = packed(*part.tensors)
        width, W = part.width, part.conv_size
        share = 1 if bias is None else max(1, N // len(bias))
        y, tile = x.new_empty((R, width)), Tile.of(part, FORWARD_LANES)
        rows = rows_of_strips(R, FORWARD_STRIP, FORWARD_AHEAD, part, tile)
        launch(
            forward_kernel, cdiv(R, rows * tile.strips) * tile.blocks,
            (x, source, bias, weight, conv_bias, history, segment, *edges, y), (R, N, rows, share),
            width, offset, x.stride(0), W, triton.next_power_of_2(W), part.norm_size, part.activation, *tile[:4],
            FORWARD_AHEAD, num_warps=tile.num_warps,
        )  # fmt: skip
        ys.append(y)
        if weight is not None:
            new_history, blocks = history_like(x, part, N), cdiv(width, LANES)
            launch(
                history_kernel, cdiv(N * (W - 1), ROWS) * blocks,
                (x, source, bias, history, cu_seqlens, segment, new_history), (N, share),
                width, offset, x.stride(0), W, blocks, LANES, ROWS,
            )  # fmt: skip
            histories.append(new_history)
        offset += width
    return ys + histories


@forward.register_fake
def _(x, tensors, source, token_slot, cu_seqlens, segment, layout):
    parts = list(unpack(tensors, layout))
    ys = [x.new_empty((segment.shape[0], part.width)) for part in parts]
    return ys + [history_like(x, part, cu_seqlens.shape[0] - 1) for part in parts if part.weight is not None]


@torch.library.custom_op("momkit::conv_act_norm_backward", mutates_args=())
@compiled_together
def backward(
    x: Tensor, tensors: Sequence[Tensor], source: Tensor | None, token_slot: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, gradients: Sequence[Tensor | None], layout: Sequence[int],
    wants_history: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and of the tensors, empty for histories where not wanted. gradients: of the op's results, None for
    zeros of a new history."""
    x = x if x.stride(1) == 1 else x.contiguous()
    source, cu_seqlens, segment = packed(source, cu_seqlens, segment)
    R, N, total = segment.shape[0], cu_seqlens.shape[0] - 1, x.shape[1]
    edges = edges_of(cu_seqlens, segment)
    parts, dx, offset, found = list(unpack(tensors, layout)), x.new_empty((R, total)), 0, []
    d_news, biases = iter(gradients[len(parts) :]), []
    for part, dy in zip(parts, gradients, strict=False):
        d_bias, d_weight, d_conv_bias, d_history = map(like, part.tensors)
        bias, weight, conv_bias, history = packed(*part.tensors)
        width, W, (dy, d_new) = part.width, part.conv_size, packed(dy, None if weight is None else next(d_news))
        share = 1 if bias is None else max(1, N // len(bias))
        if history is not None and not wants_history:
            d_history = history.new_empty(0)
        elif d_history is not None:
            # for segments without a row; the others' is written below
            d_history.zero_() if d_new is None else d_history.copy_(d_new)
        tile, taps = Tile.of(part, BACKWARD_LANES), 0 if weight is None else W
        longer = 0 if weight is None else cdiv(R, MOST_PROGRAMS * tile.strips)
        rows = rows_of_strips(R, max(BACKWARD_STRIP, longer), BACKWARD_AHEAD, part, tile)
        programs = cdiv(R, rows * tile.strips)
        sums = x.new_empty((programs, taps + (conv_bias is not None), width), dtype=torch.float32)
        launch(
            backward_kernel, programs * tile.blocks,
            (x, source, bias, weight, conv_bias, history, segment, *edges, dy, None if W == 1 else d_new, dx,
             d_history if wants_history and W > 1 else None, sums), (R, N, rows, share),
            width, offset, x.stride(0), total, W, triton.next_power_of_2(W), part.norm_size, part.activation, *tile[:4],
            BACKWARD_AHEAD, num_warps=tile.num_warps,
        )  # fmt: skip
        add_up(sums, d_weight, d_conv_bias, taps)
        if d_bias is not None:
            biases.append((d_bias, offset, share))
        found += [gradient for gradient in (d_bias, d_weight, d_conv_bias, d_history) if gradient is not None]
        offset += width
    if token_slot is not None:
        dx = token_sums(dx, token_slot)
    for d_bias, offset, share in biases:
        M, width = d_bias.shape
        sums, blocks = x.new_empty((CUTS, M, width), dtype=torch.float32), cdiv(width, LANES)
        launch(
            bias_kernel, CUTS * M * blocks, (dx, None if source is not None else cu_seqlens, sums), (len(dx), share),
            width, offset, total, M, CUTS, blocks, LANES, ROWS,
        )  # fmt: skip
        add_up(sums, None, d_bias, 0)
    return [dx, *found]


def like(tensor: Tensor | None) -> Tensor | None:
    """Room for the gradient of a tensor."""
    return None if tensor is None else tensor.new_empty(tensor.shape)


def add_up(sums: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, W: int) -> None:
    """What programs found `[count, vectors, width]`, summed in their order: W vectors for d_weight, others d_bias."""
    count, vectors, width = sums.shape
    launch(
        sums_kernel, vectors * cdiv(width, LANES), (sums, d_weight, d_bias), (count,), width, W, vectors, LANES, ROWS
    )


@backward.register_fake
def _(x, tensors, source, token_slot, cu_seqlens, segment, gradients, layout, wants_history):
    found = [x.new_empty(x.shape)]
    for part in unpack(tensors, layout):
        found += [tensor.new_empty(tensor.shape) for tensor in part.tensors[:3] if tensor is not None]
        if part.history is not None:
            found.append(part.history.new_empty(part.history.shape if wants_history else 0))
    return found


def setup_context(ctx, inputs, output):
    x, tensors, *others, ctx.layout = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *others, *tensors)


def differentiate(ctx, gradients):
    (x, *others), tensors = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
    parts = list(unpack(tensors, ctx.layout))
    gradients = list(gradients)
    for at, part in enumerate(parts):
        if gradients[at] is None:
            gradients[at] = x.new_zeros((others[-1].shape[0], part.width))
    wants_history = any(wanted.history for wanted in unpack(ctx.needs_input_grad[1], ctx.layout))
    dx, *found = backward(x, tensors, *others, gradients, ctx.layout, wants_history)
    return dx, found, None, None, None, None, None


forward.register_autograd(differentiate, setup_context=setup_context)


@triton.jit(do_not_specialize=["R", "N"])
def edges_kernel(cu_seqlens, segment, since, until, R, N, BLOCK: tl.constexpr):
    """since, until `[R]`: rows since the first and until the last of a row's segment; -1 and R where it has none.

    Rows past the last segment have none, whatever they say.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(segment + row, mask=row < R, other=N).to(tl.int32)
    begin = tl.load(cu_seqlens + n, mask=n < N, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=n < N, other=0).to(tl.int32)
    covered = row < end
    tl.store(since + row, tl.where(covered, row - begin, -1), mask=row < R)
    tl.store(until + row, tl.where(covered, end - 1 - row, R), mask=row < R)


@triton.jit(do_not_specialize=["R", "share"])
def bias_kernel(
    dx, cu_seqlens, sums, R, share,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, TOTAL: tl.constexpr, GROUPS: tl.constexpr, CUTS: tl.constexpr,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums `[CUTS, GROUPS, WIDTH]`: columns of dx added up over the rows of each memory, a part of them each program.

    Without cu_seqlens all R rows are one memory's.
    """
    pid = tl.program_id(0)
    cols, inside = columns(pid % BLOCKS, WIDTH, 0, 0, LANES)
    group, cut = pid // BLOCKS % GROUPS, pid // (BLOCKS * GROUPS)
    begin, end = 0, R
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + group * share).to(tl.int32)
        end = tl.load(cu_seqlens + (group + 1) * share).to(tl.int32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for at in range(begin + cut * ROWS, end, CUTS * ROWS):
        row = at + tl.arange(0, ROWS)
        total += load_rows(dx + OFFSET, row, row < end, cols, inside, TOTAL).to(tl.float32)
    tl.store(sums + (cut * GROUPS + group) * WIDTH + cols, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def sums_kernel(
    sums, d_weight, d_bias, count,
    WIDTH: tl.constexpr, W: tl.constexpr, VECTORS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up sums `[count, VECTORS, WIDTH]`: the first W vectors to d_weight `[WIDTH, W]`, others to rows of d_bias."""
    BLOCKS: tl.constexpr = (WIDTH + LANES - 1) // LANES
    vector = tl.program_id(0) // BLOCKS
    cols = tl.program_id(0) % BLOCKS * LANES + tl.arange(0, LANES)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for at in range(0, count, ROWS):
        row = at + tl.arange(0, ROWS)
        total += load_rows(sums + vector * WIDTH, row, row < count, cols, cols < WIDTH, VECTORS * WIDTH)
    found = tl.sum(total, 0)
    if d_weight is not None:
        to = d_weight + cols * W + vector
        tl.store(to, found.to(d_weight.dtype.element_ty), mask=(cols < WIDTH) & (vector < W))
    if d_bias is not None:
        to = d_bias + (vector - W) * WIDTH + cols
        tl.store(to, found.to(d_bias.dtype.element_ty), mask=(cols < WIDTH) & (vector >= W))
