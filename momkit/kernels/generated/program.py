"""What a generated kernel computes, in plain terms: its tensors, their axes and sizes, and how work is split."""

import math
from dataclasses import dataclass, replace

from momkit.kernels.generated.graph import Dim


@dataclass(frozen=True)
class Named:
    """A tensor and its axes; "T" comes first where it has a row for each token."""

    name: str
    axes: tuple[str, ...]

    @property
    def has_time(self) -> bool:
        return self.axes[0] == "T"


@dataclass(frozen=True)
class Program:
    """sizes: of every axis but T. head: the axis of which a program takes one element, "" if there is none; column: the
    axis of which it takes a tile, "" if there is none. A key head G is read by H / G heads."""

    rule: str
    sizes: dict[str, int]
    inputs: tuple[Named, ...]
    states: tuple[Named, ...]
    output: Named
    head: str
    column: str

    def split_along(self, head: str, column: str) -> "Program":
        return replace(self, head=head, column=column)

    @property
    def heads(self) -> int:
        return self.sizes[self.head] if self.head else 1

    @property
    def columns(self) -> int:
        return self.sizes[self.column] if self.column else 1

    def axis(self, name: str) -> str:
        """The axis along which a step sees an axis of a tensor: key heads are repeated for each head."""
        return "H" if name == "G" else name

    def dims(self, tensor: Named) -> tuple[Dim, ...]:
        """All dimensions of a tensor as a step sees it, those of size 1 too, without T."""
        return tuple(Dim(self.axis(a), self.sizes[self.axis(a)]) for a in tensor.axes if a != "T")

    def kept(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """The dimensions that a tile has."""
        return tuple(dim for dim in dims if dim.size != 1 and dim.axis != self.head)

    def tile(self, tensor: Named) -> tuple[Dim, ...]:
        return self.kept(self.dims(tensor))

    def split(self, tensor: Named) -> bool:
        """Whether a program has only a part of a tensor's columns."""
        return any(dim.axis == self.column for dim in self.dims(tensor))

    def by_head(self, tensor: Named) -> bool:
        return any(dim.axis == self.head for dim in self.dims(tensor))

    def is_exact(self, tensor: Named, block: int) -> bool:
        """Whether one program has the whole gradient of an element of a token input: nothing is left to sum up."""
        whole = self.split(tensor) or block >= self.columns
        own = self.by_head(tensor) or self.heads == 1
        return whole and own and tensor.has_time and ("G" not in tensor.axes or self.sizes["G"] == self.sizes["H"])

    def state_elements(self, block: int) -> int:
        """Numbers of all states that one program holds, padded."""
        return sum(math.prod(self.width(d, block) for d in self.tile(state)) for state in self.states)

    def width(self, dim: Dim, block: int) -> int:
        return block if dim.axis == self.column else pow2(dim.size)

    def widest_block(self) -> int:
        return pow2(self.columns)


def pow2(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << (size - 1).bit_length()


def plain_layout(program: Program, tensor: Named) -> tuple[int, ...]:
    """Stride of each axis of a contiguous tensor."""
    sizes = [1 if a == "T" else program.sizes[a] for a in tensor.axes]
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))
