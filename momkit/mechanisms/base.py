"""The mechanism contract: what an update rule states about itself, and what it gets for that.

Letters: T packed tokens, N segments, H heads, G key heads (H = G * r), K key dim, V value dim, D hidden size.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

from momkit.errors import InputError
from momkit.precision import StaysWide

Inputs = dict[str, Tensor]
State = dict[str, Tensor]
Sizes = dict[str, int]
Activation = Literal["none", "silu", "tanh", "sigmoid"]


class MechanismSpec(BaseModel):
    """Settings of one update rule; `kind` is the name it is registered under."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # the axis that a field sets the size of, by the field's name
    axes: ClassVar[dict[str, str]] = {}
    kind: str = ""

    def sizes(self, hidden_size: int) -> Sizes:
        """The size of every axis the rule names, those left out derived from `hidden_size`."""
        raise NotImplementedError(f"{type(self).__name__} must define sizes(hidden_size)")


class HeadSpec(MechanismSpec):
    """Settings of a rule whose state is one matrix a head.

    Left out: `head_dim` is hidden_size / num_heads, `num_heads` is hidden_size / head_dim; with neither, heads of
    hidden_size / 4, at most 256. `head_v_dim` follows `head_dim`, `scale` is K^-1/2.
    """

    axes: ClassVar[dict[str, str]] = {"num_heads": "H", "head_dim": "K", "head_v_dim": "V"}
    num_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    head_v_dim: PositiveInt | None = None
    scale: float | None = Field(default=None, allow_inf_nan=False)

    def sizes(self, hidden_size: int) -> Sizes:
        if self.head_dim is not None:
            head_dim = self.head_dim
        elif self.num_heads is not None:
            head_dim = max(1, hidden_size // self.num_heads)
        else:
            head_dim = min(256, max(1, hidden_size // 4))
        num_heads = self.num_heads or max(1, hidden_size // head_dim)
        return {"H": num_heads, "G": num_heads, "K": head_dim, "V": self.head_v_dim or head_dim}


@dataclass(frozen=True)
class Context:
    """Where in a model a mechanism stands."""

    hidden_size: int
    layer_index: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.layer_index < self.num_layers:
            allowed = f"0 to {self.num_layers - 1}, since num_layers = {self.num_layers}"
            raise InputError(f"layer_index = {self.layer_index}; allowed: {allowed}")


@dataclass(frozen=True)
class Projection:
    """One thing the block projects for every token: linear map, then short conv, then activation, then l2 norm.

    `shape` is the shape for one token; its last axis is the one that `l2` normalises. `shared` projections have one
    weight for all memories, the others one a memory.
    """

    name: str
    shape: tuple[int, ...]
    shared: bool = False
    bias: bool = False
    conv: bool = False
    conv_bias: bool = False
    activation: Activation = "none"
    l2: bool = False

    def __post_init__(self) -> None:
        what = f"projection {self.name!r}"
        if not self.name.isidentifier():
            raise InputError(f"{what}: allowed are names that are Python identifiers")
        if self.activation not in get_args(Activation):
            raise InputError(f"{what}: activation = {self.activation!r}; allowed: {', '.join(get_args(Activation))}")
        if not self.shape or min(self.shape) < 1:
            raise InputError(f"{what}: shape = {self.shape}; allowed: one axis or more, each of size 1 or more")
        if self.conv_bias and not self.conv:
            raise InputError(f"{what}: conv_bias = True needs conv = True")

    @property
    def width(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Domain:
    """The axes of one input ("T H K": a token input, "H K": a constant) and the values it may take."""

    axes: str
    low: float = -math.inf
    high: float = math.inf
    unit_norm: bool = False

    @property
    def is_gate(self) -> bool:
        """True for a log decay: anything from minus infinity to zero."""
        return self.high == 0 and self.low == -math.inf

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Tensor:
        """Random values of this domain, float64."""
        shape = [sizes[axis] for axis in self.axes.split()]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.unit_norm:
            return nn.functional.normalize(x, dim=-1)
        if math.isfinite(self.low) and math.isfinite(self.high):
            return self.low + (self.high - self.low) * torch.sigmoid(x)
        if math.isfinite(self.high):
            return self.high - x.exp() * 0.1
        if math.isfinite(self.low):
            return self.low + x.exp() * 0.5
        return x


@dataclass(frozen=True)
class Structure:
    """How an affine rule moves its state, S = decay(S) + erase(S) + k v^T; enough to pick a chunked form or a kernel.

    `erase_sees` says which state an erase term reads: after this token's decay, or the previous one as it was.
    `read` says whether o = scale q^T S sees this token's write, or, "before", only its bonus `u`.
    """

    decay: Literal["none", "constant", "head", "key", "value"]
    erase: Literal["none", "delta", "low_rank"] = "none"
    erase_sees: Literal["decayed", "previous"] = "decayed"
    read: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Affine:
    """Inputs of an affine scan: q, k, a, b, gk `[T, G, K]`, v, gv `[T, H, V]`, g `[T, H]` or `[H]`, beta `[T, H]`,
    u `[H, K]`. Decays are natural logarithms."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    gk: Tensor | None = None
    gv: Tensor | None = None
    beta: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    u: Tensor | None = None
    scale: float = 1.0

    def need(self, name: str) -> Tensor:
        """An input that a structure calls for."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise InputError(f"the rule's structure calls for {name!r}, and lower(inputs) left it out")
        return tensor


# structure, inputs, initial S [N, H, K, V] -> output [T, H, V], final S
AffineScan = Callable[[Structure, Affine, Tensor], tuple[Tensor, Tensor]]


class Mechanism(StaysWide):
    """An update rule. Subclass it, set `Spec`, write `step`, and say what it needs; everything else follows.

    The docstring of a rule has three paragraphs: one sentence, the equation, the paper.
    """

    Spec: ClassVar[type[MechanismSpec]]
    name: ClassVar[str]
    output_axes: ClassVar[str] = "H V"
    value_input: ClassVar[str] = "v"
    wide: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    # the largest sizes that a kernel of the rule's own takes
    kernel_limits: ClassVar[dict[str, int]] = {}
    # columns that the state of an affine scan has besides those of the values
    extra_columns: int = 0
    # how the rule is affine in its state, if it is; "infer" has it found in the step, once a class and spec
    structure: Structure | Literal["infer"] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Spec" in cls.__dict__:
            cls.name = cls.Spec.model_fields["kind"].default
        if isinstance(cls.structure, str) and cls.structure != "infer":
            raise InputError(f"{cls.__name__}: structure = {cls.structure!r}; allowed: a Structure, 'infer' or None")

    def __init__(self, spec: MechanismSpec, context: Context | None = None) -> None:
        super().__init__()
        if not isinstance(spec, self.Spec):
            raise TypeError(f"{type(self).__name__} takes a {self.Spec.__name__}, got {type(spec).__name__}")
        self.spec = spec
        self.context = context
        # without a context a rule only scans: it has no parameters, and reads its sizes off its inputs
        self.sizes: Sizes = spec.sizes(context.hidden_size) if context else {}
        if context:
            self.make_parameters()

    def make_parameters(self) -> None:
        """Create what `prepare`, `finish` and `initial_state` learn, initialised as the paper does."""

    def projections(self) -> tuple[Projection, ...]:
        """What the block projects for every token."""
        raise NotImplementedError(f"{type(self).__name__} must define projections()")

    def prepare(self, projected: Inputs) -> Inputs:
        """From projections to inputs: gates, feature maps, whatever is left; `projected` stays as it is."""
        return dict(projected)

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        """One token, vectorised over leading dimensions: the definition of the rule."""
        raise NotImplementedError(f"{type(self).__name__} must define step(state, inputs)")

    def freeze(self, inputs: Inputs, where: Tensor) -> Inputs:
        """Inputs with which `step` leaves the state bitwise as it is at tokens `where` `[T]`, and still reads it."""
        raise NotImplementedError(f"{type(self).__name__} must define freeze(inputs, where)")

    def finish(self, output: Tensor, inputs: Inputs, projected: Inputs) -> Tensor:
        """What a rule adds to its output in each slot before memories are combined."""
        return output

    def state_axes(self) -> dict[str, str]:
        """The axes of each state of one segment, by name."""
        return {"S": "H K V"}

    def inputs_domain(self) -> dict[str, Domain]:
        """Axes and range of each input."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs_domain()")

    def sample(self, generator: torch.Generator, sizes: Sizes) -> Inputs:
        """Random float64 inputs that are legal together."""
        return {name: domain.sample(generator, sizes) for name, domain in self.inputs_domain().items()}

    def lower(self, inputs: Inputs) -> Affine:
        """The inputs of an affine rule in the letters of `Affine`."""
        names = [n for n in ("q", "k", "v", "g", "gk", "gv", "beta", "a", "b", "u") if n in inputs]
        return Affine(**{n: inputs[n] for n in names}, scale=self.scale_for(inputs["q"]))

    def compose(self, inputs: Inputs, state: State, affine: AffineScan) -> tuple[Tensor, State]:
        """The rule as affine scans: one by default; a composite rule runs several."""
        (structure,) = self.structures()
        output, S = affine(structure, self.lower(inputs), state["S"])
        return output, {"S": S}

    def structures(self) -> tuple[Structure, ...]:
        """The structures of the affine scans that `compose` runs; a composite rule states its own.

        Raises InputError where `structure` is "infer" and the step is of no family, or `lower` does not give its terms.
        """
        if self.structure == "infer":
            # one way up: what traces a step is not loaded unless a rule asks for it
            from momkit.mechanisms.structure_infer import inferred_structure

            return (inferred_structure(type(self), self.spec),)
        return () if self.structure is None else (self.structure,)

    def scan_kernel(self, inputs: Inputs, cu_seqlens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The scan on a fused kernel of the rule's own, where no family's serves it; a state of None is zeros.

        Inputs and states are float32 or narrower; rows that no segment covers come out as zeros.
        """
        raise NotImplementedError(f"{type(self).__name__} has no kernel of its own")

    def decode_kernel(self, inputs: Inputs, pool: State, state_index: Tensor) -> Tensor:
        """One token of each row on a fused kernel of the rule's own: `pool[state_index]` changes in place.

        An index of -1 is padding: its output is zeros.
        """
        raise NotImplementedError(f"{type(self).__name__} has no kernel of its own")

    @property
    def has_scan_kernel(self) -> bool:
        return type(self).scan_kernel is not Mechanism.scan_kernel

    @property
    def has_decode_kernel(self) -> bool:
        return type(self).decode_kernel is not Mechanism.decode_kernel

    @property
    def has_chunked_form(self) -> bool:
        """Whether the rule is composed of affine scans, or is one that the chunked scan covers."""
        if type(self).compose is not Mechanism.compose:
            return True
        return any(s.decay != "value" or s.erase == "none" for s in self.structures())

    def state_spec(self, sizes: Sizes | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each state of one segment; `sizes` defaults to the module's own."""
        sizes = self.sizes if sizes is None else sizes
        return {name: tuple(sizes[a] for a in axes.split()) for name, axes in self.state_axes().items()}

    def output_spec(self) -> tuple[int, int]:
        """(heads, dim) of the output of one token."""
        shape = [self.sizes[a] for a in self.output_axes.split()]
        return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])

    def initial_state(self, n: int) -> State:
        """States of n segments before their first token: zeros unless the rule learns them."""
        parameter = next(self.parameters(), None)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
        device = None if parameter is None else parameter.device
        return {name: torch.zeros((n, *shape), dtype=dtype, device=device) for name, shape in self.state_spec().items()}

    def scale_for(self, q: Tensor) -> float:
        """The factor on reads: the spec's, or K^-1/2 of the actual K."""
        scale: float | None = getattr(self.spec, "scale", None)
        return q.shape[-1] ** -0.5 if scale is None else scale

    def extra_repr(self) -> str:
        return f"{self.name}, {self.sizes}"


def axes_of(axes: str, tensor: Tensor) -> list[str]:
    """The axes of one input as it was given: a constant may have been expanded along time, as `freeze` does."""
    names = axes.split()
    return ["T", *names] if names[0] != "T" and tensor.ndim == len(names) + 1 else names


def take(tensors: Mapping[str, Tensor], names: str) -> tuple[Tensor, ...]:
    """Several entries at once: `q, k = take(inputs, "q k")`."""
    return tuple(tensors[name] for name in names.split())


def outer(k: Tensor, v: Tensor) -> Tensor:
    """k v^T: `[..., K]`, `[..., V]` -> `[..., K, V]`."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def read(S: Tensor, q: Tensor) -> Tensor:
    """S^T q: `[..., K, V]`, `[..., K]` -> `[..., V]`."""
    return torch.matmul(q.unsqueeze(-2), S).squeeze(-2)


def where_frozen(tensor: Tensor, where: Tensor, value: float) -> Tensor:
    """`tensor` `[T, ...]` with `value` at the tokens `where` `[T]`, by selection, so that no NaN survives."""
    return tensor.masked_fill(where.view(-1, *[1] * (tensor.ndim - 1)), value)


def gate_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype gates are computed in: float64 stays, anything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
