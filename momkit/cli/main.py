"""The `momkit` command: one module a group of commands, each with `add_to(app)`."""

import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from momkit import __version__
from momkit.cli.console import Commands
from momkit.registry import registry

MODULES = ("info", "new", "check", "train", "bench", "tune")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"momkit {__version__}")
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture-of-Memories sequence layers from pluggable update rules and routers."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit
    # a plugin that prints while it is imported must not spoil the one document that --json promises; a fault of the
    # built-ins rises again, in the command that needs them
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception):
        registry()


def make_app(modules: Sequence[str] = MODULES) -> typer.Typer:
    """The command with the groups in `modules`."""
    app = typer.Typer(
        cls=Commands,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(root)
    for module in modules:
        importlib.import_module(f"momkit.cli.{module}").add_to(app)
    return app


def main() -> None:
    """The entry point of `momkit` and `python -m momkit`."""
    make_app()(prog_name="momkit")
