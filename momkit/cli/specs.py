"""`momkit schema` and `momkit validate`: what a spec file may say, and whether a file says it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from momkit.cli.console import USER_FAULTS, JsonFlag, emit, one_line
from momkit.errors import InputError
from momkit.models.spec import LMSpec
from momkit.spec import MoMSpec, SpecFile
from momkit.training.config import TrainConfig

Kind = Literal["mom", "lm", "train"]
SPECS: dict[str, type[SpecFile]] = {"mom": MoMSpec, "lm": LMSpec, "train": TrainConfig}


def schema(
    kind: Annotated[Kind, typer.Argument(help="mom: a block, lm: a language model, train: a run.")] = "mom",
) -> None:
    """Print the JSON Schema of a spec file, with every registered rule and router in it."""
    emit(SPECS[kind].model_json_schema())


def read_spec(path: Path, kind: str | None = None) -> SpecFile:
    """The spec in a YAML or JSON file; without a kind, a file with `task` is a run, one with `block` a model."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise InputError(f"{path}: it is no UTF-8 text") from fault
    return SPECS[kind or guess_kind(text)].from_yaml(text)


def guess_kind(text: str) -> str:
    """Which spec a text describes, by its top-level keys."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return "mom"  # reading it as any kind says what is wrong
    keys = set(data) if isinstance(data, dict) else set()
    return "train" if keys & {"task", "model"} else "lm" if keys & {"block", "vocab_size"} else "mom"


def verdict(path: Path, kind: str | None) -> dict[str, Any]:
    """One file's line in the report."""
    try:
        spec = read_spec(path, kind)
    except USER_FAULTS as fault:
        return {"path": str(path), "ok": False, "kind": kind, "error": one_line(fault)}
    found = next(name for name, cls in SPECS.items() if type(spec) is cls)
    return {"path": str(path), "ok": True, "kind": found, "error": None}


def validate(
    paths: Annotated[list[Path], typer.Argument(metavar="SPEC.yaml...", help="Files to check.")],
    kind: Annotated[Kind | None, typer.Option(help="What they describe; left out, their keys tell.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check spec files: names that are registered, fields that exist, values that fit; exit code 2 if one does not."""
    verdicts = [verdict(path, kind) for path in paths]
    ok = all(found["ok"] for found in verdicts)
    if as_json:
        emit({"ok": ok, "files": verdicts})
    for found in verdicts:
        if not found["ok"]:
            typer.echo(f"momkit: {found['path']}: {found['error'].removeprefix(found['path'] + ': ')}", err=True)
        elif not as_json:
            typer.echo(f"{found['path']}: ok ({found['kind']})")
    raise typer.Exit(0 if ok else 2)
