"""The typed description of a block: what it accepts, derives, writes and reads back."""

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel, ValidationError

from momkit import Mechanism, MechanismSpec, MoMSpec, Router, RouterSpec
from momkit.errors import InputError
from momkit.mechanisms.base import HeadSpec
from momkit.registry import registry, temporarily
from momkit.spec import load_spec

PARTS = [(kind, name) for kind in ("mechanism", "router") for name in registry().names(kind)]
every_part = pytest.mark.parametrize(("kind", "name"), PARTS, ids=[name for _, name in PARTS])
HEADS = [
    name for name in registry().names("mechanism") if issubclass(registry().find("mechanism", name).Spec, HeadSpec)
]


def candidates(annotation: Any) -> Iterator[Any]:
    """Values that a field of this type may take."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from candidates(part)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_args(annotation):
        yield from candidates(get_args(annotation)[0])
    elif annotation is bool:
        yield from (True, False)
    elif annotation is int:
        yield from (3, 1)
    elif annotation is float:
        yield from (0.25, 0.5)


def unusual_spec(cls: type[BaseModel]) -> BaseModel:
    """A spec none of whose fields but `kind` is at its default."""
    fields: dict[str, Any] = {}
    for name, info in cls.model_fields.items():
        if name == "kind":
            continue
        for value in candidates(info.annotation):
            try:
                accepted = value != info.default and bool(cls(**fields, **{name: value}))
            except ValidationError:
                continue
            if accepted:
                fields[name] = value
                break
        assert name in fields, f"{cls.__name__}.{name} takes none of the values tried"
    return cls(**fields)


def unusual(kind: str, name: str) -> MoMSpec:
    """A block none of whose fields is at its default, with such a part."""
    part = unusual_spec(registry().find(kind, name).Spec)
    other = {"mechanism": "gla", "router": "hash"} | {kind: part}
    return MoMSpec(
        hidden_size=24, num_memories=5, shared_memory=False, conv_size=None, output_gate=False, norm_eps=1e-5, **other
    )


@every_part
def test_round_trips(kind, name):
    spec = unusual(kind, name)
    for again in (
        MoMSpec.model_validate_json(spec.model_dump_json()),
        MoMSpec.model_validate(json.loads(spec.model_dump_json())),
        MoMSpec.model_validate(spec.model_dump()),
        MoMSpec.from_yaml(spec.to_yaml()),
        MoMSpec.from_yaml(spec.model_dump_json()),
    ):
        assert again == spec
        assert type(getattr(again, kind)) is type(getattr(spec, kind))
        assert hash(again) == hash(spec)
    assert MoMSpec(hidden_size=24) != spec
    assert getattr(spec, kind).model_dump().items() <= json.loads(spec.model_dump_json())[kind].items()


@every_part
def test_a_name_a_dict_and_a_spec_are_one(kind, name):
    part = registry().find(kind, name).Spec()
    named, described, given = (MoMSpec(hidden_size=8, **{kind: value}) for value in (name, {"kind": name}, part))
    assert named == described == given
    assert getattr(named, kind) == part


@every_part
def test_defaults_suffice_to_build(kind, name):
    """Any size of at least one is legal."""
    for hidden_size in (1, 3, 8):
        block = MoMSpec(hidden_size=hidden_size, **{kind: name}).build()
        y = block(torch.randn(2, 3, hidden_size)).hidden_states
        assert y.shape == (2, 3, hidden_size)
        assert y.isfinite().all()


@every_part
def test_unusual_fields_build(kind, name):
    block = unusual(kind, name).build(layer_index=1, num_layers=3)
    out = block(torch.randn(2, 5, 24))
    assert out.hidden_states.isfinite().all()
    assert getattr(block, kind).spec == getattr(block.spec, kind)


def test_the_default_is_the_papers():
    spec = MoMSpec(hidden_size=64)
    assert (spec.mechanism.kind, spec.router.kind, spec.router.top_k) == ("gated_deltanet", "softmax_topk", 2)
    assert (spec.num_memories, spec.shared_memory, spec.conv_size, spec.output_gate) == (4, True, 4, True)
    assert (spec.norm_eps, spec.schema_version) == (1e-6, 1)


def test_specs_are_frozen():
    spec = MoMSpec(hidden_size=8)
    with pytest.raises(ValidationError, match="frozen"):
        spec.num_memories = 2
    with pytest.raises(ValidationError, match="frozen"):
        spec.mechanism.num_heads = 2


def test_files(tmp_path):
    spec = unusual("mechanism", "gated_deltanet")
    for name, text in (("a.yaml", spec.to_yaml()), ("a.json", spec.model_dump_json(indent=1))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_spec(tmp_path / name) == spec
        assert load_spec(str(tmp_path / name)) == spec


def test_yaml_by_hand():
    text = """
