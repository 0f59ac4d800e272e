"""The delta family: S_t = e^{g_t} S_{t-1}, then S_t += beta_t k_t (v_t - S_t^T k_t)^T, o_t = scale q_t^T S_t.

DeltaNet and Gated DeltaNet run on it, and any rule that declares such a structure. First, every chunk alone inverts its
triangular system; then states pass from chunk to chunk. Long segments are cut in pieces: a pass finds what each piece
does to any state, a chain over pieces gives each its start, and the scan proper runs all pieces side by side.
The backward pass keeps the inverses; it takes some heads at a time, and finds their states again.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from momkit.kernels.delta_backward import scan_pieces_back
from momkit.kernels.delta_chain import chain_pieces
from momkit.kernels.delta_forward import scan_pieces
from momkit.kernels.delta_gradients import chunk_gradients
from momkit.kernels.delta_inverse import chunk_inverse
from momkit.kernels.gates import gate_parts, gate_sums
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.layout import Pieces, piece_tokens
from momkit.kernels.tiles import sum_groups
from momkit.kernels.tuning import Config, config, multiprocessors, padded

SHORTEST_PIECE = 512
# bytes that states and their gradients may take in the backward pass, if one head leaves a choice
WORKSPACE = 384 << 20


class Found(NamedTuple):
    """What the forward pass finds and the backward pass needs again: chunks of segments (see `Pieces`), beta `[H, T]`
    float32, sums of gates (empty without gates), and the inverse of each chunk's system `[T, H, C]`."""

    table: Tensor
    first: Tensor
    beta: Tensor
    sums: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Call:
    """What the launches of one call share: its inputs as kernels read them, beta `[H, T]` float32, and what chunks find
    alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    cu_seqlens: Tensor
    scale: float
    chunks: Pieces
    sums: Tensor | None
    inverse: Tensor

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor, scale: float,
        found: Found | None = None,
    ) -> "Call":  # fmt: skip
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        (T, H, _), C = v.shape, chunk_size(v.dtype)
        if found is not None:
            chunks, sums = Pieces(found.table, len(cu_seqlens) - 1, found.first), None if g is None else found.sums
            return Call(q, k, v, found.beta, cu_seqlens, scale, chunks, sums, found.inverse)
        # a head's tokens side by side, as sums of gates are: 2-byte scalars H apart cannot be copied ahead
        beta = beta.new_empty((H, T), dtype=torch.float32).copy_(beta.t())
        chunks = Pieces.of(cu_seqlens, T, C)
        sums = None if g is None else gate_sums(g, chunks, C, T, H, C, v.dtype)
        call = Call(q, k, v, beta, cu_seqlens, scale, chunks, sums, v.new_empty(T, H, C))
        G, K = k.shape[1:]
        settings = config("delta_inverse", v.dtype, K, K, v.device)
        # tf32 cuts off at as many bits as float16 keeps, product after product
        precision = "tf32" if v.dtype == torch.bfloat16 else "tf32x3"
        launch(
            chunk_inverse, chunks.count * H, (k, beta, sums, call.inverse, chunks.table),
            (T, chunks.segments, chunks.count), H, G, K, C, settings.block, call.kind[0], precision,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        return call

    @property
    def found(self) -> Found:
        sums = self.v.new_empty(0) if self.sums is None else self.sums
        assert self.chunks.first is not None
        return Found(self.chunks.table, self.chunks.first, self.beta, sums, self.inverse)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, H, G, K, V."""
        return (*self.v.shape[:2], *self.k.shape[1:], self.v.shape[2])

    @property
    def kind(self) -> tuple[int, str]:
        """The last constants of every kernel: parts of gate sums, and how tensor cores multiply."""
        return 0 if self.sums is None else len(self.sums), "tf32x3" if self.v.dtype == torch.float32 else "tf32"

    def settings(self, kernel: str) -> Config:
        return config(kernel, self.v.dtype, *self.sizes[3:], self.v.device)


