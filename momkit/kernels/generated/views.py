"""Tensors of a traced step as views of graph values: what permute, expand, view and their like do to them.

A dimension of a tensor is a row of atoms, most often one: a dimension of the value, or a size along which the value
is repeated. Size 1 is no atom, and a view that joins dimensions gives a row of several.
"""

import math
from dataclasses import dataclass

from momkit.kernels.generated.graph import Dim, Graph, Node, Operand, Result, UnsupportedStep


@dataclass(frozen=True)
class Atom:
    """A dimension of a value, or None where the value is the same all along `size`."""

    dim: int | None
    size: int


Row = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """A tensor: a value of the graph, or a constant, and the atoms of each of its dimensions."""

    value: int | None
    rows: tuple[Row, ...]
    constant: float = 0.0
    logical: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(row) for row in self.rows)

    def with_rows(self, rows: tuple[Row, ...] | list[Row]) -> "View":
        return View(self.value, tuple(rows), self.constant, self.logical)

    @staticmethod
    def filled(constant: float, shape: tuple[int, ...], logical: bool = False) -> "View":
        """A tensor of one constant."""
        return View(None, tuple(repeated(size) for size in shape), float(constant), logical)


def size_of(row: Row) -> int:
    return math.prod(atom.size for atom in row)


def repeated(size: int) -> Row:
    return () if size == 1 else (Atom(None, size),)


def permuted(x: View, order: list[int]) -> View:
    return x.with_rows([x.rows[d] for d in order])


def expanded(x: View, shape: tuple[int, ...]) -> View:
    """Broadcast to a shape, -1 for what stays; new dimensions come first."""
    rows = [()] * (len(shape) - len(x.rows)) + list(x.rows)
    return x.with_rows([row if row or size == -1 else repeated(size) for row, size in zip(rows, shape, strict=True)])


def reshaped(x: View, shape: tuple[int, ...]) -> View:
    """The same elements in the same order; dimensions may be joined and, where they were, taken apart."""
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape = tuple(math.prod(x.shape) // rest if size == -1 else size for size in shape)
    atoms = [atom for row in x.rows for atom in row]
    rows = []
    for size in shape:
        row, left = [], size
        while left > 1:
            atom = atoms.pop(0)
            if left % atom.size == 0:
                row.append(atom)
            elif atom.dim is None and atom.size % left == 0:
                row.append(Atom(None, left))
                atoms.insert(0, Atom(None, atom.size // left))
            else:
                raise UnsupportedStep(f"a view takes a dimension of size {atom.size} apart")
            left //= row[-1].size
        rows.append(tuple(row))
    return x.with_rows(rows)


def aligned_rows(rows: list[Row]) -> tuple[list[Row], list[int]]:
    """Rows of one dimension of several operands, atom by atom, and the sizes of the atoms."""
    full = [row for row in rows if row]
    sizes = max((tuple(atom.size for atom in row) for row in full), key=len, default=())
    found = []
    for row in rows:
        if tuple(atom.size for atom in row) == sizes:
            found.append(row)
        elif all(atom.dim is None for atom in row):
            found.append(tuple(Atom(None, size) for size in sizes))
        else:
            raise UnsupportedStep("an operation lines up dimensions that views have joined in different ways")
    return found, list(sizes)


def pointwise(graph: Graph, op: str, operands: list[View], logical: bool = False) -> View:
    """An elementwise operation with PyTorch's broadcasting."""
    rank = max(len(x.rows) for x in operands)
    columns: list[list[Atom | None]] = [[] for _ in operands]
    shape: list[list[int]] = []
    for d in range(rank):
        rows = [x.rows[d - rank + len(x.rows)] if d >= rank - len(x.rows) else () for x in operands]
        lined_up, sizes = aligned_rows(rows)
        shape.append(sizes)
        for column, row in zip(columns, lined_up, strict=True):
            column.extend(row)
    places = [p for p in range(len(columns[0])) if any(column[p].dim is not None for column in columns)]
    places = in_order(graph, operands, columns, places)
    dims = tuple(dim_at(graph, operands, columns, p) for p in places)
    lined = [
        Operand(x.value, tuple(column[p].dim for p in places), x.constant)
        for x, column in zip(operands, columns, strict=True)
    ]
    value = graph.add(Node(op, tuple(lined), dims))
    rows, p = [], 0
    for sizes in shape:
        rows.append(tuple(Atom(places.index(p + i) if p + i in places else None, size) for i, size in enumerate(sizes)))
        p += len(sizes)
    return View(value, tuple(rows), logical=logical)


def in_order(graph: Graph, operands: list[View], columns: list[list[Atom]], places: list[int]) -> list[int]:
    """The dimensions of a result in the order in which its largest operand has them, so that none is transposed."""
    for x, column in zip(operands, columns, strict=True):
        mine = [column[p].dim for p in places]
        if x.value is not None and len(places) > 1 and None not in mine:
            return sorted(places, key=lambda p, column=column: column[p].dim)
    rank = {axis: i for i, axis in enumerate(graph.axes)}
    return sorted(places, key=lambda p: (rank.get(dim_at(graph, operands, columns, p).axis, 0), p))


def dim_at(graph: Graph, operands: list[View], columns: list[list[Atom]], place: int) -> Dim:
    """The dimension of a result at a place, named as the first operand names it that has a name for it."""
    found = [
        graph.dims(x.value)[column[place].dim]
        for x, column in zip(operands, columns, strict=True)
        if column[place].dim is not None
    ]
    return next((dim for dim in found if dim.axis), found[0])


def reduced(graph: Graph, op: str, x: View, over: list[int], keepdim: bool = False) -> View:
    """A sum or an extreme over dimensions."""
    over = [d % len(x.rows) for d in over] if over else list(range(len(x.rows)))
    atoms = [atom for d in over for atom in x.rows[d]]
    gone = sorted(atom.dim for atom in atoms if atom.dim is not None)
    times = math.prod(atom.size for atom in atoms if atom.dim is None)
    kept = [d for d in range(len(graph.dims(x.value))) if d not in gone]
    rows = []
    for d, row in enumerate(x.rows):
        if d not in over:
            rows.append(tuple(Atom(None if a.dim is None else kept.index(a.dim), a.size) for a in row))
        elif keepdim:
            rows.append(())
    if gone:
        dims = tuple(graph.dims(x.value)[d] for d in kept)
        value = graph.add(Node(op, (Operand(x.value, tuple(kept)),), dims, over=tuple(gone)))
        result = View(value, tuple(rows))
    else:
        result = x.with_rows(rows)
    if op == "sum" and times != 1:
        result = multiplied(graph, result, float(times))
    return result


def multiplied(graph: Graph, x: View, factor: float) -> View:
    if x.value is None:
        return View(None, x.rows, x.constant * factor)
    return pointwise(graph, "mul", [x, View.filled(factor, ())])


def as_result(name: str, x: View, dims: tuple[Dim, ...]) -> Result:
    """What a graph returns under a name; `dims` are those of the tensor it goes to, without axes of size 1."""
    rows = [row for row in x.rows if row]
    if any(len(row) != 1 for row in rows) or tuple(size_of(row) for row in rows) != tuple(d.size for d in dims):
        raise UnsupportedStep(
            f"{name} has shape {x.shape}; allowed: {tuple(d.size for d in dims)}, of no joined dimensions"
        )
    return Result(name, Operand(x.value, tuple(row[0].dim for row in rows), x.constant), dims)
