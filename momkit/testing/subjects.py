"""What checks are run on: a rule, a rule on one backend, a block, a router, the dispatch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from momkit.block import MoMBlock
from momkit.kernels.available import interpreting
from momkit.mechanisms.base import Context, Inputs, Mechanism, MechanismSpec, Sizes
from momkit.registry import registry, temporarily
from momkit.routing.base import Router, RouterContext, RouterSpec
from momkit.scan import KERNELS, Backend, ScanOutput, run, scan
from momkit.spec import MoMSpec
from momkit.testing.devices import CPU

HIDDEN_SIZE = 8


@dataclass(frozen=True)
class Subject:
    """Something that keeps promises; `id` is what stands before a check's name."""

    name: str
    kind: ClassVar[str]

    @property
    def id(self) -> str:
        return self.name

    @property
    def environment(self) -> dict[str, str]:
        """Variables without which this subject is not checked."""
        return {}


@dataclass(frozen=True)
class RuleSubject(Subject):
    """A rule by itself: its spec, its docstring, what it declares and prepares."""

    cls: type[Mechanism]
    spec: MechanismSpec
    kind = "rule"

    @cached_property
    def rule(self) -> Mechanism:
        """The rule without parameters, as `scan` makes it."""
        return self.cls(self.spec)

    @property
    def widest(self) -> torch.dtype:
        """The dtype of checks that are not about dtypes."""
        return torch.float64

    def axes(self) -> set[str]:
        """Every axis that an input or a state has, but T."""
        entries = [domain.axes for domain in self.rule.inputs_domain().values()]
        return {axis for axes in (*entries, *self.rule.state_axes().values()) for axis in axes.split()} - {"T"}

    def fixed_sizes(self) -> Sizes:
        """Sizes that the spec states."""
        fields = (("num_heads", "H"), ("head_dim", "K"), ("head_v_dim", "V"))
        stated = ((axis, getattr(self.spec, field, None)) for field, axis in fields)
        return {axis: size for axis, size in stated if size is not None}

    def small_spec(self) -> MechanismSpec:
        """The spec with two small heads, K != V where the rule has both, wherever it leaves sizes open."""
        small: dict[str, Any] = {"num_heads": 2, "head_dim": 4}
        if "V" in self.axes():
            small["head_v_dim"] = 6
        given = self.spec.model_dump()
        open_fields = {name: size for name, size in small.items() if name in given and given[name] is None}
        return type(self.spec).model_validate(given | open_fields)

    def module(self, seed: int, hidden_size: int = HIDDEN_SIZE, num_layers: int = 1) -> Mechanism:
        """The rule as a layer has it, with parameters away from special values such as zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rule = self.cls(self.small_spec(), Context(hidden_size, seed % num_layers, num_layers))
            disturb(rule)
        return rule


@dataclass(frozen=True)
class ScanSubject(RuleSubject):
    """A rule on one backend, on one device."""

    backend: Backend
    device: torch.device = CPU
    kind = "scan"

    @property
    def id(self) -> str:
        return f"{self.name}-{self.backend}"

    @property
    def exact(self) -> bool:
        """Whether results must not depend, by a single bit, on what else is computed beside them."""
        return self.backend == "reference"

    @property
    def environment(self) -> dict[str, str]:
        where = {} if self.device.type == "cpu" else {"MOMKIT_DEVICE": self.device.type}
        return where | ({"TRITON_INTERPRET": "1"} if self.backend in KERNELS and interpreting() else {})

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What inputs may be, as far as it makes a difference."""
        if self.backend in KERNELS:
            every = (torch.float32, torch.float16, torch.bfloat16)
            why_not = KERNELS[self.backend]
            return tuple(dtype for dtype in every if why_not(self.rule, self.device, dtype, None) is None)
        return torch.float32, torch.float64, torch.bfloat16

    @property
    def computes_in(self) -> tuple[torch.dtype, ...]:
        """What it multiplies in: families' kernels in the dtype of the inputs, the others in that of the state."""
        if self.backend == "triton":
            return self.dtypes
        return (torch.float32,) if self.backend == "generated" else (torch.float32, torch.float64)

    def multiplied_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it multiplies inputs of `dtype` in."""
        return dtype if dtype in self.computes_in else torch.float32

    @property
    def widest(self) -> torch.dtype:
        return max(self.dtypes, key=lambda dtype: dtype.itemsize)

    def scan(self, inputs: Inputs, cu_seqlens: Tensor | None = None, **options: Any) -> ScanOutput:
        """`momkit.scan` on this backend and device; tensors come from the CPU and go back to it."""
        return self.there_and_back(scan, inputs, cu_seqlens, **options)

    def run(self, inputs: Inputs, cu_seqlens: Tensor, **options: Any) -> ScanOutput:
        """The same without the checks of `scan`."""
        return self.there_and_back(run, inputs, cu_seqlens, **options)

    def there_and_back(self, door: Callable[..., ScanOutput], *tensors: Any, **options: Any) -> ScanOutput:
        there = moved(tensors, self.device), moved(options, self.device)
        out = door(self.rule, *there[0], **there[1], backend=self.backend)
        for name, tensor in {"output": out.output, **out.final_state}.items():
            assert tensor.device.type == self.device.type, f"{self.id}: {name} is on {tensor.device}"
        return ScanOutput(out.output.cpu(), moved(out.final_state, CPU))


def moved(x: Any, device: torch.device) -> Any:
    """Tensors, alone or in tuples and dicts, on a device; anything else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {name: moved(entry, device) for name, entry in x.items()}
    return tuple(moved(entry, device) for entry in x) if isinstance(x, tuple) else x


