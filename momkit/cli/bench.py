"""`momkit bench`: measure speed, side by side, and write the result with hardware and versions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from momkit.benchmarks import cpu
from momkit.errors import InputError


def bench(
    device: Annotated[str, typer.Option(help="what to measure: cpu")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="folder to write DEVICE.json and DEVICE.md to")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="calls of each candidate")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Time the chunked form against its rivals, and a MoM block against one memory."""
    if device != "cpu":
        raise InputError(f"device = {device!r}; allowed: cpu")
    result = cpu.measure(rounds)
    result["bars"] = cpu.bars(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{device}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / f"{device}.md").write_text(cpu.markdown(result), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(cpu.markdown(result)))


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(bench)
