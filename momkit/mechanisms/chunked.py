"""The chunked scan: affine rules as matrix products over chunks of tokens, linear in length.

Segments are cut in chunks. All that happens inside chunks is computed for many chunks at once; then a short loop carries
the states of all segments from chunk to chunk, segments with the most chunks first, the finished ones dropping out.
Differentiable once; runs on any device, made for the CPU.

Letters: B chunks times heads, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from momkit.errors import BackendError, InputError
from momkit.mechanisms.base import Affine, Inputs, Mechanism, Sizes, State, Structure
from momkit.mechanisms.carry import carry, unit_lower_inverse
from momkit.mechanisms.pair_decay import Pairs, Row, ValueDecay, head_pairs, key_pairs, undecayed_pairs
from momkit.mechanisms.reference import Lanes, scan_state_dtype

CHUNK_SIZE = 32

# chunks times heads worked on at once: enough to amortise the cost of a call, few enough to stay in cache
GROUP = 256


def scan_chunked(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State, sizes: Sizes
) -> tuple[Tensor, State]:
    """Run an affine rule over every segment; rows that no segment covers come out as zeros."""
    if not mechanism.has_chunked_form:
        raise BackendError(f"{mechanism.name} states no structure, so it has no chunked form; use backend='reference'")
    dtype = scan_state_dtype(inputs)
    value = inputs[mechanism.value_input]
    layout = Layout.of(cu_seqlens, CHUNK_SIZE)

    def affine(structure: Structure, x: Affine, S0: Tensor) -> tuple[Tensor, Tensor]:
        return scan_layout(structure, x, layout, S0)

    wide = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    state = {name: tensor.to(dtype) for name, tensor in initial_state.items()}
    output, final = mechanism.compose(wide, state, affine)
    return output.to(value.dtype), final


def affine_scan(
    structure: Structure, x: Affine, cu_seqlens: Tensor, S0: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """One affine scan over packed segments: inputs as in `Affine`, S0 `[N, H, K, V]` -> output `[T, H, V]`, final S."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size = {chunk_size} must be a power of two")
    return scan_layout(structure, x, Layout.of(cu_seqlens, chunk_size), S0)


