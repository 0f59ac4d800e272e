"""The paper's router in one kernel, two with the loss, and one back.

    l_t = W x_t;  the k largest l_tm are chosen, their softmax weighs them
    aux_loss = M sum_m f_m p_m,  f_m choices of m a token, p_m mean of softmax(l_t)_m

Near ties must not flip from training to decoding, so every l_tm is added up in the one order that D fixes, whatever the
tile: in lanes, each with its products in turn, then one half of the lanes to the other until one is left. Sums over
tokens are added up by programs, then over programs in order.

Letters: T tokens, D hidden size, M memories.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.tiles import load_tile, store_tile
from momkit.kernels.tuning import multiprocessors, padded

# what the registers of a program hold
MOST_MEMORIES = 64
MOST_CHOICES = 8
# 2 to this power neighbours along D are multiplied at a time; other numbers round logits differently
LOG_LANES = 8
# parts that are added up at a time
PARTS = 128


class Tile(NamedTuple):
    """Tokens and memories whose logits a program adds up at a time, its warps and stages of loads, and programs on
    each multiprocessor, at most: each leaves a part of the sums over tokens."""

    tokens: int
    memories: int
    num_warps: int
    num_stages: int
    occupancy: int

    def programs(self, T: int, device: torch.device) -> int:
        return min(cdiv(T, self.tokens), self.occupancy * multiprocessors(device))


# by the most tokens that a row of this table serves: few have a program each
TILES = {512: Tile(1, 16, 4, 4, 8), 2**31: Tile(8, 4, 8, 3, 2)}
# of the backward pass: columns of x, tokens and gradients of logits that a program takes at a time, at most, and
# programs on each multiprocessor
BACKWARD_COLUMNS, BACKWARD_TOKENS, BACKWARD_LOGITS, BACKWARD_OCCUPANCY = 64, 32, 1024, 4


def fits(num_memories: int, top_k: int) -> bool:
    """Whether `route_top_k` takes so many memories and choices."""
    return num_memories <= MOST_MEMORIES and top_k <= MOST_CHOICES


def route_top_k(
    x: Tensor, weight: Tensor, mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose the top_k memories of each token, the largest logit first and of equal ones the lowest id; differentiable.

    x: `[T, D]`, weight: `[M, D]`, each bf16, fp16 or fp32; products and sums are float32. mask: `[T]` bool; tokens
    where it is False are left out of aux_loss. Returns weights `[T, top_k]` float32, memory_ids `[T, top_k]` int64,
    logits `[T, M]` float32 and aux_loss, a float32 scalar. Raises BackendError for other dtypes, M above 64, top_k
    above 8 or above M. Du et al. 2025, arXiv 2502.13685; the loss: Fedus, Zoph, Shazeer 2021, arXiv 2101.03961.
    """
    return forward(x, weight, mask, top_k)[:4]


@torch.library.custom_op("momkit::route_top_k", mutates_args=())
@compiled_together
def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`route_top_k`, and for the backward pass the derivative `[M]` of aux_loss by each token's probabilities."""
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in narrow or weight.dtype not in narrow:
        raise BackendError(
            f"route_top_k got x in {x.dtype} and weight in {weight.dtype}; allowed: bfloat16, float16 or float32"
        )
    (T, D), M = x.shape, len(weight)
    if not 1 <= top_k <= M or not fits(M, top_k):
        raise BackendError(
            f"route_top_k got M = {M} memories, top_k = {top_k}; allowed: up to {MOST_MEMORIES} memories, "
            f"top_k from 1 to M and to {MOST_CHOICES}"
        )
    tile = next(tile for most, tile in TILES.items() if most >= T)
    programs = tile.programs(T, x.device)
    weights, logits = (x.new_empty((T, n), dtype=torch.float32) for n in (top_k, M))
    memory_ids = torch.empty_like(weights, dtype=torch.int64)
    aux_loss, pull = logits.new_empty(()), logits.new_empty(M)
    probs = logits.new_empty((programs, M))
    counts = torch.empty_like(probs, dtype=torch.int32)
    launch(
        route_kernel, programs,
        (x.contiguous(), weight.contiguous(), packed(mask), weights, memory_ids, logits, probs, counts, aux_loss, pull),
        (T, programs),
        D, M, top_k, tile.tokens, min(tile.memories, triton.next_power_of_2(M)), LOG_LANES, tile.num_stages,
        programs == 1, num_warps=tile.num_warps,
    )  # fmt: skip
    if programs != 1:
        launch(balance_kernel, 1, (probs, counts, aux_loss, pull), (programs,), M, top_k, PARTS)
    return weights, memory_ids, logits, aux_loss, pull


