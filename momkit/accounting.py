"""What a block costs: parameters, bytes of state a sequence, floating point operations a token.

Everything is counted on a block's shapes; `measure(spec)` builds the block without memory for its weights.
Letters: D hidden size, M memories, J slots a token (the router's and the shared memory's).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from momkit.block import MoMBlock
from momkit.mechanisms.base import Mechanism
from momkit.mechanisms.reference import repeat_key_heads, scan_state_dtype
from momkit.spec import MoMSpec

# what torch tags neither pointwise nor reduction, and what it tags pointwise though it computes nothing
aten = torch.ops.aten
NORMALISERS = (aten._softmax, aten._log_softmax, aten.native_layer_norm)
COPY = aten.clone.default


@dataclass(frozen=True)
class Count:
    """A figure of the whole block, and of the part that one token meets."""

    total: int
    active: int


@dataclass(frozen=True)
class Costs:
    """Figures of one block. flops_per_token: operations by part of the block, as `flops_per_token` counts them."""

    parameters: Count
    state_bytes: Count
    flops_per_token: dict[str, int]


def measure(spec: MoMSpec) -> Costs:
    """The costs of the block that a spec describes; its tensors are fakes without memory, so any size is cheap."""
    with FakeTensorMode():
        block = spec.build()
        return Costs(parameters(block), state_bytes(block), flops_per_token(block))


def active_memories(block: MoMBlock) -> int:
    """Memories that one token meets, the shared one included: at most one a slot, since slots of a router that
    separates writes from reads may share a memory."""
    return min(block.router.slots, block.spec.num_memories) + block.spec.shared_memory


def share(total: int, block: MoMBlock) -> Count:
    """Of something that every memory has its own of: all of it, and that of the active memories."""
    return Count(total, total * active_memories(block) // block.num_groups)


def parameters(block: MoMBlock) -> Count:
    """Numbers that are learned; active leaves out the projections of memories that a token does not go to."""
    total = sum(p.numel() for p in block.parameters())
    project = block.project
    own = project.memory_weight.numel() if project.per_memory else 0
    own += sum(project.get_parameter(f"{p.name}_bias").numel() for p in project.per_memory if p.bias)
    per_memory = share(own, block)
    return Count(total, total - per_memory.total + per_memory.active)


def state_bytes(block: MoMBlock) -> Count:
    """Bytes of the state of one sequence: memories and the history of their short convolutions."""
    return share(block.initial_state(1).nbytes(), block)


@torch.no_grad()
def flops_per_token(block: MoMBlock) -> dict[str, int]:
    """Floating point operations to take in one token, by part of the block, forward alone: an estimate.

    A matmul of [m, k] and [k, n] is 2 m n k, an elementwise operation one an element, a reduction one an element that
    it reads; moving data is nothing. The projections' biases, activations and norms, a percent or two, are left out.
    What is per memory, and the rule, run once for each of the token's J slots. The
    rule is its one step, as in decoding: the chunked form of training does more, in larger matmuls. A backward pass
    costs about twice the forward one.
    """
    J = block.router.slots + block.spec.shared_memory
    project = block.project
    x = block.out_proj.weight.new_zeros(1, block.spec.hidden_size)
    mixed = x.new_zeros(1, *block.output_shape)
    widths = sum(p.width for p in project.shared) + J * sum(p.width for p in project.per_memory)
    convolved = sum(p.width for p in project.convolved)
    return {
        "router": count_flops(lambda: block.router.route(x)),
        "projections": 2 * x.numel() * widths,
        "short_conv": 2 * J * convolved * (block.spec.conv_size or 0),
        "rule": J * count_flops(lambda: one_step(block.mechanism, x)),
        "combine": 2 * J * mixed.numel(),
        "output": count_flops(lambda: block.output(mixed, torch.zeros(len(x), 1).long(), x[:, :1], None, x)),
    }


def one_step(mechanism: Mechanism, like: Tensor) -> None:
    """Take one slot of zeros through the rule, from projections to output; only its operations matter."""
    projected = {p.name: like.new_zeros(1, *p.shape) for p in mechanism.projections()}
    inputs = mechanism.prepare(projected)
    state = {name: tensor.to(like.device) for name, tensor in mechanism.initial_state(1).items()}
    domain = mechanism.inputs_domain()
    dtype = scan_state_dtype(mechanism, inputs)
    wide = {
        name: repeat_key_heads(domain[name].axes, tensor.to(dtype), mechanism.sizes) for name, tensor in inputs.items()
    }
    _, output = mechanism.step(state, wide)
    mechanism.finish(output, inputs, projected)


class FlopCounter(TorchDispatchMode):
    """Counts the operations of what runs inside it, by the rules of `flops_per_token`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif torch.Tag.reduction in func.tags:
            self.flops += args[0].numel()
        elif func.overloadpacket in NORMALISERS or (torch.Tag.pointwise in func.tags and func is not COPY):
            self.flops += (out[0] if isinstance(out, tuple) else out).numel()
        return out


def count_flops(run: Callable[[], object]) -> int:
    """The operations of one call."""
    with FlopCounter() as counter:
        run()
    flops: int = counter.flops
    return flops
