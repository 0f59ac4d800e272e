"""`momkit new mechanism NAME`: a complete, separately installable package for a rule of your own."""

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from momkit import __version__
from momkit.errors import InputError
from momkit.registry import registry

# the file of the new package, and the template it is written from
FILES = {
    "pyproject.toml": "pyproject.toml.tmpl",
    "README.md": "README.md.tmpl",
    "src/$module/__init__.py": "init.py.tmpl",
    "src/$module/$name.py": "mechanism.py.tmpl",
    "src/$module/py.typed": "",
    "tests/test_conformance.py": "test_conformance.py.tmpl",
}


def check_name(name: str) -> None:
    """Refuse a name that can't be a rule's, a file's and a package's, and one that is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(f"name = {name!r}; allowed: lower-case words joined by underscores, as in `my_rule`")
    if owner := registry().owners.get(("mechanism", name)):
        raise InputError(f"name = {name!r} is a mechanism of {owner}; allowed: one that is not registered")


def substitutions(name: str) -> dict[str, str]:
    """What the templates ask for."""
    return {
        "name": name,
        "module": f"momkit_{name}",
        "project": f"momkit-{name.replace('_', '-')}",
        "rule": "".join(word.capitalize() for word in name.split("_")) + "Rule",
        "momkit": __version__,
    }


def write_mechanism(name: str, folder: Path) -> list[Path]:
    """Write the package of a new rule into a folder that does not exist yet; returns its files."""
    check_name(name)
    if folder.exists():
        raise InputError(f"path = {str(folder)!r} exists; allowed: a folder that does not")
    words = substitutions(name)
    templates = resources.files("momkit.cli") / "templates"
    written = []
    for target, template in FILES.items():
        path = folder / Template(target).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (templates / template).read_text(encoding="utf-8") if template else ""
        path.write_text(Template(text).substitute(words), encoding="utf-8")
        written.append(path)
    return written


def mechanism(
    name: Annotated[str, typer.Argument(help="The rule's name, as in `my_rule`.")],
    path: Annotated[Path | None, typer.Option(help="The folder to write; left out, momkit-NAME here.")] = None,
) -> None:
    """Write a package with a working rule to change, its test and a README; the folder must not exist yet."""
    folder = path or Path(substitutions(name)["project"])
    for file in write_mechanism(name, folder):
        typer.echo(str(file))
    typer.echo(f"next: pip install --editable {folder}, then momkit show {name}")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(help="Write the package of a plugin.")
    group.callback()(lambda: None)  # without it a group of one command is that command
    group.command()(mechanism)
    app.add_typer(group, name="new")
