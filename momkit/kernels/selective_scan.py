"""Mamba's selective scan: h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T, o_t = h_t C_t + D x_t (Gu, Dao 2023).

Long segments are cut in pieces: a first pass finds what each piece adds to the state, a chain over pieces gives each
its start, and the scan proper runs all pieces side by side. The forward pass keeps the state before every few tokens,
from which the backward pass finds those in between again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.layout import Pieces, piece_tokens
from momkit.kernels.selective_kernels import TOKENS, chain_kernel, gradient_kernel, scan_kernel
from momkit.kernels.tuning import multiprocessors, padded

SHORTEST_PIECE = 256
CHAIN_BLOCK = 1024
# elements of the state that a program holds: all its threads are one warp, unless N is wider
SCAN_TILE = 512
GRADIENT_TILE = 128
# channels that a program of the backward pass takes, one tile after another: gradients of B and C are sums over them
GROUP = 64
# programs wanted on each multiprocessor
OCCUPANCY = 4


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan packed segments: x, dt `[T, channels]`, A `[channels, N]` float32, B, C `[T, N]`, D `[channels]`,
    initial_state `[S, channels, N]` float32, None for zeros -> output `[T, channels]` in the dtype of x, final state
    `[S, channels, N]` float32. A and D may have a row for each token: `[T, channels, N]`, `[T, channels]`."""
    if A.ndim == 3 or D.ndim == 2:
        A, D = A.expand(len(x), -1, -1), D.expand(len(x), -1)
    inputs = (x, dt, A, B, C, D, initial_state)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    output, final_state, *_ = forward(x, dt, A, B, C, D, cu_seqlens, initial_state, keep)
    return output, final_state


