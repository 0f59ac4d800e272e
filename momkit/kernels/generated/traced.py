"""A step and its gradient as graphs: traced with PyTorch on tensors of zeros, then lowered."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from momkit.kernels.generated.graph import Graph, UnsupportedStep
from momkit.kernels.generated.lower import lower
from momkit.kernels.generated.program import Program
from momkit.kernels.generated.views import as_result

# operations to take apart on top of those that PyTorch's core set takes apart, and those to leave whole
FURTHER = """_softmax _log_softmax native_layer_norm gelu addmm baddbmm addmv silu softplus log_sigmoid_forward elu
leaky_relu hardswish _softmax_backward_data _log_softmax_backward_data native_layer_norm_backward gelu_backward
silu_backward softplus_backward log_sigmoid_backward tanh_backward sigmoid_backward elu_backward _fused_rms_norm
_fused_rms_norm_backward linalg_vector_norm threshold_backward addcmul addcdiv select_backward slice_backward lerp"""
WHOLE = "clamp clamp_min clamp_max mean var var_mean masked_fill relu rsub"

# states and inputs of one token, in the program's order -> new states and output
Step = Callable[..., tuple[Tensor, ...]]


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """How operations are taken apart into the few that `lower` knows."""
    further = [getattr(torch.ops.aten, name) for name in FURTHER.split() if hasattr(torch.ops.aten, name)]
    table = {**core_aten_decompositions(), **get_decompositions(further)}
    return {op: how for op, how in table.items() if str(op).split(".")[1] not in WHOLE.split()}


def traced(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> fx.GraphModule:
    """The operations of a function of float32 tensors."""
    make = make_fx(torch.func.functionalize(function), decomposition_table=decompositions())
    try:
        module: fx.GraphModule = make(*(torch.zeros(shape) for shape in shapes))
    except Exception as error:
        raise UnsupportedStep(f"it can't be traced: {type(error).__name__}: {error}") from error
    module.graph.eliminate_dead_code()
    return module


def step_graphs(step: Step, program: Program) -> tuple[Graph, Graph]:
    """The graphs of a step and of its gradient, which takes cotangents of new states and output."""
    states, inputs = program.states, program.inputs
    count = len(states) + len(inputs)

    def pull(*tensors: Tensor) -> tuple[Tensor, ...]:
        _, back = torch.func.vjp(step, *tensors[:count])
        return tuple(back(tensors[count:]))

    values = [*((f"state {s.name}", s) for s in states), *((f"input {i.name}", i) for i in inputs)]
    new = [*values[: len(states)], ("output", program.output)]
    cotangents = [(f"d_{name}", tensor) for name, tensor in new]
    forward = graph_of(step, program, values, new)
    return forward, graph_of(pull, program, [*values, *cotangents], [(f"d_{name}", tensor) for name, tensor in values])


def graph_of(function: Callable[..., Any], program: Program, given: list[Any], results: list[Any]) -> Graph:
    """The graph of a function; given, results: names and tensors."""
    axes = tuple(dict.fromkeys(a for tensor in (*program.states, *program.inputs) for a in tensor.axes))
    dims = [program.dims(tensor) for _, tensor in given]
    module = traced(function, [tuple(dim.size for dim in shape) for shape in dims])
    graph, returned = lower(module, [name for name, _ in given], dims, axes)
    for (name, tensor), x in zip(results, returned, strict=True):
        graph.results.append(as_result(name, x, tuple(d for d in program.dims(tensor) if d.size != 1)))
    return graph


def split_program(program: Program, step: Graph) -> Program:
    """The program with heads and one axis of columns split over kernels' programs, where the step mixes neither."""
    axes = program.output.axes[1:]
    head = "H" if "H" in axes and program.sizes["H"] > 1 and step.why_not_separable("H") is None else ""
    others = dict.fromkeys([*reversed(axes), *(a for s in program.states for a in s.axes)])
    free = [a for a in others if a != "H" and program.sizes[a] > 1 and step.why_not_separable(a) is None]
    return program.split_along(head, free[0] if free else "")
