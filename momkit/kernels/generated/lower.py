"""From a traced step, PyTorch's operations one by one, to a `Graph`."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from momkit.kernels.generated.arithmetic import (
    as_logical,
    chosen,
    clamped,
    converted,
    counted,
    dims_of,
    elementwise,
    extreme,
    linear,
    mean,
    power,
    product,
    selected,
    total,
    var_mean,
    variance,
    view_of,
)
from momkit.kernels.generated.graph import Dim, Graph, Node, UnsupportedStep
from momkit.kernels.generated.views import Atom, View, expanded, permuted, repeated, reshaped

INSTEAD = {
    "cat": "keep the parts as inputs or states of their own",
    "stack": "keep the parts as inputs or states of their own",
    "slice": "make each part an input or state of its own",
    "split_with_sizes": "make each part an input or state of its own",
    "max": "amax, which gives no indices",
    "min": "amin, which gives no indices",
    "cumsum": "a state that sums over tokens, or a product with a triangular input",
    "prod": "the exponential of a sum of logarithms",
    "scatter": "torch.where on a comparison",
    "gather": "a sum of torch.where on a comparison",
    "index": "a sum of torch.where on a comparison",
}


def lower(
    traced: fx.GraphModule, names: Sequence[str], shapes: Sequence[Sequence[Dim]], axes: Sequence[str]
) -> tuple[Graph, list[View]]:
    """The graph of a traced function of inputs of these names and dimensions, and the tensors it returns.

    axes: the order that dimensions have where there is a choice.
    """
    graph = Graph(axes=tuple(axes))
    values: dict[fx.Node, Any] = {}
    rest, returned = list(zip(names, shapes, strict=True)), []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = input_view(graph, *rest.pop(0))
        elif node.op == "get_attr":
            values[node] = constant_view(getattr(traced, node.target))
        elif node.op == "call_function":
            arguments = fx.map_arg(list(node.args), lambda x: values[x])
            options = fx.map_arg(dict(node.kwargs), lambda x: values[x])
            values[node] = call(graph, node, arguments, options)
            if operation(node).endswith("_") and isinstance(node.args[0], fx.Node):
                values[node.args[0]] = values[node]
        else:
            returned = [view_of(values[x]) for x in node.args[0]]
    return graph, returned


def input_view(graph: Graph, name: str, dims: Sequence[Dim]) -> View:
    kept = tuple(dim for dim in dims if dim.size != 1)
    value = graph.add(Node("input", (), kept, name))
    places = iter(range(len(kept)))
    return View(value, tuple((Atom(next(places), dim.size),) if dim.size != 1 else () for dim in dims))


def constant_view(tensor: torch.Tensor) -> View:
    if tensor.numel() != 1:
        raise UnsupportedStep(
            f"step makes a constant tensor of shape {tuple(tensor.shape)}; instead, make it an input of the rule"
        )
    return View.filled(float(tensor), tuple(tensor.shape))


def operation(node: fx.Node) -> str:
    """ "aten.add.Tensor" -> "add"; an operation in place ends in "_"."""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).split(".")[1]


def call(graph: Graph, node: fx.Node, arguments: list[Any], options: dict[str, Any]) -> Any:
    """One operation; UnsupportedStep names it if no kernel can have it."""
    name = operation(node).removesuffix("_")
    made = node.meta.get("val")
    try:
        if name in VIEWS:
            return VIEWS[name](*arguments, **options)
        if name in ARITHMETIC:
            return ARITHMETIC[name](graph, *arguments, **options)
        if name in FILLED and isinstance(made, torch.Tensor):
            return View.filled(FILLED[name](*arguments), tuple(made.shape))
        if name == "copy":
            return expanded(arguments[1], arguments[0].shape)
        if name == "_to_copy" and isinstance(made, torch.Tensor):
            return converted(graph, arguments[0], made.dtype)
        advice = INSTEAD.get(name, "arithmetic by elements, sums, means or extremes over an axis, or matrix products")
        raise UnsupportedStep(f"no kernel can be generated for it; instead, write {advice}")
    except UnsupportedStep as error:
        raise UnsupportedStep(f"{name}: {error}", name) from None


def unsqueezed(x: View, dim: int) -> View:
    at = dim % (len(x.rows) + 1)
    return x.with_rows([*x.rows[:at], (), *x.rows[at:]])


def squeezed(x: View, dim: Any = None) -> View:
    over = {d % len(x.rows) for d in dims_of(dim)} if x.rows and dim is not None else set(range(len(x.rows)))
    return x.with_rows([row for d, row in enumerate(x.rows) if row or d not in over])


def transposed(x: View, a: int = 0, b: int = 1) -> View:
    order = list(range(len(x.rows)))
    if order:
        order[a], order[b] = order[b], order[a]
    return permuted(x, order)


def whole_slice(x: View, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> View:
    if (start or 0) != 0 or step != 1 or (end is not None and end < x.shape[dim]):
        raise UnsupportedStep(f"it takes a part of a dimension; instead, {INSTEAD['slice']}")
    return x


def broadcast_in_dim(x: View, shape: Sequence[int], dims: Sequence[int]) -> View:
    rows = [repeated(size) for size in shape]
    for row, d in zip(x.rows, dims, strict=True):
        rows[d] = row or rows[d]
    return x.with_rows(rows)


def arange(graph: Graph, *bounds: int, **_: Any) -> View:
    """0, 1, 2 ... n - 1."""
    first, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    if first != 0 or step != 1:
        raise UnsupportedStep("only from 0 on in steps of 1")
    return counted(graph, int(end))


VIEWS: dict[str, Callable[..., Any]] = {
    "view": lambda x, shape: reshaped(x, tuple(shape)),
    "_unsafe_view": lambda x, shape: reshaped(x, tuple(shape)),
    "reshape": lambda x, shape: reshaped(x, tuple(shape)),
    "expand": lambda x, shape, implicit=False: expanded(x, tuple(shape)),
    "permute": lambda x, order: permuted(x, [d % len(x.rows) for d in order]),
    "transpose": transposed,
    "t": transposed,
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "slice": whole_slice,
    "broadcast_in_dim": broadcast_in_dim,
    "getitem": operator.getitem,
    **dict.fromkeys(("alias", "detach", "clone", "contiguous", "lift", "lift_fresh_copy"), lambda x, **_: x),
}


def by_element(op: str, logical: bool = False) -> Callable[..., View]:
    return lambda graph, *operands: elementwise(graph, op, operands, logical)


def of_logicals(op: str) -> Callable[..., View]:
    return lambda graph, *operands: elementwise(graph, op, [as_logical(graph, x) for x in operands], logical=True)


UNARY = """neg exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal sigmoid tanh abs sign erf sin cos floor ceil trunc
relu maximum minimum"""
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{op: by_element(op) for op in UNARY.split()},
    **{op: by_element(op, logical=True) for op in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{f"{kind}_{op}": of_logicals(op) for kind in ("logical", "bitwise") for op in ("and", "or", "not")},
    "add": lambda graph, x, y, **options: linear(graph, "add", x, y, **options),
    "sub": lambda graph, x, y, **options: linear(graph, "sub", x, y, **options),
    "rsub": lambda graph, x, y, **options: linear(graph, "sub", y, x, **options),
    "mul": by_element("mul"),
    "div": lambda graph, x, y, **options: linear(graph, "div", x, y, **options),
    "pow": power,
    "where": chosen,
    "masked_fill": lambda graph, x, mask, value: chosen(graph, mask, value, x),
    "clamp": lambda graph, x, low=None, high=None, **o: clamped(graph, x, o.get("min", low), o.get("max", high)),
    "clamp_min": clamped,
    "clamp_max": lambda graph, x, high: clamped(graph, x, None, high),
    "hardtanh": lambda graph, x, low=-1.0, high=1.0: clamped(graph, x, low, high),
    "isnan": lambda graph, x: elementwise(graph, "ne", [x, x], logical=True),
    "sum": total,
    "mean": mean,
    "var": variance,
    "var_mean": var_mean,
    "amax": lambda graph, *arguments, **options: extreme(graph, "amax", *arguments, **options),
    "amin": lambda graph, *arguments, **options: extreme(graph, "amin", *arguments, **options),
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), product),
    "select": selected,
    "arange": arange,
}
FILLED: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda *_: 0.0),
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_permuted"), lambda *_: 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda *_: 1.0),
    "full": lambda shape, value: value,
    "full_like": lambda x, value: value,
    "fill": lambda x, value: value,
    "new_full": lambda x, shape, value: value,
    "scalar_tensor": lambda value: value,
}