@dataclass(frozen=True)
class Scan:
    """Some heads of a call: pieces of segments, of `length` tokens at most."""

    call: Call
    heads: int
    length: int
    pieces: Pieces
    first_head: int = 0

    @staticmethod
    def of(call: Call, heads: int) -> "Scan":
        T, _, _, K, V = call.sizes
        length = piece_length(T, heads, K, V, call.v.dtype, call.v.device)
        return Scan(call, heads, length, Pieces.of(call.cu_seqlens, T, length))

    @property
    def most_split(self) -> int:
        return self.pieces.most_split(len(self.call.v), self.length)

    def scan(
        self,
        initial_state: Tensor | None,
        starts: Tensor | None,
        *,
        output: Tensor | None = None,
        final_state: Tensor | None = None,
        states: Tensor | None = None,
        errors: Tensor | None = None,
        moves: Tensor | None = None,
    ) -> None:
        """Launch `scan_pieces` for output and final state, for states and errors, or, given moves, for starts."""
        call, link = self.call, moves is not None
        T, H, G, K, V = call.sizes
        settings = call.settings("delta_states" if output is None else "delta_scan")
        tiles = cdiv(V, settings.block) + (cdiv(K, settings.block) if link else 0)
        launch(
            scan_pieces, (self.most_split if link else self.pieces.count) * self.heads * tiles,
            (call.q, call.k, call.v, call.beta, call.inverse, call.sums, initial_state, starts, moves,
             output, final_state, states, errors, call.cu_seqlens, self.pieces.table, call.chunks.first),
            (T, self.pieces.segments, self.pieces.count, self.first_head, call.scale),
            H, self.heads, G, K, V, call.inverse.shape[2], padded(K), settings.block,
            initial_state is not None, starts is not None and not link, output is not None, states is not None, link,
            *call.kind,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def scan_back(
        self,
        d_output: Tensor,
        d_final: Tensor | None,
        ends: Tensor | None,
        *,
        dv: Tensor | None = None,
        d_initial: Tensor | None = None,
        d_states: Tensor | None = None,
    ) -> None:
        """Launch `scan_pieces_back` for dv, d_states and, if wanted, d_initial, or, without them, for ends."""
        call, link = self.call, d_states is None
        T, H, G, K, V = call.sizes
        settings = call.settings("delta_scan_backward")
        places = self.most_split if link else self.pieces.count
        launch(
            scan_pieces_back, places * self.heads * cdiv(V, settings.block),
            (call.q, call.k, call.beta, call.inverse, call.sums, d_output, d_final, ends, dv, d_initial,
             d_states, call.cu_seqlens, self.pieces.table, call.chunks.first),
            (T, self.pieces.segments, self.pieces.count, self.first_head, call.scale),
            H, self.heads, G, K, V, call.inverse.shape[2], padded(K), settings.block,
            d_final is not None, ends is not None and not link, d_initial is not None, link,
            *call.kind,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def chain(self, moves: Tensor, starts: Tensor, reverse: bool = False) -> None:
        """From where pieces arrive to where they start, in place."""
        K, V = starts.shape[2:]
        settings = config("delta_chain", starts.dtype, K, V, starts.device)
        launch(
            chain_pieces, len(starts) * self.heads * cdiv(V, settings.block),
            (moves, starts, self.call.cu_seqlens, self.pieces.table),
            (self.pieces.segments, self.pieces.count, self.length),
            self.heads, K, V, padded(K), settings.block, reverse, "tf32x3",
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def starts(self, initial_state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """`[places, heads, K, V]`: states that pieces but a segment's first start from; moves `[places, heads, K, K]`:
        what pieces between two others do to a state. None where no segment can be split."""
        if not self.most_split:
            return None, None
        K, V = self.call.sizes[3:]
        starts = self.call.beta.new_empty(self.most_split, self.heads, K, V)
        moves = starts.new_empty(self.most_split, self.heads, K, K)
        self.scan(initial_state, starts, moves=moves)
        self.chain(moves, starts)
        return starts, moves

    def ends(self, d_output: Tensor, d_final: Tensor | None, moves: Tensor | None) -> Tensor | None:
        """`[places, heads, K, V]`: gradients of the states that pieces but a segment's last end with."""
        if moves is None:
            return None
        ends = moves.new_empty(self.most_split, self.heads, *self.call.sizes[3:])
        self.scan_back(d_output, d_final, ends)
        self.chain(moves, ends, reverse=True)
        return ends

    def gradients(
        self, d_output: Tensor, dv: Tensor, states: Tensor, d_states: Tensor, errors: Tensor,
        dq: Tensor, dk: Tensor, dg: Tensor | None, dbeta: Tensor,
    ) -> None:  # fmt: skip
        """Launch `chunk_gradients`."""
        call = self.call
        (T, H, G, K, V), C = call.sizes, call.inverse.shape[2]
        settings = call.settings("delta_gradients")
        launch(
            chunk_gradients, call.chunks.count * self.heads,
            (call.q, call.k, call.beta, call.sums, states, d_states, d_output, dv, errors, dq, dk, dg, dbeta,
             call.chunks.table),
            (T, call.chunks.segments, call.chunks.count, self.first_head, call.scale),
            H, self.heads, G, K, V, C, min(settings.block, C, padded(K)), settings.block,
            settings.num_stages == 1, *call.kind,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip


def chunk_size(dtype: torch.dtype) -> int:
    """Tokens a chunk: as many as tensor cores multiply at a time, or half of it for wide elements."""
    return 64 if dtype.itemsize == 2 else 32


def piece_length(T: int, heads: int, K: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens a piece, a power of two: as many as keep the GPU busy, since split segments are gone through twice. One
    sequence of T tokens gives each multiprocessor two programs, or one if its state takes most registers of two."""
    programs = multiprocessors(device) * (2 if K <= 128 else 1)
    return piece_tokens(T * heads * cdiv(V, config("delta_scan", dtype, K, V, device).block), programs, SHORTEST_PIECE)


def heads_at_a_time(T: int, N: int, H: int, K: int, V: int, dtype: torch.dtype) -> int:
    """As many as WORKSPACE holds, all equally many."""
    C = chunk_size(dtype)
    a_head = dtype.itemsize * (2 * (N + 1 + T // C) * K * V + T * (C + V))
    return max(heads for heads in range(1, H + 1) if H % heads == 0 and heads <= max(1, WORKSPACE // a_head))


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan packed segments: q, k `[T, G, K]`, v `[T, H, V]` of one dtype, g `[T, H]` or `[H]` float32, beta `[T, H]`,
    initial_state `[N, H, K, V]` float32, None for zeros -> output `[T, H, V]`, final state `[N, H, K, V]` float32."""
    output, final_state, *_ = forward(q, k, v, g, beta, cu_seqlens, initial_state, scale)
    return output, final_state


@torch.library.custom_op("momkit::delta_scan", mutates_args=())
@compiled_together
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output and final state, and what the backward pass needs (`Found`)."""
    call = Call.of(q, k, v, g, beta, cu_seqlens, scale)
    initial_state = None if initial_state is None else initial_state.contiguous()
    _, H, _, K, V = call.sizes
    output, final_state = torch.empty_like(call.v), call.beta.new_empty(call.chunks.segments, H, K, V)
    scan = Scan.of(call, H)
    starts, _ = scan.starts(initial_state)
    scan.scan(initial_state, starts, output=output, final_state=final_state)
    return output, final_state, *call.found


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, H, V), K = v.shape, k.shape[2]
    output, final_state = v.new_empty(v.shape), v.new_empty((cu_seqlens.shape[0] - 1, H, K, V), dtype=torch.float32)
    table = cu_seqlens.new_empty((4, torch.library.get_ctx().new_dynamic_size()), dtype=torch.int32)
    first = cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32)
    sums = v.new_empty(0) if g is None else final_state.new_empty((gate_parts(v.dtype), H, T))
    inverse = v.new_empty((T, H, chunk_size(v.dtype)))
    return output, final_state, table, first, final_state.new_empty((H, T)), sums, inverse


@torch.library.custom_op("momkit::delta_scan_backward", mutates_args=())
@compiled_together
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor,
    initial_state: Tensor | None, table: Tensor, first: Tensor, strength: Tensor, sums: Tensor, inverse: Tensor,
    d_output: Tensor, d_final: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of each token's gate `[T, H]` (empty without gates), of beta, of the initial state (empty
    if there is none)."""
    call = Call.of(q, k, v, g, beta, cu_seqlens, scale, Found(table, first, strength, sums, inverse))
    initial_state = None if initial_state is None else initial_state.contiguous()
    d_output, d_final = d_output.contiguous(), None if d_final is None else d_final.contiguous()
    T, H, G, K, V = call.sizes
    dv, d_initial = torch.empty_like(call.v), None if initial_state is None else torch.empty_like(initial_state)
    # a group's heads are summed in one place and order, from float32
    dq = call.k.new_empty((T, H, K), dtype=k.dtype if G == H else torch.float32)
    dk = torch.empty_like(dq)
    dbeta = strength.new_empty(T, H)
    dg = None if g is None else torch.empty_like(dbeta)
    heads = heads_at_a_time(T, call.chunks.segments, H, K, V, v.dtype)
    some = Scan.of(call, heads)
    for first_head in range(0, H, heads):
        scan = replace(some, first_head=first_head)
        starts, moves = scan.starts(initial_state)
        states, errors = v.new_empty(call.chunks.count, heads, K, V), v.new_empty(T, heads, V)
        scan.scan(initial_state, starts, states=states, errors=errors)
        # memory is given back as soon as it can be, and the next heads' made after this
        del starts
        ends = scan.ends(d_output, d_final, moves)
        del moves
        d_states = torch.empty_like(states)
        scan.scan_back(d_output, d_final, ends, dv=dv, d_initial=d_initial, d_states=d_states)
        scan.gradients(d_output, dv, states, d_states, errors, dq, dk, dg, dbeta)
        del scan, states, errors, ends, d_states
    dg, d_initial = (dbeta.new_empty(0) if x is None else x for x in (dg, d_initial))
    return sum_groups(dq, q), sum_groups(dk, k), dv, dg, dbeta.to(beta.dtype), d_initial


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor,
    initial_state: Tensor | None, table: Tensor, first: Tensor, strength: Tensor, sums: Tensor, inverse: Tensor,
    d_output: Tensor, d_final: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = strength.new_empty(0 if g is None else v.shape[:2])
    d_initial = strength.new_empty(0 if initial_state is None else initial_state.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dg, beta.new_empty(beta.shape), d_initial


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def differentiate(ctx, d_output, d_final, *_):
    q, k, v, g, beta, cu_seqlens, initial_state, *found = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    dq, dk, dv, dg, dbeta, d_initial = backward(
        q, k, v, g, beta, cu_seqlens, initial_state, *found, d_output, d_final, ctx.scale
    )
    if g is not None and g.ndim == 1:
        dg = dg.sum(0)
    return dq, dk, dv, None if g is None else dg, dbeta, None, None if initial_state is None else d_initial, None


forward.register_autograd(differentiate, setup_context=setup_context)