hidden_size: 32
mechanism: {kind: gla, num_heads: 2}
router: {kind: softmax_topk, top_k: 1}
conv_size: null
"""
    spec = MoMSpec.from_yaml(text)
    assert (spec.mechanism.num_heads, spec.router.top_k, spec.conv_size) == (2, 1, None)


def test_broken_yaml_is_one_line():
    with pytest.raises(InputError, match="not YAML") as caught:
        MoMSpec.from_yaml("hidden_size: [1\n  2")
    assert "\n" not in str(caught.value)
    for text in ("", "[]", "5"):
        with pytest.raises(ValidationError):
            MoMSpec.from_yaml(text)


def test_a_class_that_nobody_registered_is_refused():
    class StraySpec(MechanismSpec):
        kind: Literal["gla"] = "gla"

    with pytest.raises(ValidationError, match="the registered spec is GLASpec"):
        MoMSpec(hidden_size=8, mechanism=StraySpec())
    with pytest.raises(ValidationError, match="unknown mechanism 'softmax_topk'"):
        MoMSpec(hidden_size=8, mechanism=MoMSpec(hidden_size=8).router)


def test_unknown_names_are_answered_with_the_known():
    for kind in ("mechanism", "router"):
        with pytest.raises(ValidationError) as caught:
            MoMSpec(hidden_size=8, **{kind: "nothing_like_it"})
        assert all(name in str(caught.value) for name in registry().names(kind))


def test_fields_of_a_plugin_survive():
    """A rule and a router that came later are described, written and read like the others."""

    class OwnRuleSpec(HeadSpec):
        kind: Literal["own_rule"] = "own_rule"
        temperature: float = 1.0

    class OwnRule(Mechanism):
        Spec = OwnRuleSpec

    class OwnRouterSpec(RouterSpec):
        kind: Literal["own_router"] = "own_router"
        choices: tuple[int, ...] = (1, 2)

        def check(self, num_memories: int) -> None:
            if max(self.choices) >= num_memories:
                raise ValueError(f"router.choices = {self.choices} do not fit num_memories = {num_memories}")

    class OwnRouter(Router):
        Spec = OwnRouterSpec

    with temporarily(OwnRule, OwnRouter):
        spec = MoMSpec(
            hidden_size=8, mechanism={"kind": "own_rule", "temperature": 2}, router=OwnRouterSpec(choices=(0, 3))
        )
        assert spec.mechanism == OwnRuleSpec(temperature=2.0)
        assert MoMSpec.from_yaml(spec.to_yaml()) == spec
        assert MoMSpec.model_validate_json(spec.model_dump_json()) == spec
        schema = MoMSpec.model_json_schema()
        assert accepts(schema, json.loads(spec.model_dump_json()))
        with pytest.raises(ValidationError, match=re.escape("router.choices = (4,) do not fit num_memories = 4")):
            MoMSpec(hidden_size=8, router=OwnRouterSpec(choices=(4,)))
    assert not accepts(MoMSpec.model_json_schema(), json.loads(spec.model_dump_json()))
    with pytest.raises(ValidationError, match="own_rule"):
        MoMSpec(hidden_size=8, mechanism=OwnRuleSpec())


def test_schema_of_a_plugin_with_parts_of_its_own():
    """What its fields refer to can be found from the root of the whole schema."""

    class Gate(BaseModel):
        rank: int = 4

    class GatedRuleSpec(HeadSpec):
        kind: Literal["gated_rule"] = "gated_rule"
        gate: Gate = Gate()

    class GatedRule(Mechanism):
        Spec = GatedRuleSpec

    with temporarily(GatedRule):
        schema = MoMSpec.model_json_schema()
        spec = MoMSpec(hidden_size=8, mechanism=GatedRuleSpec(gate=Gate(rank=2)))
        assert MoMSpec.from_yaml(spec.to_yaml()) == spec
    for reference in re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(schema)):
        found = schema
        for step in reference.split("/"):
            assert step in found, reference
            found = found[step]


# hidden_size, fields, (H, K, V)
SIZES = [
    (1024, {}, (4, 256, 256)),
    (2048, {}, (8, 256, 256)),
    (1025, {}, (4, 256, 256)),
    (64, {}, (4, 16, 16)),
    (10, {}, (5, 2, 2)),
    (3, {}, (3, 1, 1)),
    (1, {}, (1, 1, 1)),
    (64, {"num_heads": 2}, (2, 32, 32)),
    (10, {"num_heads": 3}, (3, 3, 3)),
    (4, {"num_heads": 8}, (8, 1, 1)),
    (64, {"head_dim": 16}, (4, 16, 16)),
    (64, {"head_dim": 48}, (1, 48, 48)),
    (64, {"head_dim": 128}, (1, 128, 128)),
    (64, {"num_heads": 3, "head_dim": 5}, (3, 5, 5)),
    (64, {"num_heads": 2, "head_v_dim": 7}, (2, 32, 7)),
    (64, {"head_v_dim": 7}, (4, 16, 7)),
    (64, {"num_heads": 3, "head_dim": 5, "head_v_dim": 2}, (3, 5, 2)),
]


@pytest.mark.parametrize(("hidden_size", "fields", "expected"), SIZES)
def test_head_sizes_follow_from_hidden_size(hidden_size, fields, expected):
    for name in HEADS:
        spec = registry().find("mechanism", name).Spec
        try:
            sizes = spec(**fields).sizes(hidden_size)
        except ValidationError:  # a rule may want square states
            assert "head_v_dim" in fields, name
            continue
        assert tuple(sizes[axis] for axis in "HKV") == expected, name
        assert sizes["G"] == sizes["H"]


# a JSON Schema checker of what pydantic writes here, so that the schema is judged by something other than pydantic

TYPES: dict[str, Any] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
RULES: dict[str, Any] = {
    "type": lambda s, v: TYPES[s["type"]](v),
    "const": lambda s, v: v == s["const"],
    "enum": lambda s, v: v in s["enum"],
    "anyOf": lambda s, v: any(accepts(part, v) for part in s["anyOf"]),
    "minimum": lambda s, v: v >= s["minimum"],
    "maximum": lambda s, v: v <= s["maximum"],
    "exclusiveMinimum": lambda s, v: v > s["exclusiveMinimum"],
    "exclusiveMaximum": lambda s, v: v < s["exclusiveMaximum"],
    "required": lambda s, v: not isinstance(v, dict) or set(s["required"]) <= set(v),
    "properties": lambda s, v: (
        not isinstance(v, dict) or all(accepts(s["properties"][k], x) for k, x in v.items() if k in s["properties"])
    ),
    "additionalProperties": lambda s, v: s["additionalProperties"] or set(v) <= set(s["properties"]),
    "items": lambda s, v: all(accepts(s["items"], x) for x in v),
}
COMMENTS = {"title", "description", "default", "$defs"}  # definitions without references to them say nothing


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value fits; a keyword that this checker doesn't know fails the test."""
    assert set(schema) <= set(RULES) | COMMENTS, set(schema) - set(RULES) - COMMENTS
    return ("type" not in schema or TYPES[schema["type"]](value)) and all(
        rule(schema, value) for keyword, rule in RULES.items() if keyword in schema
    )


