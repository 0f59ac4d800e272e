"""The scalar family: S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, with one gate a head or none.

Linear attention, retention, lightning attention and Mamba2 run on it, and any rule that declares such a structure.
Long segments are cut in pieces: a first pass finds what each piece adds to the state, a chain over pieces gives each
its start, and the scan proper runs all pieces side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from momkit.kernels.gates import gate_parts, gate_sums
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.layout import Pieces, piece_tokens
from momkit.kernels.scalar_kernels import chain_kernel, gate_gradient_kernel, scan_kernel
from momkit.kernels.tiles import sum_groups
from momkit.kernels.tuning import config, multiprocessors, padded

CHUNK_SIZE = 64
SHORTEST_PIECE = 512
CHAIN_BLOCK = 4096
# chunks over which roundings may add up in gradients of gates
WINDOW = 4


def scalar_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Scan packed segments: q, k `[T, G, K]`, v `[T, H, V]` of one dtype, g `[T, H]` or `[H]`, initial_state
    `[N, H, K, V]` float32, None for zeros -> output `[T, H, V]`, final state `[N, H, K, V]` float32."""
    output, final_state, *_ = forward(q, k, v, g, cu_seqlens, initial_state, scale)
    return output, final_state


@dataclass(frozen=True)
class Scans:
    """What the launches of one call share; sums: of the gates, see `gate_sums`."""

    pieces: Pieces
    length: int
    cu_seqlens: Tensor
    sums: Tensor | None
    num_tokens: int
    num_heads: int

    @property
    def most_split(self) -> int:
        return self.pieces.most_split(self.num_tokens, self.length)

    @property
    def window(self) -> int:
        """Chunks between states that gradients of gates start from."""
        return min(WINDOW, self.length // CHUNK_SIZE)

    @property
    def slots(self) -> int:
        """Places for those states, see `slot_of`."""
        return self.num_tokens // (self.window * CHUNK_SIZE) + self.pieces.segments + 1

    def starts(self, state: Tensor | None, y: Tensor, z: Tensor, scale: float = 1.0, reverse: bool = False) -> Tensor:
        """`[places, H, K, V]`: the state that each piece but a segment's first starts from."""
        starts = y.new_empty((self.most_split, self.num_heads, y.shape[-1], z.shape[-1]), dtype=torch.float32)
        if self.most_split:
            decays = starts.new_empty(starts.shape[:2])
            self.scan(None, y, z, state, starts, decays=decays, scale=scale, reverse=reverse)
            size = starts[0, 0].numel()
            launch(
                chain_kernel, self.most_split * self.num_heads * cdiv(size, CHAIN_BLOCK),
                (state, starts, decays, self.pieces.table, self.cu_seqlens),
                (self.pieces.count, self.pieces.segments, self.length),
                self.num_heads, size, CHAIN_BLOCK, reverse, state is not None,
            )  # fmt: skip
        return starts

    def scan(
        self,
        x: Tensor | None,
        y: Tensor,
        z: Tensor,
        start: Tensor | None,
        starts: Tensor,
        *,
        out: Tensor | None = None,
        last: Tensor | None = None,
        decays: Tensor | None = None,
        w: Tensor | None = None,
        terms: Tensor | None = None,
        held: Tensor | None = None,
        crossings: Tensor | None = None,
        scale: float = 1.0,
        reverse: bool = False,
        transposed: bool = False,
    ) -> None:
        """Launch `scan_kernel`; without x it finds what each piece adds to the state."""
        H, K, V = self.num_heads, y.shape[-1], z.shape[-1]
        settings = config("scalar_scan" if w is None else "scalar_terms", y.dtype, K, V, y.device)
        places = self.most_split if x is None else self.pieces.count
        launch(
            scan_kernel, places * H * cdiv(V, settings.block),
            (x, y, z, w, self.sums, start, starts, out, last, decays, terms, held, crossings,
             self.pieces.table, self.cu_seqlens),
            (self.pieces.count, self.pieces.segments, self.num_tokens, scale),
            H, *(1 if n is None else H // n.shape[1] for n in (x, y, z, w)),
            K, V, padded(K), settings.block, CHUNK_SIZE,
            self.sums is not None, self.sums is not None and len(self.sums) == 2, reverse, transposed, x is None,
            start is not None, last is not None, 0 if w is None else self.window, settings.num_stages,
            "tf32x3" if y.dtype == torch.float32 else "tf32",
            num_warps=settings.num_warps,
        )  # fmt: skip


def piece_length(T: int, H: int, K: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens a piece: such that T tokens in one segment give each multiprocessor the two programs that it has room
    for."""
    tiles = cdiv(V, config("scalar_scan", dtype, K, V, device).block)
    return piece_tokens(T * H * tiles, 2 * multiprocessors(device), SHORTEST_PIECE)


@torch.library.custom_op("momkit::scalar_scan", mutates_args=())
@compiled_together
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and final state; for the backward pass the states that pieces start from, the pieces, sums of gates."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    (T, H, V), K = v.shape, k.shape[-1]
    length = piece_length(T, H, K, V, v.dtype, v.device)
    pieces = Pieces.of(cu_seqlens, T, length)
    sums = None if g is None else gate_sums(g, pieces, length, T, H, CHUNK_SIZE, v.dtype)
    scans = Scans(pieces, length, cu_seqlens, sums, T, H)
    starts = scans.starts(initial_state, k, v)
    output, final_state = torch.empty_like(v), starts.new_empty((pieces.segments, H, K, V))
    scans.scan(q, k, v, initial_state, starts, out=output, last=final_state, scale=scale)
    return output, final_state, starts, pieces.table, v.new_empty(0) if sums is None else sums


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    places, count = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    (T, H, V), K = v.shape, k.shape[-1]
    final_state = v.new_empty((cu_seqlens.shape[0] - 1, H, K, V), dtype=torch.float32)
    starts = final_state.new_empty((places, H, K, V))
    table = cu_seqlens.new_empty((4, count), dtype=torch.int32)
    sums = v.new_empty(0) if g is None else final_state.new_empty((gate_parts(v.dtype), H, T))
    return v.new_empty(v.shape), final_state, starts, table, sums


@torch.library.custom_op("momkit::scalar_scan_backward", mutates_args=())
@compiled_together
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    starts: Tensor,
    table: Tensor,
    sums: Tensor,
    d_output: Tensor,
    d_final: Tensor | None,
    scale: float,
    gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of each token's gate `[T, H]` if `gates` (else empty), of the initial state (empty
    if there is none)."""
    q, k, v, d_output = (tensor.contiguous() for tensor in (q, k, v, d_output))
    initial_state = None if initial_state is None else initial_state.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    (T, H, V), K = v.shape, k.shape[-1]
    length = piece_length(T, H, K, V, v.dtype, v.device)
    pieces = Pieces(table, len(cu_seqlens) - 1)
    scans = Scans(pieces, length, cu_seqlens, sums if g is not None else None, T, H)
    ends = scans.starts(d_final, q, d_output, scale, reverse=True)
    dv, d_state = torch.empty_like(v), None if initial_state is None else torch.empty_like(initial_state)
    # a group's heads are summed in one place and order, from float32
    dq = q.new_empty((T, H, K), dtype=q.dtype if q.shape[1] == H else torch.float32)
    dk = torch.empty_like(dq)
    d_queries: dict[str, Tensor] = {}
    d_keys: dict[str, Tensor] = {}
    if gates:
        parts = cdiv(K, config("scalar_terms", q.dtype, V, K, q.device).block)
        reads, writes = (starts.new_empty((parts, H, T)) for _ in range(2))
        held, crossings = q.new_empty((scans.slots, H, V, K)), starts.new_empty((parts, scans.slots, H))
        d_queries = {"w": q, "terms": reads, "held": held}
        d_keys = {"w": k, "terms": writes, "held": held, "crossings": crossings}
    scans.scan(d_output, v, k, initial_state, starts, out=dq, scale=scale, transposed=True, **d_queries)
    scans.scan(k, q, d_output, d_final, ends, out=dv, last=d_state, scale=scale, reverse=True)
    scans.scan(v, d_output, q, d_final, ends, out=dk, scale=scale, reverse=True, transposed=True, **d_keys)
    dg = starts.new_empty((T, H) if gates else 0)
    if gates:
        launch(
            gate_gradient_kernel, pieces.count * H,
            (reads, writes, crossings, sums, dg, pieces.table, cu_seqlens), (pieces.count, pieces.segments, T),
            parts, H, CHUNK_SIZE, scans.window * CHUNK_SIZE, d_final is not None,
        )  # fmt: skip
    return sum_groups(dq, q), sum_groups(dk, k), dv, dg, starts.new_empty(0) if d_state is None else d_state


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    starts: Tensor,
    table: Tensor,
    sums: Tensor,
    d_output: Tensor,
    d_final: Tensor | None,
    scale: float,
    gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = starts.new_empty(v.shape[:2] if gates else 0)
    d_state = starts.new_empty(0 if initial_state is None else initial_state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, d_state


def setup_context(ctx, inputs, output):
    q, k, v, g, cu_seqlens, initial_state, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, cu_seqlens, initial_state, *output[2:])


def differentiate(ctx, d_output, d_final, *_):
    q, k, v, g, cu_seqlens, initial_state, *found = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    gates = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_state = backward(
        q, k, v, g, cu_seqlens, initial_state, *found, d_output, d_final, ctx.scale, gates
    )
    if gates:
        dg = (dg.sum(0) if g.ndim == 1 else dg).to(g.dtype)
    return dq, dk, dv, dg if gates else None, None, None if initial_state is None else d_state, None


forward.register_autograd(differentiate, setup_context=setup_context)
