"""The README's Python blocks run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest

from momkit.registry import registry
from momkit.spec import MoMSpec

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {"__name__": "readme"}
    try:
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), namespace)
    finally:
        registry().withdraw("this program")
    assert "torch.Size([300, 4, 16]) torch.Size([3, 4, 16, 16])" in capsys.readouterr().out
    assert callable(namespace["test_conformance"])


def test_yaml_blocks_are_specs():
    for text in blocks("yaml"):
        MoMSpec.from_yaml(text).build()


def test_tables_name_what_is_built_in():
    table = README.split("## Rules")[1].split("Routers:")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == [
        name for name in registry().names("mechanism") if registry().owners["mechanism", name] == "momkit"
    ]
    routers = README.split("Routers:")[1].split("\n\n")[0]
    for name in registry().names("router"):
        if registry().owners["router", name] == "momkit":
            assert f"`{name}`" in routers
