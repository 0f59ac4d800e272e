"""The ops that run generated kernels; a key names the module of a rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from momkit.errors import BackendError
from momkit.kernels.generated.cache import module
from momkit.kernels.generated.program import Named, Program
from momkit.kernels.generated.settings import block_of, length_of, warps_of, workers_of
from momkit.kernels.launch import cdiv, launch


def tile_sizes(program: Program, tensor: Named) -> tuple[int, ...]:
    return tuple(dim.size for dim in program.tile(tensor))


def row_shape(program: Program, tensor: Named) -> tuple[int, ...]:
    return tuple(program.sizes[a] for a in tensor.axes if a != "T")


@torch.library.custom_op("momkit::generated_scan", mutates_args=())
def forward(
    key: str, inputs: Sequence[Tensor], initial: Sequence[Tensor], cu_seqlens: Tensor, value: int, save: bool
) -> list[Tensor]:
    """Output, in the dtype of input number `value`, final states and, if `save`, the states that the backward pass
    starts from.

    inputs: those of the module's PROGRAM, in its order, bf16, fp16 or fp32; token inputs are `[T, ...]`. initial: its
    states `[N, ...]` float32, or none for zeros. cu_seqlens: `[N + 1]`.
    """
    made, program = module(key), module(key).PROGRAM
    inputs, initial = [x.contiguous() for x in inputs], [x.contiguous() for x in initial]
    like, num_tokens, segments = inputs[value], len(inputs[value]), len(cu_seqlens) - 1
    output = like.new_empty((num_tokens, *row_shape(program, program.output)))
    final = [like.new_empty((segments, *row_shape(program, s)), dtype=torch.float32) for s in program.states]
    length = length_of(num_tokens, segments)
    slots = max(0, cdiv(num_tokens, length) + segments - 1)
    saved: list[Tensor] = []
    if save:
        shapes = [(slots, program.heads, *tile_sizes(program, s)) for s in program.states]
        saved = [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
    block = block_of(program, segments, like.device)
    none = [None] * len(program.states)
    launch(
        made.forward, (segments + 1) * program.heads * cdiv(program.columns, block),
        (*inputs, *(initial or none), *final, *(saved or none), output, cu_seqlens.contiguous(), None),
        (num_tokens, segments), block, length, num_warps=warps_of(program, block), num_stages=1,
    )  # fmt: skip
    return [output, *final, *saved]


@forward.register_fake
def _(
    key: str, inputs: Sequence[Tensor], initial: Sequence[Tensor], cu_seqlens: Tensor, value: int, save: bool
) -> list[Tensor]:
    program: Program = module(key).PROGRAM
    like, segments = inputs[value], len(cu_seqlens) - 1
    output = like.new_empty((len(like), *row_shape(program, program.output)))
    final = [like.new_empty((segments, *row_shape(program, s)), dtype=torch.float32) for s in program.states]
    saved: list[Tensor] = []
    if save:
        slots = torch.library.get_ctx().new_dynamic_size()
        shapes = [(slots, program.heads, *tile_sizes(program, s)) for s in program.states]
        saved = [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return [output, *final, *saved]


@torch.library.custom_op("momkit::generated_scan_backward", mutates_args=())
def backward(
    key: str,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    cu_seqlens: Tensor,
    d_output: Tensor,
    d_final: Sequence[Tensor | None],
    wanted: Sequence[bool],
    initial: bool,
) -> list[Tensor]:
    """Gradients of the inputs that are wanted, and of the initial states if `initial`."""
    made, program = module(key), module(key).PROGRAM
    inputs = [x.contiguous() for x in inputs]
    d_final = [None if x is None else x.contiguous() for x in d_final]
    num_tokens, segments, device = len(d_output), len(cu_seqlens) - 1, d_output.device
    block, length = block_of(program, segments, device), length_of(num_tokens, segments)
    tiles = cdiv(program.columns, block)
    workers = workers_of((segments + 1) * program.heads * tiles, device)

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return d_output.new_empty(shape, dtype=dtype)

    def buffer(tensor: Named, dtype: torch.dtype) -> Tensor:
        parts, rows = 1 if program.split(tensor) else tiles, num_tokens if tensor.has_time else segments
        return floats(parts, rows, program.heads, *tile_sizes(program, tensor), dtype=dtype)

    work = [floats(workers, length, *(program.width(d, block) for d in program.tile(s))) for s in program.states]
    buffers = [
        buffer(named, x.dtype if program.is_exact(named, block) else torch.float32) if want else None
        for named, x, want in zip(program.inputs, inputs, wanted, strict=True)
    ]
    d_start = [buffer(s, torch.float32) if initial else None for s in program.states]
    launch(
        made.backward, workers,
        (*inputs, *saved, *work, d_output.contiguous(), *d_final, *d_start, *buffers, cu_seqlens.contiguous()),
        (num_tokens, segments), block, length, num_warps=warps_of(program, block), num_stages=1,
    )  # fmt: skip
    found = [
        folded(program, named, found).to(x.dtype)
        for named, x, found in zip(program.inputs, inputs, buffers, strict=True) if found is not None
    ]  # fmt: skip
    starts = [(s, x) for s, x in zip(program.states, d_start, strict=True) if x is not None]
    return found + [folded(program, s, x, by_segment=True) for s, x in starts]


def folded(program: Program, tensor: Named, buffer: Tensor, by_segment: bool = False) -> Tensor:
    """The gradient of a tensor from its parts `[tiles, rows, heads, *tile axes]`, summed in a fixed order.

    Rows are tokens, or segments; by_segment: the tensor is a state, which has one for each.
    """
    x = buffer[0] if len(buffer) == 1 else buffer.sum(0)
    axes = ["T" if tensor.has_time else "rows", program.head, *(dim.axis for dim in program.tile(tensor))]
    wide = [*(["rows"] if by_segment else []), *(program.axis(a) for a in tensor.axes)]
    for d in reversed([d for d, axis in enumerate(axes) if axis not in wide]):
        x = x.squeeze(d) if x.shape[d] == 1 else x.sum(d)
        del axes[d]
    # an axis that a tensor has twice comes in the order it had
    order: list[int] = []
    for axis in wide:
        order += [d for d, other in enumerate(axes) if other == axis and d not in order][:1]
    shape = [buffer.shape[1] if axis in ("T", "rows") else program.sizes[axis] for axis in wide]
    x = x.permute(order).reshape(shape)
    if "G" in tensor.axes and program.sizes["G"] != program.sizes["H"]:
        axis = tensor.axes.index("G")
        x = x.unflatten(axis, (program.sizes["G"], -1)).sum(axis + 1)
    return x.contiguous()


@backward.register_fake
def _(
    key: str,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    cu_seqlens: Tensor,
    d_output: Tensor,
    d_final: Sequence[Tensor | None],
    wanted: Sequence[bool],
    initial: bool,
) -> list[Tensor]:
    program: Program = module(key).PROGRAM
    segments = len(cu_seqlens) - 1
    found = [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want]
    shapes = [(segments, *row_shape(program, s)) for s in program.states] if initial else []
    return found + [d_output.new_empty(shape, dtype=torch.float32) for shape in shapes]


def setup_context(ctx, inputs, output):
    ctx.key, tensors, initial, cu_seqlens, _, ctx.save = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = len(tensors), len(initial)
    states = len(module(ctx.key).PROGRAM.states)
    ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
    ctx.save_for_backward(*tensors, *output[1 + states :], cu_seqlens)


def differentiate(ctx, gradients):
    if not ctx.save:
        raise BackendError("generated_scan was run with save = False; allowed for gradients: True")
    count, given = ctx.counts
    *tensors, cu_seqlens = ctx.saved_tensors
    inputs, saved = tensors[:count], tensors[count:]
    d_output = gradients[0]
    if d_output is None:
        d_output = cu_seqlens.new_zeros(ctx.shape, dtype=ctx.dtype)
    wanted = list(ctx.needs_input_grad[1])
    starts = any(ctx.needs_input_grad[2]) if given else False
    found = backward(ctx.key, inputs, saved, cu_seqlens, d_output, gradients[1 : 1 + len(saved)], wanted, starts)
    rest = iter(found)
    d_inputs = [next(rest) if want else None for want in wanted]
    return None, d_inputs, [next(rest) for _ in range(given)] if starts else [None] * given, None, None, None


forward.register_autograd(differentiate, setup_context=setup_context)


@torch.library.custom_op("momkit::generated_decode", mutates_args=("pools",))
def decode(key: str, inputs: Sequence[Tensor], pools: Sequence[Tensor], state_index: Tensor, value: int) -> Tensor:
    """Update pool rows `state_index` `[B]` in place by one token each; a negative index gives zeros and moves nothing.

    inputs: as for the scan, with row b where it has token t. pools: states `[P, ...]` float32, contiguous; ids are
    distinct. Output `[B, ...]` in the dtype of input number `value`.
    """
    made, program = module(key), module(key).PROGRAM
    inputs = [x.contiguous() for x in inputs]
    rows, like = len(state_index), inputs[value]
    output = like.new_empty((rows, *row_shape(program, program.output)))
    whole = all(program.split(s) for s in program.states)
    block = block_of(program, rows, like.device) if whole else program.widest_block()
    none = [None] * len(program.states)
    launch(
        made.forward, rows * program.heads * cdiv(program.columns, block),
        (*inputs, *pools, *pools, *none, output, None, state_index.contiguous()),
        (rows, rows), block, length_of(rows, rows), num_warps=warps_of(program, block), num_stages=1,
    )  # fmt: skip
    return output


@decode.register_fake
def _(key: str, inputs: Sequence[Tensor], pools: Sequence[Tensor], state_index: Tensor, value: int) -> Tensor:
    program: Program = module(key).PROGRAM
    return inputs[value].new_empty((len(state_index), *row_shape(program, program.output)))