@dataclass(frozen=True)
class Scans:
    """What the launches of one call share; B and C in float32, as every program reads them."""

    pieces: Pieces
    length: int
    cu_seqlens: Tensor
    dt: Tensor
    A: Tensor
    num_tokens: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.A.shape[-2], self.A.shape[-1]

    def starts(self, state: Tensor | None, x: Tensor, B: Tensor, reverse: bool = False) -> Tensor:
        """`[P, channels, N]`: the state that each piece starts from; reversed, the gradient of that which it ends
        with, x that of the output, and B what the output read by."""
        channels, N = self.sizes
        starts = self.A.new_empty((self.pieces.count, channels, N))
        split = self.pieces.most_split(self.num_tokens, self.length)
        spans = starts.new_empty((split, channels))
        self.scan(split, x, B, starts, spans=spans, reverse=reverse)
        launch(
            chain_kernel, self.pieces.count * cdiv(channels * N, CHAIN_BLOCK),
            (state, self.A, starts, spans, self.pieces.table, self.cu_seqlens),
            (self.pieces.count, self.pieces.segments, self.length), channels, N, CHAIN_BLOCK, reverse,
        )  # fmt: skip
        return starts

    def scan(
        self,
        places: int,
        x: Tensor,
        B: Tensor,
        starts: Tensor,
        *,
        C: Tensor | None = None,
        D: Tensor | None = None,
        out: Tensor | None = None,
        last: Tensor | None = None,
        kept: Tensor | None = None,
        spans: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Launch `scan_kernel` on the first places; without `out` it finds what each piece adds to the state."""
        channels, N = self.sizes
        block = tile_channels(channels, N, SCAN_TILE)
        launch(
            scan_kernel, places * cdiv(channels, block),
            (x, self.dt, self.A, B, C, D, starts, out, last, kept, spans, self.pieces.table, self.cu_seqlens),
            (self.pieces.count, self.pieces.segments),
            channels, N, block, padded(N), reverse, out is None, kept is not None, self.A.ndim == 3,
            num_warps=1,
        )  # fmt: skip


def tile_channels(channels: int, N: int, tile: int) -> int:
    """Channels of a tile of the state."""
    return max(1, min(tile // padded(N), padded(channels)))


def piece_length(num_tokens: int, A: Tensor) -> int:
    """Tokens a piece: such that all tokens in one segment give each multiprocessor the programs wanted.

    With an A for each token segments stay whole: a piece then has no one decay for the time it spans.
    """
    if A.ndim == 3:
        return piece_tokens(num_tokens, 1, SHORTEST_PIECE)
    groups = cdiv(A.shape[-2], GROUP)
    return piece_tokens(num_tokens * groups, OCCUPANCY * multiprocessors(A.device), SHORTEST_PIECE)


@torch.library.custom_op("momkit::selective_scan", mutates_args=())
@compiled_together
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and final state; for the backward pass, if `keep`, states before blocks of tokens, and the pieces."""
    x, dt, A, B, C, D = (tensor.contiguous() for tensor in (x, dt, A, B.float(), C.float(), D))
    initial_state = None if initial_state is None else initial_state.contiguous()
    (T, channels), N = x.shape, A.shape[-1]
    length = piece_length(T, A)
    pieces = Pieces.of(cu_seqlens, T, length)
    scans = Scans(pieces, length, cu_seqlens, dt, A, T)
    starts = scans.starts(initial_state, x, B)
    output, final_state = torch.empty_like(x), starts.new_empty((pieces.segments, channels, N))
    kept = x.new_empty((kept_states(T, pieces.segments), channels, N)) if keep else None
    scans.scan(pieces.count, x, B, starts, C=C, D=D, out=output, last=final_state, kept=kept)
    assert pieces.first is not None
    return output, final_state, x.new_empty(0) if kept is None else kept, pieces.table, pieces.first


def kept_states(num_tokens: int, segments: int) -> int:
    """Places for states before blocks of tokens, see `slot_of`."""
    return num_tokens // TOKENS.value + segments


@forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments, states = cu_seqlens.shape[0] - 1, kept_states(x.shape[0], cu_seqlens.shape[0] - 1)
    count = torch.library.get_ctx().new_dynamic_size()
    kept = x.new_empty((states, *A.shape[-2:]) if keep else 0)
    table, first = (cu_seqlens.new_empty(shape, dtype=torch.int32) for shape in ((4, count), (segments + 1,)))
    return x.new_empty(x.shape), A.new_empty((segments, *A.shape[-2:])), kept, table, first


@torch.library.custom_op("momkit::selective_scan_backward", mutates_args=())
@compiled_together
def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor,
    kept: Tensor,
    table: Tensor,
    first: Tensor,
    d_output: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and of the initial state."""
    x, dt, A, D, d_output = (tensor.contiguous() for tensor in (x, dt, A, D, d_output))
    wide_B, wide_C = (tensor.float().contiguous() for tensor in (B, C))
    d_final = None if d_final is None else d_final.contiguous()
    (T, channels), N = x.shape, A.shape[-1]
    length = piece_length(T, A)
    pieces = Pieces(table, len(cu_seqlens) - 1, first)
    ends = Scans(pieces, length, cu_seqlens, dt, A, T).starts(d_final, d_output, wide_C, reverse=True)
    block = tile_channels(channels, N, GRADIENT_TILE)
    tiles = cdiv(min(GROUP, channels), block)
    groups = cdiv(channels, block * tiles)
    dx, d_dt = torch.empty_like(x), torch.empty_like(dt)
    timed = A.ndim == 3
    parts = T if timed else pieces.count
    dA, dD = A.new_zeros((parts, channels, N)), A.new_zeros((parts, channels))
    dB, dC = (A.new_empty((groups, T, N)) for _ in range(2))
    launch(
        gradient_kernel, pieces.count * groups,
        (x, dt, A, wide_B, wide_C, D, d_output, kept, ends, dx, d_dt, dA, dB, dC, dD, table),
        (pieces.count, pieces.segments, T),
        channels, N, block, padded(N), tiles, timed,
        num_warps=max(1, padded(N) // GRADIENT_TILE),
    )  # fmt: skip
    if not timed:
        dA, dD = dA.sum(0), dD.sum(0)
    dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    # what went back to before a segment's first piece
    return dx, d_dt, dA, dB, dC, dD.to(D.dtype), ends.index_select(0, first[:-1])


@backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu_seqlens: Tensor,
    kept: Tensor,
    table: Tensor,
    first: Tensor,
    d_output: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, d_dt, dA, dB, dC, dD = (tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D))
    return dx, d_dt, dA, dB, dC, dD, A.new_empty((len(cu_seqlens) - 1, *A.shape[-2:]))


def setup_context(ctx, inputs, output):
    *tensors, initial_state, ctx.keep = inputs
    ctx.starts = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def differentiate(ctx, d_output, d_final, *_):
    if not ctx.keep:
        raise InputError("keep = False: the backward pass has no states to start from; allowed: True")
    x, *others = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(x)
    *gradients, d_state = backward(x, *others, d_output, d_final)
    return *gradients, None, d_state if ctx.starts else None, None


forward.register_autograd(differentiate, setup_context=setup_context)