@every_part
def test_schema_accepts_what_specs_write(kind, name):
    schema = MoMSpec.model_json_schema()
    assert accepts(schema, json.loads(unusual(kind, name).model_dump_json()))
    assert accepts(schema, json.loads(MoMSpec(hidden_size=8, **{kind: name}).model_dump_json()))
    assert accepts(schema, {"hidden_size": 8, kind: name})
    assert accepts(schema, {"hidden_size": 8, kind: {"kind": name}})


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"hidden_size": 0},
        {"hidden_size": "wide"},
        {"hidden_size": 8, "heads": 2},
        {"hidden_size": 8, "num_memories": 0},
        {"hidden_size": 8, "num_memories": 1.5},
        {"hidden_size": 8, "conv_size": 0},
        {"hidden_size": 8, "norm_eps": 0},
        {"hidden_size": 8, "shared_memory": 2},
        {"hidden_size": 8, "schema_version": 2},
        {"hidden_size": 8, "mechanism": "nothing_like_it"},
        {"hidden_size": 8, "mechanism": "softmax_topk"},
        {"hidden_size": 8, "router": "gated_deltanet"},
        {"hidden_size": 8, "mechanism": {}},
        {"hidden_size": 8, "mechanism": {"num_heads": 2}},
        {"hidden_size": 8, "mechanism": {"kind": "gla", "heads": 2}},
        {"hidden_size": 8, "mechanism": {"kind": "gla", "num_heads": 0}},
        {"hidden_size": 8, "mechanism": {"kind": "gla", "allow_neg_eigval": True}},
        {"hidden_size": 8, "router": {"kind": "softmax_topk", "top_k": 0}},
        {"hidden_size": 8, "router": {"kind": "hash", "seed": -1}},
        {"hidden_size": 8, "mechanism": None},
    ],
    ids=str,
)
def test_schema_and_spec_refuse_the_same(value):
    assert not accepts(MoMSpec.model_json_schema(), value)
    with pytest.raises(ValidationError):
        MoMSpec.model_validate(value)


def test_schema_is_json_that_names_everything():
    schema = MoMSpec.model_json_schema()
    text = json.dumps(schema)
    assert "$ref" not in text
    assert all(f'"{name}"' in text for _, name in PARTS)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["hidden_size"]
