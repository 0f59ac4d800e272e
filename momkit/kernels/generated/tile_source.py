"""Where the tiles of a generated kernel lie in memory: the source of its loads and stores."""

import math

from momkit.kernels.generated.graph import Dim
from momkit.kernels.generated.program import Named, Program, plain_layout, pow2
from momkit.kernels.generated.step_source import index_of, inside, shape_source, spread


def offsets(program: Program, dims: tuple[Dim, ...], strides: tuple[int | str, ...]) -> str:
    """The offsets of a tile's elements, to be added to a pointer."""
    parts = []
    for place, (dim, stride) in enumerate(zip(dims, strides, strict=True)):
        index = spread(index_of(dim.axis), (place,), len(dims))
        parts.append(index if stride == 1 else f"{index} * {stride}")
    return "".join(f" + {part}" for part in parts)


def own_offsets(program: Program, tensor: Named) -> str:
    """Offsets inside one row of a tensor as the rule has it."""
    kept, text, place = program.tile(tensor), "", 0
    for axis, stride in zip(tensor.axes, plain_layout(program, tensor), strict=True):
        name = program.axis(axis)
        if axis == "T" or program.sizes[name] == 1:
            continue
        index = index_of(name)
        if axis == "G" and (shared := program.sizes["H"] // program.sizes["G"]) > 1:
            index = f"{index} // {shared}"
        if name != program.head:
            index = spread(f"({index})" if "//" in index else index, (place,), len(kept))
            place += 1
        text += f" + {index}" if stride == 1 else f" + {index} * {stride}"
    return text


def row_size(program: Program, tensor: Named) -> int:
    """Numbers in one row of a tensor as the rule has it."""
    return math.prod(program.sizes[a] for a in tensor.axes if a != "T")


def masks(program: Program, dims: tuple[Dim, ...], conditions: tuple[str, ...]) -> str:
    """Which elements of a tile are there, and when."""
    parts = [
        spread(mask.replace(f"tl.arange(0, {pow2(dim.size)})", index_of(dim.axis)), (place,), len(dims))
        for place, dim in enumerate(dims)
        if (mask := inside(program, dim))
    ]
    return " & ".join([*parts, *conditions])


def load(pointer: str, mask: str) -> str:
    return f"tl.load({pointer}, mask={mask}, other=0.0)" if mask else f"tl.load({pointer})"


def store(pointer: str, value: str, mask: str) -> str:
    return f"tl.store({pointer}, {value}, mask={mask})" if mask else f"tl.store({pointer}, {value})"


class Tiles:
    """Loads and stores of a program's tensors, whose `row` is a 64-bit number."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def load(self, pointer: str, tensor: Named, row: str, *conditions: str) -> str:
        return load(self.own(pointer, tensor, row), masks(self.program, self.program.tile(tensor), conditions))

    def store(self, pointer: str, tensor: Named, row: str, value: str, *conditions: str) -> str:
        conditions = (*self.once(tensor), *conditions)
        return store(self.own(pointer, tensor, row), value, masks(self.program, self.program.tile(tensor), conditions))

    def own(self, pointer: str, tensor: Named, row: str) -> str:
        """Pointers to a tile of a tensor as the rule has it; row "" is its only one."""
        at = f" + {row} * {row_size(self.program, tensor)}" if row else ""
        return f"{pointer}{at}{own_offsets(self.program, tensor)}"

    def once(self, tensor: Named) -> tuple[str, ...]:
        """When a program is the one to write what others compute too."""
        program, conditions = self.program, ()
        if program.column and not program.split(tensor):
            conditions += ("(tile == 0)",)
        if program.head and not program.by_head(tensor):
            conditions += ("(head == 0)",)
        return conditions

    def once_a_head(self, tensor: Named) -> tuple[str, ...]:
        return ("(tile == 0)",) if self.program.column and not self.program.split(tensor) else ()

    def token_row(self, tensor: Named) -> str:
        """The row of a gradient's buffer `[tiles, T, heads, *tile axes]`; a tensor with columns has one tile there."""
        return "row" if self.program.split(tensor) else "(tile * T + row)"

    def segment_row(self, tensor: Named) -> str:
        return "segment" if self.program.split(tensor) else "(tile * segments + segment)"

    def part(self, pointer: str, tensor: Named, row: str) -> str:
        """Pointers into a buffer `[rows, heads, *tile axes]`."""
        dims = self.program.tile(tensor)
        sizes = [dim.size for dim in dims]
        strides = tuple(math.prod(sizes[d + 1 :]) for d in range(len(dims)))
        at = f"({row} * {self.program.heads} + head) * {math.prod(sizes)}"
        return f"{pointer} + {at}{offsets(self.program, dims, strides)}"

    def store_part(self, pointer: str, tensor: Named, row: str, value: str, *conditions: str) -> str:
        mask = masks(self.program, self.program.tile(tensor), conditions)
        return store(self.part(pointer, tensor, row), value, mask)

    def load_part(self, pointer: str, tensor: Named, row: str) -> str:
        return load(self.part(pointer, tensor, row), masks(self.program, self.program.tile(tensor), ()))

    def work_size(self, tensor: Named) -> str:
        """Numbers in a tile, padded."""
        dims = self.program.tile(tensor)
        fixed = math.prod(pow2(dim.size) for dim in dims if dim.axis != self.program.column)
        return f"({fixed} * BLOCK)" if any(dim.axis == self.program.column for dim in dims) else str(fixed)

    def work_offsets(self, tensor: Named) -> str:
        """Offsets inside a tile that lies in memory by itself."""
        dims = self.program.tile(tensor)
        text = ""
        for place, dim in enumerate(dims):
            width = "BLOCK" if dim.axis == self.program.column else str(pow2(dim.size))
            after = ["BLOCK" if d.axis == self.program.column else str(pow2(d.size)) for d in dims[place + 1 :]]
            text += f" + {spread(f'tl.arange(0, {width})', (place,), len(dims))}{''.join(f' * {a}' for a in after)}"
        return text

    def zeros(self, tensor: Named) -> str:
        dims = self.program.tile(tensor)
        return f"tl.zeros({shape_source(self.program, dims) if dims else '()'}, tl.float32)"
