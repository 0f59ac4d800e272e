"""What every plugin owes its readers and its files, be it a rule or a router."""

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from momkit.spec import MoMSpec
from momkit.testing.subjects import HIDDEN_SIZE


def assert_documented(cls: type) -> None:
    """The docstring has three paragraphs: one sentence, the equation, the paper."""
    paragraphs = re.split(r"\n\s*\n", (cls.__doc__ or "").strip())
    for part, text in zip(("sentence", "equation", "paper"), [*paragraphs, "", "", ""], strict=False):
        assert text, f"{cls.__name__}: the docstring has no {part}"
    assert "=" in paragraphs[1], f"{cls.__name__}: the docstring's second paragraph holds no equation"


def assert_round_trips(spec: BaseModel, part_of_block: dict[str, Any]) -> None:
    """A spec is the same after JSON or YAML, alone or inside a block's, and takes no unknown field."""
    kind = type(spec)
    again = kind.model_validate_json(spec.model_dump_json())
    assert again == spec, f"{spec!r} is {again!r} after JSON"
    whole = MoMSpec.model_validate({"hidden_size": HIDDEN_SIZE, **part_of_block})
    for back in (MoMSpec.model_validate_json(whole.model_dump_json()), MoMSpec.from_yaml(whole.to_yaml())):
        assert back == whole, f"{whole!r} is {back!r} after JSON or YAML"
    try:
        kind.model_validate(spec.model_dump() | {"no_such_field": 1})
    except ValidationError:
        return
    raise AssertionError(f"{kind.__name__} takes the unknown field no_such_field")