@dataclass(frozen=True)
class RouterSubject(Subject):
    """A router by itself."""

    cls: type[Router]
    spec: RouterSpec
    kind = "router"

    def module(self, seed: int, num_memories: int, hidden_size: int = HIDDEN_SIZE) -> Router:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = self.cls(self.spec, RouterContext(hidden_size, num_memories))
            disturb(router)
        return router

    def legal_memories(self) -> list[int]:
        """Numbers of memories that the router's spec can serve, few and small."""
        return [m for m in (1, 2, 3, 4, 5, 8, 16) if serves(self.spec, m)][:4]


@dataclass(frozen=True)
class BlockSubject(Subject):
    """A block around one rule (with the default router) or one router (with the default rule)."""

    about: RuleSubject | RouterSubject
    kind = "block"

    @property
    def id(self) -> str:
        return f"{self.name}-block"

    def spec(self, num_memories: int, shared_memory: bool, conv_size: int | None) -> MoMSpec:
        """A small block; for a rule, a routing that chooses at most two memories."""
        settings: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "num_memories": num_memories}
        settings |= {"shared_memory": shared_memory, "conv_size": conv_size}
        if isinstance(self.about, RouterSubject):
            settings |= {"router": self.about.spec, "mechanism": SMALL_RULE}
        else:
            settings |= {"router": {"kind": "softmax_topk", "top_k": min(2, num_memories)}}
            settings |= {"mechanism": self.about.small_spec()}
        with registered(self.about.cls):
            return MoMSpec.model_validate(settings)

    def legal_memories(self) -> list[int]:
        return self.about.legal_memories() if isinstance(self.about, RouterSubject) else [4, 1, 2, 3]

    def build(self, spec: MoMSpec, seed: int) -> MoMBlock:
        """A float64 block with parameters away from special values, in evaluation."""
        with torch.random.fork_rng(devices=[]), registered(self.about.cls):
            torch.manual_seed(seed)
            block = spec.build()
            disturb(block)
        return block.double().eval()


@dataclass(frozen=True)
class DispatchSubject(Subject):
    """The library's own steps around a scan; nothing of a plugin."""

    name: str = "dispatch"
    kind = "dispatch"


SMALL_RULE = {"kind": "gated_deltanet", "num_heads": 2, "head_dim": 4, "head_v_dim": 6}


def serves(spec: RouterSpec, num_memories: int) -> bool:
    try:
        spec.check(num_memories)
    except ValueError:
        return False
    return True


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    """Move every parameter a little, so that none is zero or equal to another by its initialisation."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


@contextmanager
def registered(cls: type) -> Iterator[None]:
    """Make a class known for the length of a block, if it isn't."""
    base = "mechanism" if issubclass(cls, Mechanism) else "router"
    known = registry().classes[base].get(cls.name) is cls  # type: ignore[attr-defined]
    with nullcontext() if known else temporarily(cls):
        yield