@forward.register_fake
def _(
    x: Tensor, weight: Tensor, mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, M = x.shape[0], weight.shape[0]
    weights, logits = (x.new_empty((T, n), dtype=torch.float32) for n in (top_k, M))
    memory_ids = torch.empty_like(weights, dtype=torch.int64)
    return weights, memory_ids, logits, logits.new_empty(()), logits.new_empty(M)


@torch.library.custom_op("momkit::route_top_k_backward", mutates_args=())
@compiled_together
def backward(
    x: Tensor, weight: Tensor, mask: Tensor | None, weights: Tensor, memory_ids: Tensor, logits: Tensor, pull: Tensor,
    d_weights: Tensor | None, d_logits: Tensor | None, d_aux_loss: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and weight, from those of any of the results."""
    (T, D), (M, top_k) = x.shape, (len(weight), weights.shape[1])
    tokens, columns = min(BACKWARD_TOKENS, BACKWARD_LOGITS // padded(M)), cdiv(D, BACKWARD_COLUMNS)
    programs = min(cdiv(T, tokens), cdiv(BACKWARD_OCCUPANCY * multiprocessors(x.device), columns))
    dx, parts = x.new_empty(x.shape), logits.new_empty((programs, M, D))
    launch(
        route_backward_kernel, programs * columns,
        (x.contiguous(), weight.contiguous(), packed(mask), weights, memory_ids, logits, pull,
         packed(d_weights), packed(d_logits), d_aux_loss, dx, parts),
        (T, programs), D, M, top_k, tokens, padded(M), BACKWARD_COLUMNS,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@backward.register_fake
def _(
    x: Tensor, weight: Tensor, mask: Tensor | None, weights: Tensor, memory_ids: Tensor, logits: Tensor, pull: Tensor,
    d_weights: Tensor | None, d_logits: Tensor | None, d_aux_loss: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def setup_context(ctx, inputs, output):
    x, weight, mask, _ = inputs
    weights, memory_ids, logits, _, pull = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(memory_ids, pull)
    ctx.save_for_backward(x, weight, mask, weights, memory_ids, logits, pull)


def differentiate(ctx, d_weights, _, d_logits, d_aux_loss, __):
    return *backward(*ctx.saved_tensors, d_weights, d_logits, d_aux_loss), None, None


forward.register_autograd(differentiate, setup_context=setup_context)


def packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit
def halving_sum(x, LOG_LANES: tl.constexpr):
    """Sums over the lanes of `[tokens, memories, lanes]`, one half added to the other again and again: no layout
    changes their order."""
    for _ in tl.static_range(LOG_LANES):
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), 2)
    return tl.reshape(x, [x.shape[0], x.shape[1]])


@triton.jit
def logits_of(
    x, weight, rows, inside,
    D: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr,
    LOG_LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x W^T of rows of x, `[rows, COLUMNS]` float32, minus infinity past M."""
    LANES: tl.constexpr = 2**LOG_LANES
    EXACT: tl.constexpr = D % LANES == 0
    lanes, columns = tl.arange(0, LANES), tl.arange(0, COLUMNS)
    logits = tl.full([rows.shape[0], COLUMNS], float("-inf"), tl.float32)
    for first in range(0, M, BM):
        memories = first + tl.arange(0, BM)
        sums = tl.zeros([rows.shape[0], BM, LANES], tl.float32)
        for d in tl.range(0, D, LANES, num_stages=STAGES):
            b_x = load_tile(x + d, rows, inside, lanes, D, D - d, EXACT).to(tl.float32)
            b_w = load_tile(weight + d, memories, memories < M, lanes, D, D - d, EXACT).to(tl.float32)
            # what the compiler makes of a product and a sum may differ from tile to tile
            sums = tl.fma(b_x[:, None, :], b_w[None, :, :], sums)
        here = columns[None, None, :] == memories[None, :, None]
        found = tl.sum(tl.where(here, halving_sum(sums, LOG_LANES)[:, :, None], 0.0), 1)
        logits = tl.where((columns >= first) & (columns < min(first + BM, M)), found, logits)
    return logits


@triton.jit
def softmax(x):
    """Softmax of rows."""
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def live_rows(mask, start, rows, inside):
    """Rows from start on that are tokens and are not masked."""
    return inside if mask is None else inside & (tl.load(mask + start + rows, mask=inside, other=0) != 0)


@triton.jit
def store_balance(prob, count, aux_loss, pull, columns, M: tl.constexpr, K: tl.constexpr):
    """aux_loss, and pull: its derivative by the probabilities of a token that counts; from sums over all tokens."""
    # each token that counts made K choices
    tokens = tl.maximum(tl.sum(count.to(tl.int64), 0) // K, 1).to(tl.float32)
    f = count.to(tl.float32) / tokens
    tl.store(aux_loss, M * tl.sum(f * (prob / tokens), 0))
    tl.store(pull + columns, M * f / tokens, mask=columns < M)


@triton.jit(do_not_specialize=["T", "programs"])
def route_kernel(
    x, weight, mask, weights, memory_ids, logits, probs, counts, aux_loss, pull, T, programs,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    LOG_LANES: tl.constexpr, STAGES: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Every programs-th block of BT tokens; sums over their tokens, of probabilities and choices, to `[programs, M]`.

    ALONE: there is one program, whose sums are those over all tokens.
    """
    pid = tl.program_id(0)
    rows = tl.arange(0, BT)
    columns, slots = tl.arange(0, triton.next_power_of_2(M)), tl.arange(0, triton.next_power_of_2(K))
    prob = tl.zeros([columns.shape[0]], tl.float32)
    count = tl.zeros([columns.shape[0]], tl.int32)
    for turn in range(tl.cdiv(tl.cdiv(T, BT) - pid, programs)):
        start = ((pid + turn * programs) * BT).to(tl.int64)
        inside = rows < T - start
        live = live_rows(mask, start, rows, inside)
        logit = logits_of(x + start * D, weight, rows, inside, D, M, BM, columns.shape[0], LOG_LANES, STAGES)
        store_tile(logits + start * M, logit, rows, inside, columns, M, M, False)
        prob += tl.sum(tl.where(live[:, None], softmax(logit), 0.0), 0)
        # NaN counts as largest, so that ids are legal whatever x holds
        rank = tl.where(logit != logit, float("inf"), logit)
        left = tl.broadcast_to((columns < M)[None, :], [BT, columns.shape[0]])
        top = tl.full([BT, slots.shape[0]], float("-inf"), tl.float32)
        ids = tl.zeros([BT, slots.shape[0]], tl.int64)
        for j in tl.static_range(K):
            best = tl.max(tl.where(left, rank, float("-inf")), 1)
            id = tl.min(tl.where(left & (rank == best[:, None]), columns[None, :], M), 1)
            chosen = columns[None, :] == id[:, None]
            left = left & ~chosen
            here = (slots == j)[None, :]
            top = tl.where(here, tl.sum(tl.where(chosen, logit, 0.0), 1)[:, None], top)
            ids = tl.where(here, id[:, None], ids)
            count += tl.sum((chosen & live[:, None]).to(tl.int32), 0)
        store_tile(weights + start * K, softmax(top), rows, inside, slots, K, K, False)
        store_tile(memory_ids + start * K, ids, rows, inside, slots, K, K, False)
    if ALONE:
        store_balance(prob, count, aux_loss, pull, columns, M, K)
    else:
        tl.store(probs + pid * M + columns, prob, mask=columns < M)
        tl.store(counts + pid * M + columns, count, mask=columns < M)


@triton.jit(do_not_specialize=["programs"])
def balance_kernel(
    probs, counts, aux_loss, pull, programs, M: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """aux_loss and pull from what each program added up."""
    columns = tl.arange(0, triton.next_power_of_2(M))
    prob = tl.zeros([columns.shape[0]], tl.float32)
    count = tl.zeros([columns.shape[0]], tl.int32)
    for first in range(0, programs, PARTS):
        rows = first + tl.arange(0, PARTS)
        prob += tl.sum(load_tile(probs, rows, rows < programs, columns, M, M, False), 0)
        count += tl.sum(load_tile(counts, rows, rows < programs, columns, M, M, False), 0)
    store_balance(prob, count, aux_loss, pull, columns, M, K)


@triton.jit
def logit_gradients(
    weights, memory_ids, logits, pull, d_weights, d_logits, d_aux_loss, start, rows, inside, live, columns,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits `[rows, columns]`, through all three results."""
    d = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    if d_logits is not None:
        d += load_tile(d_logits + start * M, rows, inside, columns, M, M, False)
    if d_aux_loss is not None:
        logit = load_tile(logits + start * M, rows, inside, columns, M, M, False)
        prob = softmax(tl.where((columns < M)[None, :], logit, float("-inf")))
        force = tl.load(pull + columns, mask=columns < M, other=0.0) * tl.load(d_aux_loss)
        mean = tl.sum(prob * force[None, :], 1)
        d += tl.where(live[:, None], prob * (force[None, :] - mean[:, None]), 0.0)
    if d_weights is not None:
        mean = tl.zeros([rows.shape[0]], tl.float32)
        for j in tl.static_range(K):
            w = tl.load(weights + start * K + rows * K + j, mask=inside, other=0.0)
            mean += w * tl.load(d_weights + start * K + rows * K + j, mask=inside, other=0.0)
        for j in tl.static_range(K):
            w = tl.load(weights + start * K + rows * K + j, mask=inside, other=0.0)
            dw = tl.load(d_weights + start * K + rows * K + j, mask=inside, other=0.0)
            id = tl.load(memory_ids + start * K + rows * K + j, mask=inside, other=-1)
            d += tl.where(columns[None, :] == id[:, None], (w * (dw - mean))[:, None], 0.0)
    return d


@triton.jit(do_not_specialize=["T", "programs"])
def route_backward_kernel(
    x, weight, mask, weights, memory_ids, logits, pull, d_weights, d_logits, d_aux_loss, dx, parts, T, programs,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx of BD columns of every programs-th block of BT tokens, and their part of the gradient of weight."""
    TILES: tl.constexpr = (D + BD - 1) // BD
    EXACT: tl.constexpr = D % BD == 0
    pid, first = tl.program_id(0) // TILES, tl.program_id(0) % TILES * BD
    rows, columns, depth = tl.arange(0, BT), tl.arange(0, BM), tl.arange(0, BD)
    b_w = load_tile(weight + first, columns, columns < M, depth, D, D - first, EXACT).to(tl.float32)
    d_weight = tl.zeros([BM, BD], tl.float32)
    for turn in range(tl.cdiv(tl.cdiv(T, BT) - pid, programs)):
        start = ((pid + turn * programs) * BT).to(tl.int64)
        inside = rows < T - start
        live = live_rows(mask, start, rows, inside)
        d = logit_gradients(
            weights, memory_ids, logits, pull, d_weights, d_logits, d_aux_loss,
            start, rows, inside, live, columns, M, K,
        )  # fmt: skip
        b_x = load_tile(x + start * D + first, rows, inside, depth, D, D - first, EXACT).to(tl.float32)
        dx_tile = tl.dot(d, b_w, input_precision="tf32x3")
        store_tile(dx + start * D + first, dx_tile, rows, inside, depth, D, D - first, EXACT)
        d_weight = tl.dot(tl.trans(d), b_x, d_weight, input_precision="tf32x3")
    to = parts + pid.to(tl.int64) * (M * D) + first
    store_tile(to, d_weight, columns, columns < M, depth, D, D - first, EXACT)
