"""Arithmetic on views: what PyTorch's operations compute, in the few operations that a graph has."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from momkit.kernels.generated.graph import Dim, Graph, Node, UnsupportedStep
from momkit.kernels.generated.views import Atom, View, expanded, pointwise, reduced

# largest integer power that is taken by repeated products
LARGEST_POWER = 64


def view_of(x: Any) -> View:
    return x if isinstance(x, View) else View.filled(float(x), (), isinstance(x, bool))


def is_logical(x: Any) -> bool:
    return view_of(x).logical


def as_logical(graph: Graph, x: Any) -> View:
    return x if is_logical(x) else elementwise(graph, "ne", [x, 0.0], logical=True)


def elementwise(graph: Graph, op: str, operands: Sequence[Any], logical: bool = False) -> View:
    """An operation by elements; what is known already is not computed by a kernel."""
    views = [view_of(x) for x in operands]
    if op not in ("and", "or", "not", "where"):
        views = [as_float(graph, x) for x in views]
    if op == "where" and not logical:
        views = [views[0], *(as_float(graph, x) for x in views[1:])]
    if all(x.value is None for x in views):
        return folded(op, views, logical)
    kept = unchanged(op, views)
    if kept is not None:
        shape = torch.broadcast_shapes(*(x.shape for x in views))
        return expanded(kept, tuple(shape))
    return pointwise(graph, op, views, logical)


def as_float(graph: Graph, x: View) -> View:
    if not x.logical:
        return x
    return View(None, x.rows, x.constant) if x.value is None else pointwise(graph, "float", [x])


def unchanged(op: str, views: Sequence[View]) -> View | None:
    """The operand that an operation gives back, None if it does more."""
    if op == "where" and views[0].value is None:
        return views[1] if views[0].constant else views[2]
    for x, other in (views, views[::-1]) if len(views) == 2 else ():
        constant = other.constant if other.value is None else None
        if constant == {"mul": 1.0, "add": 0.0}.get(op) and constant is not None:
            return x
    if len(views) == 2 and views[1].value is None and views[1].constant == {"div": 1.0, "sub": 0.0}.get(op):
        return views[0]
    return None


def folded(op: str, views: Sequence[View], logical: bool) -> View:
    """An operation on constants."""
    function = getattr(torch, f"logical_{op}" if op in ("and", "or", "not") else op)
    constants = [torch.tensor(x.constant, dtype=torch.bool if x.logical else torch.float64) for x in views]
    result = function(*constants)
    return View.filled(float(result), tuple(torch.broadcast_shapes(*(x.shape for x in views))), logical)


def linear(graph: Graph, op: str, x: Any, y: Any, alpha: float = 1.0, rounding_mode: str | None = None) -> View:
    """x + alpha y, x - alpha y, or any operation on two; a quotient may be rounded."""
    scaled = y if alpha == 1 else elementwise(graph, "mul", [y, alpha])
    result = elementwise(graph, op, [x, scaled])
    return result if rounding_mode is None else elementwise(graph, rounding_mode, [result])


def clamped(graph: Graph, x: View, low: Any = None, high: Any = None) -> View:
    x = x if low is None else elementwise(graph, "maximum", [x, low])
    return x if high is None else elementwise(graph, "minimum", [x, high])


def chosen(graph: Graph, condition: Any, x: Any, y: Any) -> View:
    return elementwise(graph, "where", [as_logical(graph, condition), x, y], logical=is_logical(x))


def converted(graph: Graph, x: View, dtype: torch.dtype) -> View:
    if dtype == torch.bool:
        return as_logical(graph, x)
    if dtype != torch.float32 and dtype.is_floating_point:
        raise UnsupportedStep(f"a conversion to {dtype}; instead, leave values in the dtype of the state")
    if not dtype.is_floating_point and not x.logical and x.value is not None:
        return elementwise(graph, "trunc", [x])
    return as_float(graph, x)


def product(graph: Graph, a: View, b: View) -> View:
    """A matrix product as a sum of products: `[..., M, C]` by `[..., C, N]`, or by a vector `[C]`."""
    if len(b.rows) == 1:
        return reduced(graph, "sum", elementwise(graph, "mul", [a, b]), [-1])
    left, right = a.with_rows([*a.rows, ()]), b.with_rows([*b.rows[:-2], (), *b.rows[-2:]])
    return reduced(graph, "sum", elementwise(graph, "mul", [left, right]), [-2])


def power(graph: Graph, x: Any, exponent: Any) -> View:
    """x to a constant power."""
    exponent = view_of(exponent)
    if exponent.value is not None:
        raise UnsupportedStep("only constant exponents; instead, write exp(y * log(x))")
    x, p = view_of(x), exponent.constant
    if x.value is None:
        return View.filled(x.constant**p, x.shape)
    if p in (-0.5, 0.0, 0.5, 1.0):
        return {
            -0.5: lambda: elementwise(graph, "rsqrt", [x]),
            0.0: lambda: View.filled(1.0, x.shape),
            0.5: lambda: elementwise(graph, "sqrt", [x]),
            1.0: lambda: x,
        }[p]()
    if p < 0:
        return elementwise(graph, "reciprocal", [power(graph, x, -p)])
    if p != math.floor(p) or p > LARGEST_POWER:
        return elementwise(graph, "exp2", [elementwise(graph, "mul", [elementwise(graph, "log2", [x]), p])])
    half = power(graph, x, p // 2)
    square = elementwise(graph, "mul", [half, half])
    return elementwise(graph, "mul", [square, x]) if p % 2 else square


def total(graph: Graph, x: View, dim: Any = None, keepdim: bool = False, **_: Any) -> View:
    return reduced(graph, "sum", as_float(graph, x), dims_of(dim), keepdim)


def mean(graph: Graph, x: View, dim: Any = None, keepdim: bool = False, **_: Any) -> View:
    over = dims_of(dim) or list(range(len(x.rows)))
    count = math.prod(x.shape[d] for d in over)
    return elementwise(graph, "mul", [reduced(graph, "sum", as_float(graph, x), over, keepdim), 1 / count])


def variance(graph: Graph, x: View, dim: Any = None, correction: Any = None, keepdim: bool = False) -> View:
    over = dims_of(dim) or list(range(len(x.rows)))
    count = math.prod(x.shape[d] for d in over)
    away = elementwise(graph, "sub", [x, mean(graph, x, over, True)])
    squares = reduced(graph, "sum", elementwise(graph, "mul", [away, away]), over, keepdim)
    return elementwise(graph, "div", [squares, float(max(0.0, count - (1 if correction is None else correction)))])


def var_mean(graph: Graph, x: View, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return variance(graph, x, dim, correction, keepdim), mean(graph, x, dim, keepdim)


def extreme(graph: Graph, op: str, x: View, dim: Any = None, keepdim: bool = False) -> View:
    return reduced(graph, op, x, dims_of(dim), keepdim)


def counted(graph: Graph, size: int) -> View:
    """0, 1, 2 ... along a dimension."""
    if size == 1:
        return View.filled(0.0, (1,))
    return View(graph.add(Node("index", (), (Dim("", size),))), ((Atom(0, size),),))


def dims_of(dim: Any) -> list[int]:
    """A list of dimensions; none is all."""
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def selected(graph: Graph, x: View, dim: int, index: int) -> View:
    """One index of a dimension."""
    dim %= len(x.rows)
    row = x.rows[dim]
    if all(atom.dim is None for atom in row):
        return x.with_rows([r for d, r in enumerate(x.rows) if d != dim])
    if len(row) > 1:
        raise UnsupportedStep("select on a dimension that a view has joined")
    size = row[0].size
    here = elementwise(graph, "eq", [counted(graph, size), float(index % size)], logical=True)
    here = here.with_rows([*here.rows, *[()] * (len(x.rows) - dim - 1)])
    return reduced(graph, "sum", elementwise(graph, "where", [here, x, 0.0]), [dim])
