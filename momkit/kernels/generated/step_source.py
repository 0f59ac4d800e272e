"""The Triton source of one step, or of its gradient: a function of tiles, one line for each node of a graph."""

from momkit.kernels.generated.graph import Dim, Graph, Node, Operand, Result, UnsupportedStep
from momkit.kernels.generated.program import Program, pow2

# numbers that one value of a program may have, padded
LARGEST_VALUE = 1 << 17

POINTWISE = {
    "neg": "-{0}",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "log1p({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "1.0 / {0}",
    "sigmoid": "sigmoid({0})",
    "tanh": "tanh({0})",
    "abs": "tl.abs({0})",
    "sign": "sign({0})",
    "erf": "tl.erf({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "trunc": "trunc({0})",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "float": "tl.where({0}, 1.0, 0.0)",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "{0} == 0",
    "where": "tl.where({0}, {1}, {2})",
}
REDUCE = {"sum": ("tl.sum", "0.0"), "amax": ("tl.max", 'float("-inf")'), "amin": ("tl.min", 'float("inf")')}


def number(x: float) -> str:
    """A constant in the source."""
    return repr(float(x)) if x == x and abs(x) != float("inf") else f'float("{x}")'


def index_of(axis: str) -> str:
    """The variable that holds where a program's tile lies along an axis."""
    return f"at_{axis}"


def spread(expression: str, places: tuple[int, ...], rank: int) -> str:
    """A tile with its dimensions at these places of a tile of `rank` dimensions."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    if order != list(range(len(places))):
        expression = f"tl.permute({expression}, ({', '.join(map(str, order))}))"
    if not places or len(places) == rank:
        return expression
    return f"{expression}[{', '.join(':' if d in places else 'None' for d in range(rank))}]"


def shape_source(program: Program, dims: tuple[Dim, ...]) -> str:
    """The shape of a tile."""
    parts = ["BLOCK" if dim.axis == program.column else str(pow2(dim.size)) for dim in dims]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def inside(program: Program, dim: Dim) -> str | None:
    """Which elements along a dimension there are, None if all."""
    if dim.size == pow2(dim.size):
        return None
    at = index_of(dim.axis) if dim.axis == program.column else f"tl.arange(0, {pow2(dim.size)})"
    return f"({at} < {dim.size})"


class StepSource:
    """Writes a graph as the body of a function.

    names: of the graph's inputs in the source. A dimension along the axis of heads is no dimension of a tile.
    """

    def __init__(self, program: Program, graph: Graph, names: dict[str, str]) -> None:
        self.program, self.graph, self.names = program, graph, names
        self.variables: dict[int, str] = {}

    def function(self, name: str, doc: str, parameters: list[str], results: list[Result]) -> str:
        lines = [f"@triton.jit\ndef {name}({', '.join(parameters)}, BLOCK: tl.constexpr):", f'    """{doc}"""']
        for n in self.graph.needed(results):
            node = self.graph.nodes[n]
            if node.op == "input":
                self.variables[n] = self.names[node.name]
                continue
            expression = self.expression(node)
            if expression.isidentifier():
                self.variables[n] = expression
            else:
                self.variables[n] = f"x{len(lines) - 1}"
                lines.append(f"    {self.variables[n]} = {expression}")
        returned = ", ".join(self.result(r) for r in results)
        return "\n".join([*lines, f"    return {returned}", ""])

    def kept(self, dims: tuple[Dim, ...]) -> list[int]:
        """Which dimensions a tile has."""
        return [d for d, dim in enumerate(dims) if dim.axis != self.program.head]

    def expression(self, node: Node) -> str:
        size = 1
        for d in self.kept(node.dims):
            size *= self.program.width(node.dims[d], 16)
        if size > LARGEST_VALUE:
            raise UnsupportedStep(f"{node.op} makes a value of {size} elements; allowed: up to {LARGEST_VALUE}")
        if node.op == "index":
            return f"tl.arange(0, {pow2(node.dims[0].size)})"
        if node.reduces:
            return self.reduction(node)
        parts = [self.operand(operand, node.dims, node.op) for operand in node.operands]
        return POINTWISE[node.op].format(*parts)

    def operand(self, operand: Operand, dims: tuple[Dim, ...], op: str = "") -> str:
        """An operand lined up with the dimensions of a result."""
        if operand.value is None:
            return number(operand.constant)
        mine = self.kept(self.graph.dims(operand.value))
        places = {operand.dims[d]: place for place, d in enumerate(self.kept(dims)) if operand.dims[d] is not None}
        return spread(self.variables[operand.value], tuple(places[d] for d in mine), len(self.kept(dims)))

    def reduction(self, node: Node) -> str:
        operand = node.operands[0].value
        dims = self.graph.dims(operand)
        kept = self.kept(dims)
        function, neutral = REDUCE[node.op]
        expression = self.variables[operand]
        masks = [
            spread(mask, (place,), len(kept))
            for place, d in enumerate(kept)
            if d in node.over and (mask := inside(self.program, dims[d]))
        ]
        if masks:
            expression = f"tl.where({' & '.join(masks)}, {expression}, {neutral})"
        for place in reversed(range(len(kept))):
            if kept[place] in node.over:
                expression = f"{function}({expression}, {place})"
        return expression

    def result(self, result: Result) -> str:
        """What the function returns: a tile with all dimensions that the tensor has."""
        dims = tuple(result.dims[d] for d in self.kept(result.dims))
        shape = shape_source(self.program, dims)
        if result.operand.value is None:
            return f"tl.full({shape if dims else '()'}, {number(result.operand.constant)}, tl.float32)"
        expression = self.operand(result.operand, result.dims)
        mine = self.kept(self.graph.dims(result.operand.value))
        if len(mine) == len(dims):
            return expression
        return f"tl.broadcast_to({expression}, {shape})" if mine else f"tl.zeros({shape}, tl.float32) + {expression}"
