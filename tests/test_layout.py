"""The house keeps its shape: arrows between packages point down, triton stays in kernels, importing momkit is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import momkit

ROOT = Path(momkit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# a module may import what stands in a lower line, or in its own package
LAYERS = [
    ("errors", "hookspecs", "precision"),
    ("kernels",),
    ("ops",),
    ("mechanisms", "routing", "tasks"),
    ("plugins",),
    ("registry", "checks"),
    ("scan", "state"),
    ("decode",),
    ("spec",),
    ("tokens", "projection"),
    ("block",),
    ("accounting", "models"),
    ("training", "benchmarks"),
    ("testing",),
    ("cli",),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LAZY = {("spec", "block")}  # a spec builds its owner
ENTRY = {"__init__", "__main__"}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            if node.module == "momkit":
                found |= {f"momkit.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: Path):
    mine = part(path)
    if mine in ENTRY:
        return
    assert mine in RANK, f"{mine} has no place in LAYERS"
    for name in imports(ast.parse(path.read_text())):
        if not name.startswith("momkit."):
            continue
        other = name.split(".")[1]
        if other == mine or (mine, other) in LAZY or other not in RANK:
            continue
        assert RANK[other] < RANK[mine], f"{mine} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_kernels_import_triton(path: Path):
    names = imports(ast.parse(path.read_text()))
    if part(path) != "kernels":
        assert not any(name.split(".")[0] == "triton" for name in names)
    else:
        assert not any(name.startswith(("momkit.mechanisms", "momkit.routing")) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path):
    assert len(path.read_text().splitlines()) <= 450


def test_import_is_light():
    heavy = ["triton", "transformers", "matplotlib", "hypothesis", "pytest", "typer", "rich"]
    code = (
        "import sys, momkit, torch\n"
        f"print([m for m in {heavy} if m in sys.modules and not m.startswith('torch')])\n"
        "print(torch.cuda.is_initialized())"
    )
    # torch itself may import triton; what counts is what momkit adds
    base = subprocess.run(
        [sys.executable, "-c", f"import sys, torch; print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [base.stdout.strip(), "False"]


def test_public_names():
    assert sorted(momkit.__all__) == momkit.__all__
    assert callable(momkit.scan)
    assert all(hasattr(momkit, name) for name in momkit.__all__)
