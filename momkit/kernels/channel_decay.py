"""The channel family: S_t = Diag(e^{gk_t}) S_{t-1} + k_t v_t^T, or S_t = S_{t-1} Diag(e^{gv_t}) + k_t v_t^T.

GLA, HGRN2, RWKV6 and gated slot attention run on it, and any rule that declares such a structure. First, every chunk
alone decays its keys and queries and finds what its pairs of tokens read of each other; then states pass from chunk to
chunk. Long segments are cut in pieces: a pass finds what each piece adds to the state, a chain over pieces gives each
its start, and the walk proper takes all pieces side by side.
The backward pass keeps next to nothing; it takes some heads at a time, and finds all again. A decay by value channel is
the same problem with other names, see `channel_kernels`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momkit.errors import InputError
from momkit.kernels.channel_backward import chunk_gradients
from momkit.kernels.channel_kernels import chain_pieces, chunk_pairs, walk_pieces
from momkit.kernels.launch import cdiv, compiled_together, launch
from momkit.kernels.layout import Pieces, piece_tokens
from momkit.kernels.tiles import sum_groups
from momkit.kernels.tuning import Config, multiprocessors, padded

SHORTEST_PIECE = 512
CHAIN_BLOCK = 4096
# bytes that what chunks find, states and their gradients may take at a time, if one group of heads leaves a choice
WORKSPACE = 448 << 20
# kernel -> element bytes -> columns or rows a tile, num_warps, num_stages; "wide": states wider than 128
SETTINGS = {
    "pairs": {2: Config(32, 4, 1), 4: Config(32, 4, 1)},
    "walk": {2: Config(64, 4, 2), 4: Config(16, 8, 1)},
    "walk wide": {2: Config(64, 8, 2), 4: Config(16, 8, 1)},
    "gradients": {2: Config(64, 8, 1), 4: Config(16, 8, 1)},
    "gradients strong": {2: Config(32, 8, 1), 4: Config(16, 8, 1)},
}


def channel_scan(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float, read_before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan packed segments under gates of key channels or of value channels -> output `[T, H, V]`, final state
    `[N, H, K, V]` float32.

    o_t = scale q_t^T S_t, or, read_before, o_t = scale q_t^T (S_{t-1} + Diag(u) k_t v_t^T).

    q, k `[T, G, K]`, v `[T, H, V]` of one dtype; either gk `[T, G, K]` or gv `[T, H, V]`, natural logarithms, 32 or 16
    bits, which their gradients share; u `[H, K]` and initial_state `[N, H, K, V]` float32, None for zeros. InputError
    unless there is one kind of gate, and u only with gk and read_before.
    Yang et al. 2023, arXiv 2312.06635.
    """
    if (gk is None) == (gv is None):
        raise InputError("gk and gv are both given or both None; allowed: one of them")
    if u is not None and (gk is None or not read_before):
        raise InputError(f"u with read_before = {read_before}, gk = {gk is not None}; allowed: only where both are")
    output, final_state, *_ = forward(q, k, v, gk, gv, u, cu_seqlens, initial_state, scale, read_before)
    return output, final_state


@dataclass(frozen=True)
class Decayed:
    """What chunks of some heads find alone, see `chunk_pairs`; without x it has no pairs."""

    x: Tensor
    y: Tensor
    pairs: Tensor
    decays: Tensor


