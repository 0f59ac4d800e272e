"""A rule's step as kernels take it: its tensors in order, and the source that is generated from it."""

import linecache
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from momkit.errors import BackendError
from momkit.kernels.generated.cache import keep
from momkit.kernels.generated.graph import UnsupportedStep
from momkit.kernels.generated.kernel_source import module_source
from momkit.kernels.generated.program import Named, Program
from momkit.kernels.generated.traced import Step, split_program, step_graphs
from momkit.mechanisms.base import Mechanism, MechanismSpec, Sizes

ROUNDING = 1e-9
# sizes of axes, by name; constants that were given for each token
Known = tuple[tuple[str, int], ...]
Timed = tuple[str, ...]


def generate(mechanism: Mechanism, sizes: Sizes, timed: tuple[str, ...] = ()) -> str:
    """The Triton source of a rule's kernels; timed: constants that are given for each token.

    Raises UnsupportedStep, which names the operation and its line in `step`, if there can be none.
    """
    whole = plain_program(mechanism, sizes, timed)
    step = step_of(mechanism, whole)
    try:
        forward, gradient = step_graphs(step, whole)
        program = split_program(whole, forward)
        source = module_source(program, forward, gradient)
    except UnsupportedStep as error:
        reason, *operation = error.args
        raise UnsupportedStep(f"{mechanism.name}: {reason}{line_of(mechanism, whole, *operation)}") from error
    for axis in filter(None, (program.head, program.column)):
        check_split(mechanism, whole, axis)
    return source


# what kernels depend on, by contract: a rule's class, its spec's class and text, sizes, constants given for each token
made: dict[tuple[Any, ...], str] = {}


def source_of(cls: type[Mechanism], spec: MechanismSpec, sizes: Known, timed: Timed) -> str:
    """`generate`, once for the same request."""
    request = cls, type(spec), spec.model_dump_json(), sizes, timed
    if request not in made:
        made[request] = generate(cls(spec), dict(sizes), timed)
    return made[request]


def key_for(cls: type[Mechanism], spec: MechanismSpec, sizes: Known, timed: Timed) -> str:
    """The key of the module that holds a rule's kernels; to a compiler a constant, one for layers that share a spec."""
    return keep(cls.name, source_of(cls, spec, sizes, timed))


def why_no_source(cls: type[Mechanism], spec: MechanismSpec, sizes: Known) -> str | None:
    """What stands in the way of kernels from a rule's step, None if nothing does; to a compiler a constant."""
    try:
        source_of(cls, spec, sizes, ())
    except BackendError as error:
        return str(error)
    return None


torch.compiler.assume_constant_result(key_for)
torch.compiler.assume_constant_result(why_no_source)


def plain_program(mechanism: Mechanism, sizes: Sizes, timed: tuple[str, ...] = ()) -> Program:
    """The tensors of a rule, nothing split."""
    inputs = tuple(
        Named(name, (*(("T",) if name in timed else ()), *domain.axes.split()))
        for name, domain in mechanism.inputs_domain().items()
    )
    states = tuple(Named(name, tuple(axes.split())) for name, axes in mechanism.state_axes().items())
    output = Named("output", ("T", *mechanism.output_axes.split()))
    axes = {a for x in (*inputs, *states, output) for a in x.axes}
    axes |= {"H"} if "G" in axes else set()
    return Program(mechanism.name, {a: sizes[a] for a in sorted(axes - {"T"})}, inputs, states, output, "", "")


def step_of(mechanism: Mechanism, program: Program) -> Step:
    """A rule's step on tensors in the program's order."""
    states, count = [s.name for s in program.states], len(program.states)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = {x.name: tensor for x, tensor in zip(program.inputs, tensors[count:], strict=True)}
        new, output = mechanism.step(dict(zip(states, tensors[:count], strict=True)), inputs)
        return (*(new[name] for name in states), output)

    return step


class Watch(TorchDispatchMode):
    """Remembers the line of a step that first called an operation."""

    def __init__(self, operation: str, filename: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operation, self.filename, self.line = operation, filename, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.line and str(func).split(".")[1].removesuffix("_") == self.operation:
            frame = sys._getframe()
            while frame.f_back is not None and frame.f_code.co_filename != self.filename:
                frame = frame.f_back
            self.line = frame.f_lineno if frame.f_code.co_filename == self.filename else 0
        return func(*args, **(kwargs or {}))


def line_of(mechanism: Mechanism, program: Program, operation: str = "") -> str:
    """Where in a rule's file an operation is called, for a message; "" if nowhere."""
    filename = type(mechanism).step.__code__.co_filename
    watch = Watch(operation, filename)
    if operation:
        given = [torch.zeros([dim.size for dim in program.dims(x)]) for x in (*program.states, *program.inputs)]
        with watch:
            step_of(mechanism, program)(*given)
    code = linecache.getline(filename, watch.line).strip()
    return f" ({filename}:{watch.line}: {code})" if watch.line else ""


def sampled(mechanism: Mechanism, program: Program, sizes: Sizes, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Float64 states and inputs of one token, key heads repeated."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn([d.size for d in program.dims(s)], generator=generator).double() for s in program.states]
    drawn = mechanism.sample(generator, {**sizes, "T": 1})
    inputs = []
    for x, domain in zip(program.inputs, mechanism.inputs_domain().values(), strict=True):
        names = domain.axes.split()
        tensor = drawn[x.name]
        if names[0] == "T":
            tensor, names = tensor[0], names[1:]
        if "G" in names:
            tensor = tensor.repeat_interleave(program.sizes["H"] // program.sizes["G"], names.index("G"))
        inputs.append(tensor)
    return states, inputs


def check_split(mechanism: Mechanism, program: Program, axis: str) -> None:
    """Check by example that one element of an axis does not reach another: what the graph said it does not."""
    states, inputs = sampled(mechanism, program, program.sizes, seed=0)
    step, before = step_of(mechanism, program), [*states, *inputs]
    tensors = (*program.states, *program.inputs)
    after = [moved(x, [d.axis for d in program.dims(tensor)], axis) for tensor, x in zip(tensors, before, strict=True)]
    for tensor, old, new in zip((*program.states, program.output), step(*before), step(*after), strict=True):
        axes = [dim.axis for dim in program.dims(tensor)]
        if axis in axes:
            old, new = (x.narrow(axes.index(axis), 1, program.sizes[axis] - 1) for x in (old, new))
        if not torch.allclose(old, new, rtol=ROUNDING, atol=ROUNDING):
            raise BackendError(
                f"{program.rule}: {tensor.name} mixes elements along {axis}, which its graph did not show"
            )


def moved(x: Tensor, axes: list[str], axis: str) -> Tensor:
    """A tensor with other values in the first element of an axis."""
    if axis not in axes:
        return x
    x = x.clone()
    x.select(axes.index(axis), 0).mul_(0.5).add_(-0.25)
    return x
