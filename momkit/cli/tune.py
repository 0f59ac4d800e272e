"""`momkit tune`: measure launch settings of the fused kernels on this machine's GPU and write their table."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from momkit.benchmarks import tune as tuner
from momkit.benchmarks.cuda import check_cuda
from momkit.cli.console import JsonFlag, emit, print_table, stdout
from momkit.errors import InputError
from momkit.kernels import tuning

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tuner.DTYPES.values()}


def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="A kernel of the table; all if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(DTYPES)}; both if left out.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help=f"A size class: {', '.join(tuner.HEADS)}; all if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the table to, as momkit/kernels/tuning.json.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each candidate.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """Measure launch settings of the fused kernels on this GPU; exit code 1 if a candidate gives wrong results."""
    table = tuning.table()
    known = list(dict.fromkeys(name for kernels in table.values() for name in kernels))
    for option, given, allowed in (("kernel", kernel, known), ("dtype", dtype, DTYPES), ("size", size, tuner.HEADS)):
        if unknown := [value for value in given or () if value not in allowed]:
            raise InputError(f"{option} = {unknown[0]!r}; allowed: {', '.join(allowed)}")
    check_cuda()
    gpu = tuning.gpu_class(torch.device("cuda", torch.cuda.current_device()))
    wanted = tuner.entries(gpu, table, kernel or [], [DTYPES[name] for name in dtype or ()], size or [])
    tuned, reports = tuner.tune(wanted, table, rounds, lambda line: typer.echo(line, err=True))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(tuner.text_of(tuned), encoding="utf-8")
    if as_json:
        emit({"gpu": gpu, "hardware": torch.cuda.get_device_name(), "entries": reports, "table": tuned[gpu]})
    else:
        print_reports(reports)
    if any("wrong" in candidate for report in reports for candidate in report["candidates"]):
        raise typer.Exit(1)


def print_reports(reports: list[dict[str, Any]]) -> None:
    """Every candidate of every entry, the chosen one marked."""
    for report in reports:
        title = f"{report['kernel']}, {report['bytes']} bytes, size {report['size']} ({report['measured_on']})"
        columns = ("block, num_warps, num_stages", "forward, ms", "forward and backward, ms", "")
        print_table(stdout(), title, columns, [candidate_row(report, row) for row in report["candidates"]])


def candidate_row(report: dict[str, Any], candidate: dict[str, Any]) -> tuple[str, str, str, str]:
    """One candidate: its times, or what is wrong with it."""
    config = json.dumps(candidate["config"])
    if fault := candidate.get("wrong") or candidate.get("failed"):
        return config, "", "", " ".join(fault.split())[:200]
    marks = [name for name in ("was", "chosen") if candidate["config"] == report[name]]
    times = [f"{candidate[name] * 1e3:.3f}" for name in ("forward", "forward_backward")]
    return config, times[0], times[1], ", ".join(marks)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(tune)
