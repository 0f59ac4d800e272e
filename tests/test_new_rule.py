"""docs/new-rule.md runs as it stands: its package is written and installed, its commands are called, in order."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "new-rule.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
RULE, TEST, AFFINE = (text for language, text in BLOCKS if language == "python")
NEW, INSTALL, *COMMANDS = (line for language, text in BLOCKS if language == "sh" for line in text.splitlines())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the examples, and the package of the page, installed in `site`."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "examples", folder / "examples")
    run(folder, NEW)
    package = folder / INSTALL.split()[-1]
    (package / "src" / "momkit_huber_delta" / "huber_delta.py").write_text(RULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", package], check=True, capture_output=True)
    return folder


def run(folder: Path, command: str) -> str:
    """A command of the page, in a process of its own; what it printed."""
    program, *words = command.split()
    assert program == "momkit"
    inherited = {name: value for name, value in os.environ.items() if name != "MOMKIT_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-m", "momkit", *words],
        env=inherited | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_holds_the_test_of_the_page(place):
    written = (place / "momkit-huber-delta" / "tests" / "test_conformance.py").read_text()
    assert written.split() == TEST.split()


def test_the_rule_passes_its_checks(place):
    assert COMMANDS[0] == "momkit check huber_delta"
    assert " 0 failed" in run(place, COMMANDS[0] + " --profile ci")


def test_it_is_shown(place):
    text = run(place, COMMANDS[1])
    assert "h(x) = x / sqrt(1 + (x / limit)^2)" in text and "step: not affine in its states" in text
    kernel = run(place, COMMANDS[2])
    assert "tl.sqrt" in kernel
    compile(kernel, "generated", "exec")


def test_it_trains(place):
    (command,) = COMMANDS[3:]
    assert "step 20: loss" in run(place, command + " --steps 20 --out run")


@pytest.mark.slow
def test_it_learns(place):
    accuracy = re.search(r"accuracy (0\.\d+)", run(place, COMMANDS[3]))
    assert float(accuracy[1]) > 0.5


def test_its_affine_relative_is_inferred():
    namespace: dict[str, object] = {"__name__": "tutorial"}
    exec(compile(RULE + AFFINE, "new-rule.md", "exec"), namespace)


def test_the_class_is_as_short_as_the_page_says():
    assert "about 30 lines" in PAGE
    assert len([line for line in RULE.splitlines() if line.strip()]) <= 32
