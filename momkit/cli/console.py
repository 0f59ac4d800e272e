"""What commands share: how they print, and how a user's mistake ends them: one line on stderr, exit code 2."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from momkit.errors import BackendError, CheckpointError, InputError, UnknownNameError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

# a wrong option or argument; the class has no public name, its child BadParameter has one
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

USER_FAULTS: tuple[type[Exception], ...] = (
    UsageError,
    InputError,
    UnknownNameError,
    BackendError,
    CheckpointError,
    ValidationError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class Commands(TyperGroup):
    """A group of commands in which a user's fault is one line on stderr and exit code 2, never a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except USER_FAULTS as fault:
            typer.echo(f"momkit: {one_line(fault)}", err=True)
            sys.exit(2)
        except typer.Abort:
            typer.echo("momkit: aborted", err=True)
            sys.exit(1)
        sys.exit(code or 0)


def one_line(fault: Exception) -> str:
    """What a user should read of an error."""
    if isinstance(fault, ValidationError):
        return "; ".join(field_fault(error) for error in fault.errors())
    if isinstance(fault, OSError) and fault.filename is not None:
        return f"{fault.filename}: {fault.strerror}"
    if isinstance(fault, UsageError):
        return squeeze(fault.format_message())  # type: ignore[attr-defined]
    return squeeze(str(fault))


def field_fault(error: Any) -> str:
    """One refused field: its name, its value where that is short, and what is allowed."""
    field = ".".join(str(part) for part in error["loc"])
    reason = squeeze(error["msg"].removeprefix("Value error, "))
    if not field:
        return reason
    given = repr(error["input"])
    return f"{field} = {given}: {reason}" if len(given) <= 60 and error["type"] != "missing" else f"{field}: {reason}"


def squeeze(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def emit(document: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def stdout() -> Console:
    """Where a report for people goes; nothing in it is read as markup, since shapes stand in brackets."""
    return Console(markup=False, highlight=False)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A titled table and an empty line; the first column is never broken."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold")
    console.print(table, "")
