"""The typed description of a MoM block, from which it is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from momkit.errors import InputError
from momkit.mechanisms.base import MechanismSpec
from momkit.registry import registry
from momkit.routing.base import RouterSpec

if TYPE_CHECKING:
    from momkit.block import MoMBlock
    from momkit.scan import Backend


def parse_part(kind: str, value: Any) -> Any:
    """A mechanism's or router's spec from a name, a dict with `kind`, or a spec object of a registered class."""
    if isinstance(value, str):
        return registry().find(kind, value).Spec()  # type: ignore[attr-defined]
    if isinstance(value, dict):
        name = value.get("kind")
        if not isinstance(name, str):
            raise ValueError(f"{kind} needs a `kind`, one of: {', '.join(registry().names(kind))}")
        return registry().find(kind, name).Spec.model_validate(value)  # type: ignore[attr-defined]
    if isinstance(value, BaseModel):
        spec = registry().find(kind, getattr(value, "kind", "")).Spec  # type: ignore[attr-defined]
        if type(value) is not spec:
            raise ValueError(f"{kind} {value!r} is a {type(value).__name__}, the registered spec is {spec.__name__}")
        return value
    raise ValueError(f"{kind} must be a name, a dict or a spec, got {type(value).__name__}")


@dataclass(frozen=True)
class Registered:
    """Annotation of a field that holds the spec of something registered: how it is parsed, and its JSON Schema."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: parse_part(self.kind, value), handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A name, or the fields of any one that is registered."""
        classes: list[Any] = [registry().classes[self.kind][name] for name in registry().names(self.kind)]
        parts = [handler(cls.Spec.__pydantic_core_schema__) | {"required": ["kind"]} for cls in classes]
        return {
            "anyOf": [{"enum": registry().names(self.kind)}, *parts],
            "description": f"name, or {{kind: name, ...}}, of a registered {self.kind}",
        }


MechanismField = Annotated[SerializeAsAny[MechanismSpec], Registered("mechanism")]
RouterField = Annotated[SerializeAsAny[RouterSpec], Registered("router")]


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key said twice is a fault, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} is said twice", node.start_mark)
        return super().construct_mapping(node, deep)


class SpecFile(BaseModel):
    """A frozen description that reads and writes YAML and JSON; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """From YAML text (JSON is YAML too); text that is no YAML is an InputError."""
        try:
            data = yaml.load(text, UniqueKeys)
        except yaml.YAMLError as fault:
            raise InputError(f"not YAML: {' '.join(str(fault).split())}") from fault
        return cls.model_validate(data)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class MoMSpec(SpecFile):
    """Everything that defines a Mixture-of-Memories block.

    mechanism, router: a registered name, a dict with `kind` and the fields of that rule or router, or its spec.
    conv_size: width of the short convolution; None leaves it out.
    """

    schema_version: Literal[1] = 1
    hidden_size: PositiveInt
    num_memories: PositiveInt = 4
    shared_memory: bool = True
    mechanism: MechanismField = Field(default="gated_deltanet", validate_default=True)
    router: RouterField = Field(default="softmax_topk", validate_default=True)
    conv_size: PositiveInt | None = 4
    output_gate: bool = True
    norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6

    @model_validator(mode="after")
    def _check_parts(self) -> "MoMSpec":
        self.router.check(self.num_memories)
        self.mechanism.sizes(self.hidden_size)
        return self

    def build(self, layer_index: int = 0, num_layers: int = 1, backend: "Backend" = "auto") -> "MoMBlock":
        """The block this spec describes, as layer `layer_index` of `num_layers`."""
        from momkit.block import MoMBlock  # the one upward import: a spec builds its owner

        return MoMBlock(self, layer_index=layer_index, num_layers=num_layers, backend=backend)


def load_spec(path: str | Path) -> MoMSpec:
    """Read a MoMSpec from a YAML or JSON file."""
    return MoMSpec.from_yaml(Path(path).read_text(encoding="utf-8"))