def scan_layout(structure: Structure, x: Affine, layout: "Layout", S0: Tensor) -> tuple[Tensor, Tensor]:
    """One affine scan, group of chunks after group of chunks."""
    if structure.decay == "value" and structure.erase != "none":
        raise BackendError(f"{structure} has no chunked form: a decay by value channel allows erase='none' only")
    T, H = x.v.shape[:2]
    groups = layout.groups(max(1, GROUP // H))
    parts = layout.pack(x, S0, [sum(counts) for counts in groups])
    S = S0.flatten(0, 1) if layout.in_order else S0[layout.segments].flatten(0, 1)
    outputs: list[Tensor] = []
    retired: list[Tensor] = []
    for counts, part in zip(groups, parts, strict=True):
        spans = [n * H for n in counts]
        retired.append(S[spans[0] :])
        output, S = scan_chunks(structure, part, S[: spans[0]], spans)
        outputs.append(output)
    final = torch.cat([S, *reversed(retired)]).view(S0.shape)
    output = layout.unpack(outputs, T, H) if outputs else x.v.new_zeros(x.v.shape, dtype=S0.dtype)
    return output * x.scale, final if layout.in_order else final[layout.segments.argsort()]


def scan_chunks(structure: Structure, x: Affine, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """One affine scan over packed chunks: inputs `[B, C, ...]`, S `[lanes, K, V]`, `counts[t]` lanes alive at chunk t."""
    before = structure.read == "before"
    write = x.v if structure.erase != "delta" else x.v * x.beta[..., None]
    if structure.decay == "value":
        output, S = scan_value_decay(x, before, S, counts)
    else:
        output, S = scan_pairs(structure, x, write, S, counts)
    if before and x.u is not None:
        output = output + (x.q * x.u * x.k).sum(-1, keepdim=True) * write
    return output, S


def scan_pairs(structure: Structure, x: Affine, write: Tensor, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The scan where decays act on keys: pairs of tokens are matrices, and erases a triangular system."""
    reader = Row(x.q, exclusive=structure.read == "before")
    previous = structure.erase_sees == "previous"
    if structure.erase == "none":
        p = relate(structure, x, [reader], [x.k])
        starts, _, S = carry(S, p.whole, counts, write=torch.bmm(p.kept[0].mT, write))
        inside = torch.bmm(p.between[0][0], write)
    elif structure.erase == "delta":
        p = relate(structure, x, [reader, Row(x.k, previous)], [x.k])
        inverse = unit_lower_inverse(p.between[1][0] * x.beta[..., None])
        U, W = torch.bmm(inverse, write), torch.bmm(inverse * x.beta[:, None, :], p.seen[1])
        starts, E, S = carry(S, p.whole, counts, erase=(U, W, p.kept[0]))
        inside = torch.bmm(p.between[0][0], E)
    else:
        p = relate(structure, x, [reader, Row(-x.a, previous)], [x.k, x.b])
        inverse = unit_lower_inverse(p.between[1][1])
        U, W = -torch.bmm(inverse, torch.bmm(p.between[1][0].tril(-1), write)), torch.bmm(inverse, p.seen[1])
        starts, E, S = carry(S, p.whole, counts, torch.bmm(p.kept[0].mT, write), (U, W, p.kept[1]))
        inside = torch.baddbmm(torch.bmm(p.between[0][0], write), p.between[0][1], E)
    return torch.baddbmm(inside, p.seen[0], starts), S


def relate(structure: Structure, x: Affine, rows: list[Row], cols: list[Tensor]) -> Pairs:
    """Pairs under the decay that the structure declares."""
    if structure.decay == "none":
        return undecayed_pairs(rows, cols)
    if structure.decay == "key":
        return key_pairs(x.gk, rows, cols)
    return head_pairs(x.g, rows, cols)


def scan_value_decay(x: Affine, before: bool, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The scan where decays act on values."""
    decay = ValueDecay(x.gv)
    kept = decay.kept(x.v)
    starts, _, S = carry(S, decay.whole, counts, write=torch.bmm(x.k.mT, kept[-1]))
    return decay.read(torch.bmm(x.q, x.k.mT), kept, torch.bmm(x.q, starts), before), S


@dataclass(frozen=True)
class Layout:
    """Where each token goes when segments are cut in chunks of C tokens.

    Chunks are ordered by chunk time, then by lane, the segment with the most chunks first.
    tokens: `[chunks, C]`, the token in each place; where there is none, -1.
    counts: chunks at each chunk time. segments: `[N]`, the segment in each lane.
    covered: the range of tokens that segments cover.
    """

    tokens: Tensor
    counts: list[int]
    segments: Tensor
    covered: range
    padded: bool

    @staticmethod
    def of(cu_seqlens: Tensor, chunk_size: int) -> "Layout":
        cu = cu_seqlens.long()
        lengths = cu.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        C = min(chunk_size, 1 << max(0, longest - 1).bit_length())
        chunks = (lengths + C - 1) // C
        cu_chunks = pad(chunks.cumsum(0), (1, 0))
        lanes = Lanes.of(cu_chunks)
        segment = torch.repeat_interleave(chunks)[lanes.order]
        first = cu[segment] + (lanes.order - cu_chunks[segment]) * C
        tokens = first[:, None] + torch.arange(C, device=cu.device)
        there = tokens < cu[segment + 1][:, None]
        covered = range(int(cu[0]), int(cu[-1]))
        return Layout(tokens.where(there, -1), lanes.counts, lanes.segments, covered, tokens.numel() != len(covered))

    @property
    def in_order(self) -> bool:
        """Whether lanes are segments."""
        return len(self.segments) == 1

    def groups(self, size: int) -> list[list[int]]:
        """Chunk times gathered in groups of at least `size` chunks."""
        groups: list[list[int]] = []
        for count in self.counts:
            if groups and sum(groups[-1]) < size:
                groups[-1].append(count)
            else:
                groups.append([count])
        return groups

    def pack(self, x: Affine, S0: Tensor, sizes: list[int]) -> list[Affine]:
        """Inputs by chunk and head, `[B, C, dim]`, gates and beta `[B, C]`, absent tokens zero, in groups of `sizes`."""
        T, H = x.v.shape[:2]
        columns: dict[str, tuple[Tensor, ...]] = {}
        for name in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u"):
            tensor = getattr(x, name)
            if tensor is None:
                continue
            scalar, constant = name in ("g", "beta"), tensor.ndim == 1 or (name == "u" and tensor.ndim == 2)
            tensor = (tensor.expand(T, *tensor.shape) if constant else tensor).to(S0.dtype)
            wide = self.gather(tensor.reshape(T, tensor.shape[1], -1), H)
            columns[name] = (wide.squeeze(-1) if scalar else wide).split([n * H for n in sizes])
        return [Affine(**dict(zip(columns, part, strict=True))) for part in zip(*columns.values(), strict=True)]

    def gather(self, x: Tensor, H: int) -> Tensor:
        """`[T, G, dim]` -> `[chunks * H, C, dim]`, head h from key head h // (H / G)."""
        T, G, dim = x.shape
        head = torch.arange(H, device=x.device) // (H // G)
        rows = self.tokens[:, None] * G + head[:, None]
        flat = x.reshape(T * G, dim)
        if self.padded:
            flat = torch.cat([flat, flat.new_zeros(1, dim)])
            rows = rows.where(self.tokens[:, None] >= 0, T * G)
        return flat.index_select(0, rows.flatten()).view(-1, self.tokens.shape[1], dim)

    def unpack(self, chunks: list[Tensor], T: int, H: int) -> Tensor:
        """`[B, C, V]` -> `[T, H, V]`, uncovered rows zero."""
        C = self.tokens.shape[1]
        tokens = self.tokens.flatten()
        place = torch.arange(len(tokens), device=tokens.device)[tokens >= 0]
        back = torch.empty_like(place)
        back[tokens[tokens >= 0] - self.covered.start] = place
        rows = (back // C * H * C + back % C)[:, None] + torch.arange(H, device=back.device) * C
        flat = (chunks[0] if len(chunks) == 1 else torch.cat(chunks)).flatten(0, 1)
        packed = flat.index_select(0, rows.flatten()).view(-1, H, flat.shape[1])
        return pad(packed, (0, 0, 0, 0, self.covered.start, T - self.covered.stop))
