"""Short convolution, activation and l2 norm of one projection, slots in memory order, as one op.

    z_r = sum_w weight_w u_{r-W+1+w} + bias,   a = activation(z),   y = a / sqrt(sum of a head's a^2 + 1e-6)

u is a segment's history, then its rows of x. A program loads a tile of rows once for each input that they see: all but
the first time out of the L1 cache. The backward pass finds z again from x and writes its gradient; a second kernel sums
from there what each row of x and of the history gets.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, compiled_together, launch

ACTIVATIONS = ("none", "silu", "tanh", "sigmoid")
# columns of a program's tile at least, and at most unless a head is wider; elements of it in each pass
FEWEST_LANES = 16
LANES = 128
FORWARD_TILE = 2048
BACKWARD_TILE = 1024
# rows over which one program sums the gradients of weight and bias: some of its tiles, whole
STRIP = 128


def conv_act_norm(
    x: Tensor, source: Tensor | None, weight: Tensor | None, bias: Tensor | None, history: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, token_slot: Tensor | None, activation: str, norm_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolve each segment behind its history, activate, l2-normalise groups of `norm_size` channels (0: none).

    x: `[X, width]`, any row stride; slot r reads row source[r] (`[R]` int64), or r itself where source is None.
    token_slot: `[X, J]` int64, with source: the slots that read a row, each once. weight: `[width, W]`, None for no
    convolution. bias: `[width]`. history: `[N, W-1, width]`, None for zeros. cu_seqlens: `[N + 1]`. segment: `[R]`, N
    where there is none. All floats are bf16, fp16 or fp32, each its own; arithmetic is fp32.
    Returns y `[R, width]` in x's dtype, zeros at slots of no segment, and the last W-1 inputs of (history, segment)
    `[N, W-1, width]` in the history's dtype (x's if None); empty without a convolution. Raises InputError.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation = {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if norm_size < 0 or (norm_size and x.shape[1] % norm_size):
        raise InputError(f"norm_size = {norm_size}; allowed: 0 and divisors of the width {x.shape[1]}")
    if (source is None) != (token_slot is None):
        raise InputError("source and token_slot belong together: both tensors, or both None")
    if source is None and len(x) != len(segment):
        raise InputError(f"x has {len(x)} rows; allowed without source: one for each of {len(segment)} slots")
    if weight is None and history is not None:
        raise InputError("history is given, weight is None; allowed: a history of a convolution only")
    return forward(x, source, weight, bias, history, cu_seqlens, segment, token_slot, activation, norm_size)


class Tile(NamedTuple):
    """What a program takes: `rows` x `lanes`, where heads (if they matter) are padded to `group` lanes each; `blocks`
    of them make up the width."""

    blocks: int
    group: int
    lanes: int
    rows: int

    @staticmethod
    def of(elements: int, width: int, norm_size: int = 0) -> "Tile":
        group = triton.next_power_of_2(norm_size) if norm_size else 0
        heads = width // norm_size if norm_size else width
        lanes = max(FEWEST_LANES, group, min(LANES, max(1, group) * triton.next_power_of_2(heads)))
        return Tile(cdiv(heads, lanes // max(1, group)), group, lanes, max(1, elements // lanes))


def as_kernels_read(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All contiguous, but for x, of which a row is enough."""
    whole = (None if tensor is None else tensor.contiguous() for tensor in others)
    return (x if x.stride(1) == 1 else x.contiguous(), *whole)


def like(tensor: Tensor | None, x: Tensor) -> Tensor:
    """Room for the gradient of a tensor; empty if there is none."""
    return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


