"""The chunked scan: affine rules as matrix products over chunks of tokens, linear in length.

Segments are cut in chunks. All that happens inside chunks is computed for many chunks at once; then a short loop
carries the states of all segments from chunk to chunk, the finished ones dropping out.
Differentiable once; runs on any device, made for the CPU.

Letters: B chunks times heads, C tokens of a chunk.
"""

import torch
from torch import Tensor

from momkit.errors import BackendError, InputError
from momkit.mechanisms.base import Affine, Inputs, Mechanism, Sizes, State, Structure
from momkit.mechanisms.carry import carry, unit_lower_inverse
from momkit.mechanisms.chunk_layout import Layout, every_token
from momkit.mechanisms.delta_chunk import delta_scan
from momkit.mechanisms.pair_decay import Pairs, Row, ValueDecay, head_pairs, key_pairs, undecayed_pairs
from momkit.mechanisms.reference import has_time, scan_state_dtype, start_state

CHUNK_SIZE = 32

# chunks times heads worked on at once: enough to amortise the cost of a call, few enough to stay in cache
GROUP = 128

# the structures that `delta_chunk` covers, and its group
DELTA_BY_HEAD = [Structure(decay, "delta") for decay in ("none", "constant", "head")]
DELTA_GROUP = 64


def scan_chunked(
    mechanism: Mechanism, inputs: Inputs, cu_seqlens: Tensor, initial_state: State | None, sizes: Sizes
) -> tuple[Tensor, State]:
    """Run an affine rule over every segment; rows that no segment covers come out as zeros."""
    if not mechanism.has_chunked_form:
        raise BackendError(f"{mechanism.name} has no chunked form: it states no affine structure that has one")
    dtype = scan_state_dtype(mechanism, inputs)
    axes = {name: domain.axes for name, domain in mechanism.inputs_domain().items()}
    layout = Layout.of(cu_seqlens, CHUNK_SIZE)

    def affine(structure: Structure, x: Affine, S0: Tensor) -> tuple[Tensor, Tensor]:
        return scan_layout(structure, x, layout, S0)

    wide = {
        name: (layout.covered_only(tensor) if has_time(axes[name], tensor) else tensor).to(dtype)
        for name, tensor in inputs.items()
    }
    # copies, since a rule may pass a state through and callers change states in place
    start = start_state(mechanism, inputs, cu_seqlens, initial_state, sizes)
    state = {name: tensor.to(dtype, copy=True) for name, tensor in start.items()}
    output, final = mechanism.compose(wide, state, affine)
    return layout.covered_only(output).to(inputs[mechanism.value_input].dtype), final


def affine_scan(
    structure: Structure, x: Affine, cu_seqlens: Tensor, S0: Tensor, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """One affine scan over packed segments: inputs as in `Affine`, S0 `[N, H, K, V]` -> output `[T, H, V]`, final S."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size = {chunk_size} must be a power of two")
    return scan_layout(structure, x, Layout.of(cu_seqlens, chunk_size), S0)


def scan_layout(structure: Structure, x: Affine, layout: Layout, S0: Tensor) -> tuple[Tensor, Tensor]:
    """One affine scan, group of chunks after group of chunks."""
    T, H = x.v.shape[:2]
    wide, by_head = every_token(x, S0.dtype), structure in DELTA_BY_HEAD
    groups = layout.groups(max(1, (DELTA_GROUP if by_head else GROUP) // H))
    if not groups:
        return torch.zeros_like(wide["v"]), S0
    S = S0.flatten(0, 1) if layout.in_order else S0[layout.segments].flatten(0, 1)
    spans = [[n * H for n in counts] for counts in groups]
    if by_head:
        output, final = delta_scan(wide, S, layout.places(T, H), spans, x.scale)
    else:
        outputs: list[Tensor] = []
        retired: list[Tensor] = []
        for counts, part in zip(spans, layout.pack(wide, [sum(counts) for counts in groups]), strict=True):
            retired.append(S[counts[0] :])
            chunk_output, S = scan_chunks(structure, part, S[: counts[0]], counts)
            outputs.append(chunk_output * x.scale)
        output = layout.unpack(outputs, T, H)
        final = torch.cat([S, *reversed(retired)])
    final = final.view(S0.shape)
    return output, final if layout.in_order else final[layout.segments.argsort()]


def scan_chunks(structure: Structure, x: Affine, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """One affine scan over packed chunks `[B, C, ...]`; S `[lanes, K, V]`, `counts[t]` alive at chunk time t."""
    before = structure.read == "before"
    output, S = (scan_values if structure.decay == "value" else scan_keys)(structure, x, before, S, counts)
    if before and x.u is not None:
        written = x.v * x.need("beta")[..., None] if structure.erase == "delta" else x.v
        output = output + (x.q * x.u * x.k).sum(-1, keepdim=True) * written
    return output, S


def scan_keys(structure: Structure, x: Affine, before: bool, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The scan where decays act on keys: reads between tokens are matrices, and erases a triangular system."""
    reader, previous = Row(x.q, exclusive=before), structure.erase_sees == "previous"
    if structure.erase == "none":
        p = relate(structure, x, [reader], [x.k])
        starts, _, S = carry(S, p.whole, counts, write=torch.bmm(p.kept[0].mT, x.v))
        inside = torch.bmm(p.between[0][0], x.v)
    elif structure.erase == "delta":
        # E = beta (v - what k reads) is what each token writes
        beta = x.need("beta")
        p = relate(structure, x, [reader, Row(x.k, previous)], [x.k])
        inverse = unit_lower_inverse(p.between[1][0] * beta[..., None]) * beta[:, None, :]
        starts, E, S = carry(S, p.whole, counts, erase=(x.v, p.seen[1], inverse, p.kept[0]))
        inside = torch.bmm(p.between[0][0], E)
    else:
        # E = what a reads, from the state and from the writes v and E of earlier tokens
        a, b = x.need("a"), x.need("b")
        p = relate(structure, x, [reader, Row(-a, previous)], [x.k, b])
        inverse = unit_lower_inverse(p.between[1][1])
        from_v = torch.bmm(p.between[1][0].tril(-1), x.v)
        erase = -from_v, p.seen[1], inverse, p.kept[1]
        starts, E, S = carry(S, p.whole, counts, write=torch.bmm(p.kept[0].mT, x.v), erase=erase)
        inside = torch.baddbmm(torch.bmm(p.between[0][0], x.v), p.between[0][1], E)
    return torch.baddbmm(inside, p.seen[0], starts), S


def scan_values(structure: Structure, x: Affine, before: bool, S: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The scan where decays act on values."""
    if structure.erase != "none":
        raise BackendError(f"{structure} has no chunked form: a decay by value channel allows erase='none' only")
    decay = ValueDecay(x.need("gv"))
    kept = decay.kept(x.v)
    starts, _, S = carry(S, decay.whole, counts, write=torch.bmm(x.k.mT, kept[-1]))
    return decay.read(torch.bmm(x.q, x.k.mT), kept, torch.bmm(x.q, starts), before), S


def relate(structure: Structure, x: Affine, rows: list[Row], cols: list[Tensor]) -> Pairs:
    """Pairs under the decay that the structure declares."""
    if structure.decay == "none":
        return undecayed_pairs(rows, cols)
    if structure.decay == "key":
        return key_pairs(x.need("gk"), rows, cols)
    return head_pairs(x.need("g"), rows, cols)
