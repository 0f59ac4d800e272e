"""One step of a rule as a graph of few operations: inputs, arithmetic by elements, and reductions.

A value has one dimension for each axis that it varies over, named after the axis of the input it comes from; axes of
size 1 and broadcast ones don't count. An operation says how its operands line up, so that views need no operation.
"""

from dataclasses import dataclass, field

from momkit.errors import BackendError


class UnsupportedStep(BackendError):
    """A step does what no kernel can be generated for; the message names it and says what to write instead."""


@dataclass(frozen=True)
class Dim:
    """One axis of a value."""

    axis: str
    size: int


@dataclass(frozen=True)
class Operand:
    """A value, by its number, or a constant; for each dimension of the result its own, None if it has none."""

    value: int | None
    dims: tuple[int | None, ...] = ()
    constant: float = 0.0


@dataclass(frozen=True)
class Node:
    """op: "input", "index" (0, 1, 2 ...), the name of an elementwise operation, or "sum", "amax", "amin" over the
    dimensions `over` of its operand."""

    op: str
    operands: tuple[Operand, ...]
    dims: tuple[Dim, ...]
    name: str = ""
    over: tuple[int, ...] = ()

    @property
    def reduces(self) -> bool:
        return self.op in ("sum", "amax", "amin")


@dataclass(frozen=True)
class Result:
    """What a graph returns: a value or constant; for each axis of the result, the value's dimension or None."""

    name: str
    operand: Operand
    dims: tuple[Dim, ...]


@dataclass
class Graph:
    """Nodes in the order they are computed, none of them twice; axes: the order of dimensions where it is free."""

    nodes: list[Node] = field(default_factory=list)
    axes: tuple[str, ...] = ()
    results: list[Result] = field(default_factory=list)
    known: dict[Node, int] = field(default_factory=dict)

    def add(self, node: Node) -> int:
        """The number of a node."""
        if node not in self.known:
            self.known[node] = len(self.nodes)
            self.nodes.append(node)
        return self.known[node]

    def dims(self, value: int | None) -> tuple[Dim, ...]:
        """The dimensions of a value; a constant has none."""
        return () if value is None else self.nodes[value].dims

    def needed(self, results: list[Result] | None = None) -> list[int]:
        """The nodes that results depend on, in order."""
        wanted = {r.operand.value for r in (self.results if results is None else results)}
        for number in reversed(range(len(self.nodes))):
            if number in wanted:
                wanted |= {operand.value for operand in self.nodes[number].operands}
        return sorted(number for number in wanted if number is not None)

    def why_not_separable(self, axis: str) -> str | None:
        """The operation that mixes elements along an axis, None if there is none: then every part of the axis can be
        computed without the others."""
        for number in self.needed():
            node = self.nodes[number]
            if sum(dim.axis == axis for dim in node.dims) > 1:
                return f"a value has axis {axis} twice"
            for operand in node.operands:
                mine = self.dims(operand.value)
                if node.reduces:
                    if any(mine[d].axis == axis for d in node.over):
                        return f"{node.op} runs along {axis}"
                elif any(
                    (mine[d].axis == axis) != (dim.axis == axis)
                    for d, dim in zip(operand.dims, node.dims, strict=True)
                    if d is not None
                ):
                    return f"{node.op} lines {axis} up with another axis"
        for result in self.results:
            mine = self.dims(result.operand.value)
            for d, dim in zip(result.operand.dims, result.dims, strict=True):
                if d is not None and (mine[d].axis == axis) != (dim.axis == axis):
                    return f"{result.name} has {axis} where another axis belongs"
        return None
