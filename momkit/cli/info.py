"""Commands that report and change nothing: doctor, list, show, schema, validate."""

import typer

from momkit.cli.catalog import list_command
from momkit.cli.doctor import doctor
from momkit.cli.show import show
from momkit.cli.specs import schema, validate


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(doctor)
    app.command("list")(list_command)
    app.command()(show)
    app.command()(schema)
    app.command()(validate)