@torch.library.custom_op("momkit::conv_act_norm", mutates_args=())
@compiled_together
def forward(
    x: Tensor, source: Tensor | None, weight: Tensor | None, bias: Tensor | None, history: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, token_slot: Tensor | None, activation: str, norm_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the new history."""
    R, N, width, W = len(segment), len(cu_seqlens) - 1, x.shape[1], 1 if weight is None else weight.shape[1]
    past = None if W == 1 else history
    inputs = as_kernels_read(x, source, weight, bias, past, cu_seqlens, segment)
    x, source, _, _, past, cu_seqlens, _ = inputs
    y = x.new_empty((R, width))
    tile = Tile.of(FORWARD_TILE, width, norm_size)
    launch(
        forward_kernel, cdiv(R, tile.rows) * tile.blocks, (*inputs, y), (R, N),
        width, x.stride(0), W, norm_size, activation, *tile,
    )  # fmt: skip
    if weight is None:
        return y, x.new_empty(0)
    new_history = (x if history is None else history).new_empty((N, W - 1, width))
    tile = Tile.of(FORWARD_TILE, width)
    launch(
        history_kernel, cdiv(N * (W - 1), tile.rows) * tile.blocks, (x, source, past, cu_seqlens, new_history),
        (N,), width, x.stride(0), W, *tile,
    )  # fmt: skip
    return y, new_history


@forward.register_fake
def _(x, source, weight, bias, history, cu_seqlens, segment, *others):
    y = x.new_empty((segment.shape[0], x.shape[1]))
    if weight is None:
        return y, x.new_empty(0)
    kept = (cu_seqlens.shape[0] - 1, weight.shape[1] - 1, x.shape[1])
    return y, (x if history is None else history).new_empty(kept)


@torch.library.custom_op("momkit::conv_act_norm_backward", mutates_args=())
@compiled_together
def backward(
    x: Tensor, source: Tensor | None, weight: Tensor | None, bias: Tensor | None, history: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, token_slot: Tensor | None, dy: Tensor, d_new: Tensor | None,
    activation: str, norm_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and history, empty for those that are None. d_new: of the new history."""
    R, N, width, W = len(segment), len(cu_seqlens) - 1, x.shape[1], 1 if weight is None else weight.shape[1]
    past, d_new = (None, None) if W == 1 else (history, d_new)
    inputs = as_kernels_read(x, source, weight, bias, past, cu_seqlens, segment, dy)
    x, _, weight, _, past, cu_seqlens, segment, _ = inputs
    strips, sums = cdiv(R, STRIP), W * (weight is not None) + (bias is not None)
    dz, parts = x.new_empty((R, width)), x.new_empty((strips, sums, width), dtype=torch.float32)
    tile = Tile.of(BACKWARD_TILE, width, norm_size)
    launch(
        backward_kernel, strips * tile.blocks, (*inputs, dz, parts), (R, N),
        width, x.stride(0), W, norm_size, activation, *tile, STRIP,
    )  # fmt: skip
    token_slot, d_new = (None if tensor is None else tensor.contiguous() for tensor in (token_slot, d_new))
    dx, d_weight, d_bias, d_history = dz, like(weight, x), like(bias, x), like(history, x)
    tile = Tile.of(FORWARD_TILE, width)
    if weight is not None or source is not None:
        dx, J = x.new_empty(x.shape), 1 if token_slot is None else token_slot.shape[1]
        launch(
            input_gradient_kernel, cdiv(len(x), tile.rows) * tile.blocks,
            (dz, weight, d_new, cu_seqlens, segment, token_slot, dx), (len(x), R, N), width, J, W, *tile,
        )  # fmt: skip
    if past is not None:
        launch(
            input_gradient_kernel, cdiv(N * (W - 1), tile.rows) * tile.blocks,
            (dz, weight, d_new, cu_seqlens, None, None, d_history), (N * (W - 1), R, N), width, 1, W, *tile,
        )  # fmt: skip
    total = parts.sum(0)
    if weight is not None:
        d_weight.copy_(total[:W].t())
    if bias is not None:
        d_bias.copy_(total[-1])
    return dx, d_weight, d_bias, d_history


@backward.register_fake
def _(x, source, weight, bias, history, *others):
    return x.new_empty(x.shape), like(weight, x), like(bias, x), like(history, x)


def setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.norm_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def differentiate(ctx, dy, d_new):
    x, _, weight, bias, history, _, segment, _ = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros((segment.shape[0], x.shape[1]))
    dx, *found = backward(*ctx.saved_tensors, dy, d_new, ctx.activation, ctx.norm_size)
    found = (None if given is None else d for given, d in zip((weight, bias, history), found, strict=True))
    return dx, None, *found, None, None, None, None, None


forward.register_autograd(differentiate, setup_context=setup_context)


@triton.jit
def columns(block, WIDTH: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr):
    """The column of each lane `[LANES]` of a block, and which lanes have one: a head's fill the first SIZE of GROUP."""
    lane = tl.arange(0, LANES)
    if SIZE == GROUP:
        cols = block * LANES + lane
        inside = cols < WIDTH
    else:
        cols = (block * (LANES // GROUP) + lane // GROUP) * SIZE + lane % GROUP
        inside = (lane % GROUP < SIZE) & (cols < WIDTH)
    return cols, inside


@triton.jit
def segment_of(segment, cu_seqlens, row, live, N):
    """The segment of each slot, its begin and end, and which slots have one."""
    n = tl.load(segment + row, mask=live, other=N).to(tl.int32)
    live = live & (n < N)
    begin = tl.load(cu_seqlens + n, mask=live, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=live, other=0).to(tl.int32)
    return n, begin, end, live & (row < end)


@triton.jit
def load_weights(weight, cols, inside, W: tl.constexpr):
    """A tuple of W vectors `[LANES]` float32; None without a convolution."""
    weights = None
    if weight is not None:
        weights = ()
        for w in tl.static_range(W):
            weights += (tl.load(weight + cols * W + w, mask=inside, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def load_rows(base, row, live, cols, inside, STRIDE: tl.constexpr):
    """A tile `[ROWS, LANES]`, float32, zeros where no row or no column is."""
    spot = base + row.to(tl.int64)[:, None] * STRIDE + cols[None, :]
    return tl.load(spot, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, tile, row, live, cols, inside, WIDTH: tl.constexpr):
    """Write a tile `[ROWS, LANES]` in the dtype of what it goes to."""
    spot = base + row.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    tl.store(spot, tile.to(base.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def load_inputs(
    x, source, history, at, there, live, n, begin, cols, inside,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """u at slots `at` of segments n, history before `begin`; zeros where not live. there: slots that may be loaded."""
    row = at
    if source is not None:
        row = tl.load(source + at, mask=there, other=0)
    own = load_rows(x, row, there, cols, inside, STRIDE)
    past = 0.0
    if history is not None:
        row = n.to(tl.int64) * (W - 1) + (at - begin + W - 1)
        past = load_rows(history, row, live & (at < begin), cols, inside, WIDTH)
    return tl.where((live & (at >= begin))[:, None], own, past)


@triton.jit
def convolve(
    x, source, weights, bias, history, cu_seqlens, segment, row, R, N, cols, inside,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The W inputs that each row sees, their convolution z, and which rows are covered."""
    n, begin, _, covered = segment_of(segment, cu_seqlens, row, row < R, N)
    u = ()
    z = tl.zeros([row.shape[0], cols.shape[0]], tl.float32)
    for w in tl.static_range(W):
        at = row - (W - 1 - w)
        # bounds of segments select afterwards: loads of x don't wait for them
        there = (at >= 0) & (row < R)
        # the last one that a row sees is itself
        past = None if w == W - 1 else history
        seen = load_inputs(x, source, past, at, there, covered, n, begin, cols, inside, WIDTH, STRIDE, W)
        u += (seen,)
        z += seen if weights is None else seen * weights[w][None, :]
    if bias is not None:
        z += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return u, z, covered


@triton.jit
def sigmoid(z):
    """Without an exponential that overflows."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1 + small)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation, and its derivative by z."""
    if ACTIVATION == "silu":
        gate = sigmoid(z)
        a = z * gate
        slope = gate * (1 + z * (1 - gate))
    elif ACTIVATION == "sigmoid":
        a = sigmoid(z)
        slope = a * (1 - a)
    elif ACTIVATION == "tanh":
        square = z * z
        # near zero the difference would cancel
        near = z * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        a = tl.where(square < 0.06, near, 2 * sigmoid(2 * z) - 1)
        slope = 1 - a * a
    else:
        a = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return a, slope


@triton.jit
def sum_heads(tile, GROUP: tl.constexpr):
    """At each lane the sum over its group of lanes."""
    ROWS: tl.constexpr = tile.shape[0]
    HEADS: tl.constexpr = tile.shape[1] // GROUP
    total = tl.sum(tile.reshape(ROWS, HEADS, GROUP), 2)
    return tl.broadcast_to(total[:, :, None], [ROWS, HEADS, GROUP]).reshape(ROWS, HEADS * GROUP)


@triton.jit
def inverse_norm(a, inside, GROUP: tl.constexpr):
    """1 / l2 norm of each lane's head; lanes without a column don't count."""
    return tl.rsqrt(sum_heads(tl.where(inside[None, :], a * a, 0.0), GROUP) + 1e-6)


@triton.jit(do_not_specialize=["R", "N"])
def forward_kernel(
    x, source, weight, bias, history, cu_seqlens, segment, y, R, N,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y of ROWS slots."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, SIZE, GROUP, LANES)
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    weights = load_weights(weight, cols, inside, W)
    _, z, covered = convolve(
        x, source, weights, bias, history, cu_seqlens, segment, row, R, N, cols, inside, WIDTH, STRIDE, W
    )
    out, _ = activate(z, ACTIVATION)
    if SIZE:
        out *= inverse_norm(out, inside, GROUP)
    store_rows(y, tl.where(covered[:, None], out, 0.0), row, row < R, cols, inside, WIDTH)


@triton.jit
def history_rows(cu_seqlens, row, N, W: tl.constexpr):
    """Of rows of all histories: the segment, its begin and end, the place counted from a history's end, and which rows
    there are."""
    n = row // (W - 1)
    live = n < N
    begin = tl.load(cu_seqlens + n, mask=live, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=live, other=0).to(tl.int32)
    return n, begin, end, row % (W - 1) - (W - 1), live


@triton.jit(do_not_specialize=["N"])
def history_kernel(
    x, source, history, cu_seqlens, new_history, N, WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of each segment."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, 0, GROUP, LANES)
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    n, begin, end, place, live = history_rows(cu_seqlens, row, N, W)
    at = end + place
    there = live & (at >= begin)
    u = load_inputs(x, source, history, at, there, live, n, begin, cols, inside, WIDTH, STRIDE, W)
    store_rows(new_history, u, row, live, cols, inside, WIDTH)


@triton.jit(do_not_specialize=["R", "N"])
def backward_kernel(
    x, source, weight, bias, history, cu_seqlens, segment, dy, dz, parts, R, N,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """dz of STRIP slots, and what they add to the gradients of weight and bias: parts `[strips, W + 1, WIDTH]`, without
    the rows of what is None."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, SIZE, GROUP, LANES)
    strip = tl.program_id(0) // BLOCKS
    weights = load_weights(weight, cols, inside, W)
    # summed over rows at the end only: until then no thread waits for another
    d_bias = tl.zeros([ROWS, LANES], tl.float32)
    d_weights = (d_bias,) * W
    for first in range(strip * STRIP, tl.minimum((strip + 1) * STRIP, R), ROWS):
        row = first + tl.arange(0, ROWS)
        u, z, covered = convolve(
            x, source, weights, bias, history, cu_seqlens, segment, row, R, N, cols, inside, WIDTH, STRIDE, W
        )
        a, slope = activate(z, ACTIVATION)
        gradient = load_rows(dy, row, row < R, cols, inside, WIDTH)
        if SIZE:
            inverse = inverse_norm(a, inside, GROUP)
            unit = a * inverse
            gradient = inverse * (gradient - unit * sum_heads(gradient * unit, GROUP))
        gradient = tl.where(covered[:, None], gradient * slope, 0.0)
        store_rows(dz, gradient, row, row < R, cols, inside, WIDTH)
        d_bias += gradient
        longer = ()
        for w in tl.static_range(W):
            longer += (d_weights[w] + u[w] * gradient,)
        d_weights = longer
    TAKEN: tl.constexpr = 0 if weight is None else W
    to = parts + strip.to(tl.int64) * ((TAKEN + (bias is not None)) * WIDTH) + cols
    for w in tl.static_range(TAKEN):
        tl.store(to + w * WIDTH, tl.sum(d_weights[w], 0), mask=inside)
    if bias is not None:
        tl.store(to + TAKEN * WIDTH, tl.sum(d_bias, 0), mask=inside)


@triton.jit
def gradient_of_inputs(
    dz, weights, d_new, at, n, begin, end, live, R, cols, inside, WIDTH: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """What u at `at` of segments n gets from the rows that see it, and from the new history."""
    du = tl.zeros([at.shape[0], cols.shape[0]], tl.float32)
    for w in tl.static_range(W):
        row = at + (W - 1 - w)
        seen = load_rows(dz, row, (row >= 0) & (row < R), cols, inside, WIDTH)
        seen = tl.where((live & (row >= begin) & (row < end))[:, None], seen, 0.0)
        du += seen if weights is None else seen * weights[w][None, :]
    if d_new is not None:
        kept = at - end + (W - 1)
        du += load_rows(d_new, n.to(tl.int64) * (W - 1) + kept, live & (kept >= 0), cols, inside, WIDTH)
    return du


@triton.jit(do_not_specialize=["X", "R", "N"])
def input_gradient_kernel(
    dz, weight, d_new, cu_seqlens, segment, token_slot, to, X, R, N,
    WIDTH: tl.constexpr, J: tl.constexpr, W: tl.constexpr,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What X rows of x get, each from its slots, in the order of its choices; without segment, rows of the history."""
    cols, inside = columns(tl.program_id(0) % BLOCKS, WIDTH, 0, GROUP, LANES)
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    weights = load_weights(weight, cols, inside, W)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for j in tl.static_range(J):
        if segment is None:
            n, begin, end, place, live = history_rows(cu_seqlens, row, N, W)
            at = begin + place
        else:
            at = row
            if token_slot is not None:
                at = tl.load(token_slot + row.to(tl.int64) * J + j, mask=row < X, other=0).to(tl.int32)
            n, begin, end, live = segment_of(segment, cu_seqlens, at, row < X, N)
        total += gradient_of_inputs(dz, weights, d_new, at, n, begin, end, live, R, cols, inside, WIDTH, W)
    store_rows(to, total, row, row < X, cols, inside, WIDTH)