@dataclass(frozen=True)
class Form:
    """The form whose derivatives are computed, in the letters of `channel_kernels`, for some heads from first_head on.

    x: None where it is what is derived by. p likewise. transposed: decays are of value channels.
    """

    x: Tensor | None
    y: Tensor
    gates: Tensor
    p: Tensor | None
    r: Tensor
    u: Tensor | None
    num_heads: int
    cu_seqlens: Tensor
    scale: float
    before: bool
    transposed: bool
    chunks: Pieces
    heads: int = 0
    first_head: int = 0
    length: int = 0
    pieces: Pieces | None = None

    def some(self, heads: int) -> "Form":
        """The same for that many heads at a time, in pieces that keep the GPU busy."""
        T, K, V = self.sizes
        length = piece_length(T, heads, K, V, self.y.dtype, self.y.device)
        return replace(self, heads=heads, length=length, pieces=Pieces.of(self.cu_seqlens, T, length))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """T, channels that decay, channels that don't."""
        return (len(self.y), self.y.shape[2], self.r.shape[2])

    @property
    def sharing(self) -> int:
        """Heads that share what chunks find alone."""
        return 1 if self.u is not None else self.num_heads // self.y.shape[1]

    @property
    def kind(self) -> tuple[bool, bool, bool, str]:
        """Whether queries read before keys write, and if so their own by u; how sums and products are taken."""
        wide = self.y.dtype == torch.float32
        return self.u is not None, self.before, wide, "tf32x3" if wide else "tf32"

    def fixed_settings(self, kernel: str) -> Config:
        return SETTINGS[kernel][self.y.element_size()]

    def empty(self, *shape: int) -> Tensor:
        """A new tensor, in the inputs' dtype."""
        return self.y.new_empty(shape)

    def wide(self, *shape: int) -> Tensor:
        """A new tensor, float32."""
        return self.y.new_empty(shape, dtype=torch.float32)

    @property
    def most_split(self) -> int:
        assert self.pieces is not None
        return self.pieces.most_split(len(self.y), self.length)

    def decayed(self) -> Decayed:
        """Launch `chunk_pairs`."""
        (T, K, _), C, shared = self.sizes, chunk_size(self.y.dtype), self.heads // self.sharing
        y, decays = self.empty(T, shared, K), self.wide(self.chunks.count, shared, K)
        x, pairs = (self.empty(T, shared, width) if self.x is not None else self.empty(0) for width in (K, C))
        settings = self.fixed_settings("pairs")
        for mild in (True, False) if self.x is not None else (True,):
            launch(
                chunk_pairs, self.chunks.count * shared,
                (self.x, self.y, self.gates, self.u, x, y, pairs, decays, self.chunks.table),
                (self.chunks.segments, self.chunks.count, self.first_head, self.scale),
                self.heads, self.sharing, self.num_heads // self.y.shape[1], self.y.shape[1], K, C,
                padded(K), min(settings.block, padded(K)), mild, self.x is not None, *self.kind,
                num_warps=settings.num_warps, num_stages=settings.num_stages,
            )  # fmt: skip
        return Decayed(x, y, pairs, decays)

    def walk(
        self, decayed: Decayed, start: Tensor | None, starts: Tensor | None, *, reverse: bool = False,
        out: Tensor | None = None, last: Tensor | None = None, states: Tensor | None = None,
        moves: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `walk_pieces` for what is not None: out, last and states, or, given moves, for starts."""
        (_, K, V), link = self.sizes, moves is not None
        values = self.p if reverse else self.r
        assert values is not None and self.pieces is not None
        reads, writes = (decayed.y, decayed.x) if reverse else (decayed.x, decayed.y)
        settings = walk_settings(K, V, self.y.dtype)
        launch(
            walk_pieces, (self.most_split if link else self.pieces.count) * self.heads * cdiv(V, settings.block),
            (reads, writes, decayed.pairs, decayed.decays, values, start, starts, moves, out, last, states,
             self.cu_seqlens, self.pieces.table, self.chunks.first),
            (self.pieces.segments, self.pieces.count, self.first_head),
            self.num_heads, self.heads, self.sharing, self.num_heads // values.shape[1], K, V, chunk_size(self.y.dtype),
            padded(K), settings.block, start is not None and not link, starts is not None and not link,
            last is not None, out is not None, states is not None, link, reverse, self.transposed, self.kind[-1],
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip

    def starts(self, decayed: Decayed, start: Tensor | None, reverse: bool = False) -> Tensor | None:
        """`[places, heads, K, V]`: states that pieces but a segment's first start from; reversed, gradients of states
        that pieces but its last end with. None where no segment can be split."""
        if not self.most_split:
            return None
        assert self.pieces is not None
        _, K, V = self.sizes
        starts = self.wide(self.most_split, self.heads, K, V)
        moves = self.wide(self.most_split, self.heads // self.sharing, K)
        self.walk(decayed, None, starts, reverse=reverse, moves=moves)
        launch(
            chain_pieces, self.most_split * self.heads * cdiv(K * V, CHAIN_BLOCK),
            (start, starts, moves, self.cu_seqlens, self.pieces.table),
            (self.pieces.segments, self.pieces.count, self.first_head, self.length),
            self.num_heads, self.heads, self.sharing, K, V, CHAIN_BLOCK, start is not None, reverse, self.transposed,
        )  # fmt: skip
        return starts

    def gradients(
        self, decayed: Decayed, states: Tensor, d_states: Tensor | None = None, *, dx: Tensor | None = None,
        dy: Tensor | None = None, d_gates: Tensor | None = None, du: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `chunk_gradients` for what is not None."""
        assert self.p is not None
        (_, K, V), H = self.sizes, self.num_heads
        for mild in (True, False):
            settings = self.fixed_settings("gradients" if mild else "gradients strong")
            launch(
                chunk_gradients, self.chunks.count * self.heads,
                (self.x, self.y, self.gates, self.u, self.p, self.r, decayed.decays, states, d_states, dx, dy, d_gates,
                 du, self.chunks.table),
                (self.chunks.segments, self.chunks.count, self.first_head, self.scale),
                H, self.heads, self.sharing, H // self.y.shape[1], H // self.r.shape[1], K, V,
                chunk_size(self.y.dtype), padded(K), min(settings.block, padded(K)), min(settings.block, padded(V)),
                mild, dx is not None, dy is not None, *self.kind,
                num_warps=settings.num_warps, num_stages=settings.num_stages,
            )  # fmt: skip

    def parts(self, pairs: bool, d_states: bool) -> list["Form"]:
        """The heads in parts that WORKSPACE holds, all equally many, and no two heads that share inputs apart."""
        (T, K, V), H = self.sizes, self.num_heads
        group = H // min(self.y.shape[1], self.r.shape[1])
        found = T * (K + (K + chunk_size(self.y.dtype) if pairs else 0)) // self.sharing
        a_head = self.y.element_size() * (found + (1 + d_states) * self.chunks.count * K * V)
        most = max(group, WORKSPACE // max(1, a_head))
        heads = max(n for n in range(group, H + 1, group) if H % n == 0 and n <= most)
        some = self.some(heads)
        return [replace(some, first_head=first_head) for first_head in range(0, H, heads)]


def chunk_size(dtype: torch.dtype) -> int:
    """Tokens a chunk: as many as tensor cores multiply at a time, or half of it for wide elements."""
    return 64 if dtype.itemsize == 2 else 32


def walk_settings(K: int, V: int, dtype: torch.dtype) -> Config:
    """Launch settings of `walk_pieces`."""
    settings = SETTINGS["walk" if max(K, V) <= 128 else "walk wide"][dtype.itemsize]
    return replace(settings, block=min(settings.block, padded(V)))


def piece_length(T: int, heads: int, K: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens a piece, a power of two: such that one sequence of T tokens gives each multiprocessor two programs, or one
    if its state takes most registers of two."""
    programs = multiprocessors(device) * (2 if K <= 128 else 1)
    return piece_tokens(T * heads * cdiv(V, walk_settings(K, V, dtype).block), programs, SHORTEST_PIECE)


@torch.library.custom_op("momkit::channel_scan", mutates_args=())
@compiled_together
def forward(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float, read_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output and final state; for the backward pass the table of chunks and the places of each segment's first."""
    q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    u = None if u is None else u.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    (T, H, V), K = v.shape, k.shape[2]
    chunks = Pieces.of(cu_seqlens, T, chunk_size(v.dtype))
    output = torch.empty_like(v)
    final_state = v.new_empty((chunks.segments, H, K, V), dtype=torch.float32)
    rest = {"num_heads": H, "cu_seqlens": cu_seqlens, "scale": scale, "before": read_before, "chunks": chunks}
    if gk is not None:
        form = Form(q, k, gk.contiguous(), None, v, u, transposed=False, **rest).some(H)
        decayed = form.decayed()
        form.walk(decayed, initial_state, form.starts(decayed, initial_state), out=output, last=final_state)
    else:
        for form in Form(None, v, gv.contiguous(), q, k, None, transposed=True, **rest).parts(False, False):
            decayed = form.decayed()
            states = form.empty(chunks.count, form.heads, V, K)
            form.walk(decayed, initial_state, form.starts(decayed, initial_state), last=final_state, states=states)
            form.gradients(decayed, states, dx=output)
            del decayed, states
    assert chunks.first is not None
    return output, final_state, chunks.table, chunks.first


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor,
    initial_state: Tensor | None, scale: float, read_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (_, H, V), K = v.shape, k.shape[2]
    final_state = v.new_empty((cu_seqlens.shape[0] - 1, H, K, V), dtype=torch.float32)
    table = cu_seqlens.new_empty((4, torch.library.get_ctx().new_dynamic_size()), dtype=torch.int32)
    return v.new_empty(v.shape), final_state, table, cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32)


@torch.library.custom_op("momkit::channel_scan_backward", mutates_args=())
@compiled_together
def backward(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor,
    initial_state: Tensor | None, table: Tensor, first: Tensor, d_output: Tensor, d_final: Tensor | None,
    scale: float, read_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the gates, of u and of the initial state (both empty if there is none)."""
    q, k, v, d_output = (tensor.contiguous() for tensor in (q, k, v, d_output))
    u = None if u is None else u.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    (T, H, _), (G, K) = v.shape, k.shape[1:]
    chunks = Pieces(table, len(cu_seqlens) - 1, first)
    # a group's heads are summed in one place and order, from float32
    dq = q.new_empty((T, H, K), dtype=q.dtype if G == H else torch.float32)
    dk, dv = torch.empty_like(dq), torch.empty_like(v)
    d_initial = None if initial_state is None else torch.empty_like(initial_state)
    du = None if u is None else v.new_empty((chunks.count, H, K), dtype=torch.float32)
    rest = {"num_heads": H, "cu_seqlens": cu_seqlens, "scale": scale, "before": read_before, "chunks": chunks}
    if gk is not None:
        whole = Form(q, k, gk.contiguous(), d_output, v, u, transposed=False, **rest)
        dp, dr, dx, dy = None, dv, dq, dk
        d_gates = torch.empty_like(dq, dtype=gk.dtype if G == H else torch.float32)
    else:
        whole = Form(d_output, v, gv.contiguous(), q, k, None, transposed=True, **rest)
        dp, dr, dx, dy = dq, dk, None, dv
        d_gates = torch.empty_like(dv, dtype=gv.dtype)
    for form in whole.parts(True, True):
        decayed = form.decayed()
        states = form.empty(chunks.count, form.heads, *form.sizes[1:])
        form.walk(decayed, initial_state, form.starts(decayed, initial_state), out=dp, states=states)
        d_states = torch.empty_like(states)
        ends = form.starts(decayed, d_final, reverse=True)
        form.walk(decayed, d_final, ends, reverse=True, out=dr, last=d_initial, states=d_states)
        del ends
        form.gradients(decayed, states, d_states, dx=dx, dy=dy, d_gates=d_gates, du=du)
        del decayed, states, d_states
    du = q.new_empty(0) if du is None else du.sum(0).to(u.dtype)
    d_initial = v.new_empty(0, dtype=torch.float32) if d_initial is None else d_initial
    d_gates = d_gates if gk is None else sum_groups(d_gates, gk)
    return sum_groups(dq, q), sum_groups(dk, k), dv, d_gates, du, d_initial


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor,
    initial_state: Tensor | None, table: Tensor, first: Tensor, d_output: Tensor, d_final: Tensor | None,
    scale: float, read_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gates = gv if gk is None else gk
    du = q.new_empty(0) if u is None else u.new_empty(u.shape)
    d_initial = v.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v, gates)), du, d_initial


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.read_before = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def differentiate(ctx, d_output, d_final, *_):
    q, k, v, gk, gv, u, cu_seqlens, initial_state, table, first = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    dq, dk, dv, d_gates, du, d_initial = backward(
        q, k, v, gk, gv, u, cu_seqlens, initial_state, table, first, d_output, d_final, ctx.scale, ctx.read_before
    )
    return (
        dq, dk, dv, None if gk is None else d_gates, None if gv is None else d_gates, None if u is None else du,
        None, None if initial_state is None else d_initial, None, None,
    )  # fmt: skip


forward.register_autograd(differentiate, setup_context=setup_context)
