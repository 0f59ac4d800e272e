"""The block that is measured on a GPU, its training step, and agreement with float64 before any timing.

The paper's: gated_deltanet with 4 heads of 256, 4 memories of which a token takes 2, a shared memory, short convolution
of width 4; in bfloat16, with the gates' parameters, the router and the states in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from momkit.benchmarks.cases import agree
from momkit.benchmarks.peers import LayerCall
from momkit.block import MoMBlock
from momkit.spec import MoMSpec
from momkit.state import MoMState

HEADS, DIM = 4, 256
FLOAT32 = ("mechanism.A_log", "mechanism.dt_bias", "router.weight")
# tokens of each sequence that are compared with float64, or come before the first decoding step
CHECKED, PROMPT = 256, 128


@dataclass(frozen=True)
class Shape:
    """Hidden states of a training step."""

    hidden_size: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"hidden {self.hidden_size}, {self.batch} x {self.length}"


def layer_spec(hidden_size: int, num_memories: int = 4) -> MoMSpec:
    rule = {"kind": "gated_deltanet", "num_heads": HEADS, "head_dim": DIM}
    return MoMSpec.model_validate({"hidden_size": hidden_size, "num_memories": num_memories, "mechanism": rule})


def make_layer(spec: MoMSpec, seed: int = 0) -> MoMBlock:
    """A block on the GPU in bfloat16, with gates and router in float32."""
    torch.manual_seed(seed)
    block = spec.build().to(torch.bfloat16)
    for name in FLOAT32:
        parameter = block.get_parameter(name)
        parameter.data = parameter.data.float()
    return block.to("cuda")


def hidden_states(shape: Shape, seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (shape.batch, shape.length, shape.hidden_size)
    return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)


def block_call(block: MoMBlock) -> LayerCall:
    """Forward of our block, behind the signature of a peer's layer."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        out = block(x)
        return out.hidden_states, out.aux_loss

    return call


def training_step(call: LayerCall, layer: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Forward and backward from output and load-balance loss to x and every parameter; gradients are new each time."""
    leaves = (x.detach().requires_grad_(), *layer.parameters())

    def run() -> Sequence[Tensor]:
        output, aux_loss = call(leaves[0])
        if aux_loss is None:
            return torch.autograd.grad(output, leaves, grad_output)
        return torch.autograd.grad((output, aux_loss), leaves, (grad_output, None))

    return run


def check_training(block: MoMBlock) -> dict[str, float]:
    """Outputs, loss and gradients of a short training step against the same block in float64."""
    exact = float64_block(block)
    shape = Shape(block.spec.hidden_size, 2, CHECKED)
    x, grad_output = hidden_states(shape, seed=3), hidden_states(shape, seed=4)
    found: list[dict[str, Tensor]] = []
    routes: list[Tensor] = []
    for one, dtype in ((block, torch.bfloat16), (exact, torch.float64)):
        start = x.to(dtype, copy=True).requires_grad_()
        out = one(start)
        gradients = torch.autograd.grad(
            (out.hidden_states, out.aux_loss), (start, *one.parameters()), (grad_output.to(dtype), None)
        )
        names = ("dx", *(f"d{name}" for name, _ in one.named_parameters()))
        results = {"output": out.hidden_states.detach(), "aux_loss": out.aux_loss.detach()}
        found.append(results | dict(zip(names, gradients, strict=True)))
        routes.append(out.routing.memory_ids)
    what = f"block of hidden size {shape.hidden_size}, against float64"
    check_routes(what, *routes)
    return agree(what, *found)


def check_step(block: MoMBlock, batch: int) -> dict[str, float]:
    """Output and memories after one decoding step that follows a prompt, against the same block in float64."""
    exact = float64_block(block)
    prompt = hidden_states(Shape(block.spec.hidden_size, batch, PROMPT), seed=3)
    with torch.no_grad():
        state = block(prompt[:, :-1]).state
    wide = MoMState(
        {name: tensor.double() for name, tensor in state.recurrent.items()},
        {name: tensor.double() for name, tensor in state.conv.items()},
    )
    got, expected = block.step(prompt[:, -1], state), exact.step(prompt[:, -1].double(), wide)
    what = f"decoding step of batch {batch}, against float64"
    check_routes(what, got.routing.memory_ids, expected.routing.memory_ids)
    both = ({"output": out.hidden_states, **out.state.recurrent} for out in (got, expected))
    return agree(what, *both)


def float64_block(block: MoMBlock) -> MoMBlock:
    """A copy in float64, in plain torch."""
    exact = block.spec.build(backend="chunked").to("cuda", torch.float64)
    exact.load_state_dict(block.state_dict())
    return exact


def check_routes(what: str, got: Tensor, expected: Tensor) -> None:
    """ArithmeticError unless tokens went the same ways: other ways give other results, however exact."""
    if not torch.equal(got, expected):
        raise ArithmeticError(f"{what}: {int((got != expected).sum())} of {got.numel()} choices are others")
