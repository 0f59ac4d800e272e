"""What is measured on a GPU: rules at shapes, random inputs packed in segments, and agreement before any timing.

Letters: T packed tokens, N segments, H heads, K key dim, V value dim; here G = H and V = K.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from momkit.mechanisms.base import Inputs
from momkit.scan import Backend, as_mechanism, scan

TOKENS, SEGMENTS = 32768, 32
# tokens that are compared with float64
SLICE = 2048
# of the norm, by what it costs to compute in bfloat16
OUTPUT_BOUND, GRADIENT_BOUND = 1e-2, 3e-2

# gates are float32, but where a peer's kernels are measured with narrower ones
GATES = {"gla": torch.bfloat16}

# inputs, cu_seqlens -> output [T, H, V], final state [N, H, K, V] or None
Scan = Callable[[Inputs, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Case:
    """A rule at a shape."""

    rule: str
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rule} {self.heads}x{self.dim}"

    @property
    def facts(self) -> dict[str, str | int]:
        """The case, as a row of results holds it."""
        return {"rule": self.rule, "heads": self.heads, "dim": self.dim}


@dataclass(frozen=True)
class Work:
    """The tensors of one call: inputs that want gradients, `[N + 1]` bounds of segments, the output's gradient."""

    inputs: Inputs
    cu_seqlens: Tensor
    grad_output: Tensor

    @staticmethod
    def of(case: Case, lengths: Sequence[int], device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> "Work":
        """Random tensors for segments of these lengths."""
        inputs = draw(case, sum(lengths), device, dtype)
        cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), device=device)
        return Work(inputs, cu_seqlens, torch.randn_like(inputs["v"]))

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> "Work":
        """The first tokens, in another dtype if one is given, as three segments, the second of one token."""
        bounds = torch.tensor([0, tokens // 3, tokens // 3 + 1, tokens], device=self.cu_seqlens.device)
        inputs = {n: x.detach()[:tokens].clone().to(dtype or x.dtype) for n, x in self.inputs.items()}
        grad_output = self.grad_output[:tokens].to(dtype or self.grad_output.dtype)
        return Work({n: x.requires_grad_() for n, x in inputs.items()}, bounds, grad_output)


def ragged_lengths(tokens: int = TOKENS, segments: int = SEGMENTS) -> list[int]:
    """Uneven lengths of segments, the same on every machine."""
    weights = torch.rand(segments, generator=torch.Generator().manual_seed(1)) + 0.2
    lengths = [int(x) for x in (weights / weights.sum() * tokens).floor().tolist()]
    return [*lengths[:-1], tokens - sum(lengths[:-1])]


def draw(case: Case, tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    """Random inputs, drawn on the device: gates as `GATES` says, keys of norm one."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"T": tokens, "H": case.heads, "G": case.heads, "K": case.dim, "V": case.dim}
    inputs: Inputs = {}
    for name, domain in as_mechanism(case.rule).inputs_domain().items():
        shape = [sizes[axis] for axis in domain.axes.split()]
        wide = GATES.get(case.rule, torch.float32) if domain.is_gate else dtype
        x = torch.randn(shape, generator=generator, device=device, dtype=wide)
        if domain.is_gate:
            x = x.exp_().mul_(-0.03)
        elif name == "beta":
            x = x.sigmoid_()
        elif name == "k":
            x = x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32))
        inputs[name] = x.requires_grad_()
    return inputs


def momkit_scan(case: Case, backend: Backend = "triton") -> Scan:
    """`momkit.scan` on one backend, with no fallback to another."""
    rule = as_mechanism(case.rule)

    def call(inputs: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        result = scan(rule, inputs, cu_seqlens, backend=backend)
        return result.output, result.final_state["S"]

    return call


def forward(call: Scan, work: Work) -> Callable[[], Tensor]:
    """A call that runs forward only, with nothing kept for a backward pass."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(work.inputs, work.cu_seqlens)[0]

    return run


def forward_backward(call: Scan, work: Work) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs forward and backward; the gradients are new tensors each time."""

    def run() -> tuple[Tensor, ...]:
        output, _ = call(work.inputs, work.cu_seqlens)
        return torch.autograd.grad(output, tuple(work.inputs.values()), work.grad_output)

    return run


def found(output: Tensor, final_state: Tensor | None) -> dict[str, Tensor]:
    """What a scan gives, by name."""
    return {"output": output.detach()} | ({} if final_state is None else {"final_state": final_state.detach()})


def results(call: Scan, work: Work) -> dict[str, Tensor]:
    """Output, final state if there is one, and the gradient of every input."""
    output, final_state = call(work.inputs, work.cu_seqlens)
    gradients = torch.autograd.grad(output, tuple(work.inputs.values()), work.grad_output)
    return found(output, final_state) | {f"d{name}": x for name, x in zip(work.inputs, gradients, strict=True)}


def agree(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The distance between results of one name, as a share of the norm; ArithmeticError when it is too large."""
    distances: dict[str, float] = {}
    for name, right in expected.items():
        wide = torch.promote_types(right.dtype, torch.float32)
        distance = float((got[name].to(wide) - right.to(wide)).norm() / right.to(wide).norm())
        allowed = GRADIENT_BOUND if name.startswith("d") else OUTPUT_BOUND
        # written so that a NaN is refused
        if not distance <= allowed:
            raise ArithmeticError(f"{what}: {name} is {distance:.1e} of its norm away, allowed is {allowed:.0e}")
        distances[name] = distance
    return distances


def check_against_float64(case: Case, call: Scan, work: Work) -> dict[str, float]:
    """The first tokens of the work against the chunked form in float64, forward and backward."""
    tokens = min(SLICE, len(work.grad_output))
    exact = results(momkit_scan(case, "chunked"), work.first(tokens, torch.float64))
    return agree(f"{case}, against float64", results(call, work.first(tokens)), exact)
