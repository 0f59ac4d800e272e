"""`momkit new`: the package it writes installs, and its rule works."""

import json
import subprocess
import sys

import pytest
import torch

from momkit import MoMSpec
from momkit.registry import temporarily

FILES = [
    "README.md",
    "pyproject.toml",
    "src/momkit_slow_fade/__init__.py",
    "src/momkit_slow_fade/py.typed",
    "src/momkit_slow_fade/slow_fade.py",
    "tests/test_conformance.py",
]


def install(package, target):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(target), str(package)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_installs_and_its_rule_is_listed(momkit, shell, tmp_path):
    package, target = tmp_path / "package", tmp_path / "target"
    result = momkit("new", "mechanism", "slow_fade", "--path", package)
    assert result.exit_code == 0, result.output
    assert sorted(str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()) == FILES
    assert not any("$" in (package / name).read_text() for name in FILES)
    test_lines = [line for line in (package / FILES[-1]).read_text().splitlines() if line and "import" not in line]
    assert len(test_lines) == 3

    install(package, target)
    listed = json.loads(shell("list", "--json", path=(target,)).stdout)
    row = next(row for row in listed["mechanisms"] if row["name"] == "slow_fade")
    assert row["owner"] == "slow_fade"
    assert listed["broken_plugins"] == []


@pytest.mark.parametrize("name", ["mechanism", "head_spec", "tensor", "state", "none_at_all", "x", "a1_2"])
def test_any_legal_name_makes_python(momkit, tmp_path, name):
    assert momkit("new", "mechanism", name, "--path", tmp_path / "p").exit_code == 0
    source = (tmp_path / "p" / "src" / f"momkit_{name}" / f"{name}.py").read_text()
    scope: dict = {"__name__": f"test_new_{name}"}
    exec(compile(source, name, "exec"), scope)
    rule = next(value for key, value in scope.items() if key.endswith("Rule"))
    assert rule.name == name
    with temporarily(rule):
        block = MoMSpec(hidden_size=8, mechanism=name).build()
        x = torch.randn(1, 5, 8)
        first = block(x[:, :3])
        second = block(x[:, 3:], first.state)
        torch.testing.assert_close(torch.cat([first.hidden_states, second.hidden_states], 1), block(x).hidden_states)


@pytest.mark.parametrize(
    "name", ["MyRule", "my-rule", "1st", "_x", "x_", "a__b", "", "my rule", "../up", "class", "naïve", "lambda"]
)
def test_an_illegal_name_is_refused(momkit, tmp_path, name):
    result = momkit("new", "mechanism", name, "--path", tmp_path / "p")
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "lower-case words" in result.stderr
    assert not (tmp_path / "p").exists()


def test_a_registered_name_is_refused(momkit, tmp_path):
    result = momkit("new", "mechanism", "gla", "--path", tmp_path / "p")
    assert result.exit_code == 2 and "is a mechanism of momkit" in result.stderr
    assert not (tmp_path / "p").exists()


def test_an_existing_folder_is_refused_and_left_alone(momkit, tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").write_text("mine")
    result = momkit("new", "mechanism", "my_rule", "--path", tmp_path / "p")
    assert result.exit_code == 2 and "exists" in result.stderr
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["mine"]
    monkeypatch.chdir(tmp_path)
    assert momkit("new", "mechanism", "my_rule").exit_code == 0
    assert (tmp_path / "momkit-my-rule" / "pyproject.toml").exists()
    assert momkit("new", "mechanism", "my_rule").exit_code == 2
