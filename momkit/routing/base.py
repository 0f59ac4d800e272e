"""The router contract: which memories a token writes to and reads from, and with what weight.

Letters: T packed tokens, M memories, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from momkit.precision import StaysWide


class RouterSpec(BaseModel):
    """Settings of one router; `kind` is the name it is registered under."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str = ""

    def check(self, num_memories: int) -> None:
        """Raise a ValueError that names the field if this router can't serve `num_memories`."""


@dataclass(frozen=True)
class RouterContext:
    """Where in a model a router stands."""

    hidden_size: int
    num_memories: int
    layer_index: int = 0


@dataclass(frozen=True)
class Routing:
    """The choices of T tokens.

    weights: `[T, slots]` fp32 (float64 in a float64 module); they sum to one unless the router says otherwise.
    memory_ids: `[T, slots]` int64, distinct among a token's writes and among its reads.
    writes: `[T, slots]` bool, False where a slot only reads; None when every slot writes. A token's write slots
        come before its read slots.
    aux_loss: scalar, the load-balance loss of this layer, unscaled.
    logits: `[T, M]` fp32, what the choice was made from.
    """

    weights: Tensor
    memory_ids: Tensor
    writes: Tensor | None
    aux_loss: Tensor
    logits: Tensor


class Router(StaysWide):
    """A routing rule. Subclass it, set `Spec`, and write `slots` and `route`.

    The docstring of a router has three paragraphs, as a rule's: one sentence, the equation, the paper.
    """

    Spec: ClassVar[type[RouterSpec]]
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Spec" in cls.__dict__:
            cls.name = cls.Spec.model_fields["kind"].default

    def __init__(self, spec: RouterSpec, context: RouterContext) -> None:
        super().__init__()
        if not isinstance(spec, self.Spec):
            raise TypeError(f"{type(self).__name__} takes a {self.Spec.__name__}, got {type(spec).__name__}")
        spec.check(context.num_memories)
        self.spec = spec
        self.context = context

    @property
    def slots(self) -> int:
        """Memories chosen for each token, a static number; the shared memory is not counted."""
        raise NotImplementedError(f"{type(self).__name__} must define slots")

    def route(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """Choose for every token of `x` `[T, D]` from that token alone; `mask` `[T]` is False at padding."""
        raise NotImplementedError(f"{type(self).__name__} must define route(x, mask)")

    def update(self, load: Tensor) -> None:
        """Called once an optimizer step with the load `[M]` that the step routed; most routers keep no such state."""

    def extra_repr(self) -> str:
        return f"{self.name}, num_memories={self.context.num_memories}"
