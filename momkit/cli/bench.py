"""`momkit bench`: measure speed, side by side, and write the result with hardware and versions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from momkit.benchmarks import cpu, cuda, cuda_report, layer_report
from momkit.benchmarks import layer as whole_layer
from momkit.benchmarks.peers import PEERS, check_peer
from momkit.errors import InputError

SECTIONS = f"{', '.join(cuda.SECTIONS)}; with --layer: {', '.join(whole_layer.SECTIONS)}"
REPORTS: dict[str, Callable[[dict[str, Any]], str]] = {"cpu": cpu.markdown, "layer": layer_report.markdown}


def bench(
    device: Annotated[str, typer.Option(help="What to measure: cpu or cuda.")] = "cpu",
    peer: Annotated[str | None, typer.Option(help=f"On cuda, measure beside it: {', '.join(PEERS)}.")] = None,
    family: Annotated[str, typer.Option(help=f"On cuda, which kernels: {', '.join(cuda.CASES)} or all.")] = "all",
    layer: Annotated[bool, typer.Option("--layer", help="On cuda, measure a whole MoM block instead.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"On cuda, a section: {SECTIONS}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write NAME.json and NAME.md to.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Calls of each candidate: 7 on cpu, 30 on cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Time the chunked form and blocks on a CPU, fused kernels or a block on a GPU; exit code 1 if results disagree."""
    try:
        if device == "cpu":
            if peer is not None or only or family != "all":
                raise InputError("--peer, --family and --only belong to --device cuda")
            if layer:
                raise InputError("--layer belongs to --device cuda")
            documents = {"cpu": bench_cpu(out, rounds or 7)}
        elif device == "cuda":
            if layer and family != "all":
                raise InputError("--family chooses kernels; it does not go with --layer")
            if layer:
                documents = {"layer": bench_layer(peer, only or [], out, rounds or 30)}
            else:
                documents = bench_cuda(peer, family, only or [], out, rounds or 30)
        else:
            raise InputError(f"device = {device!r}; allowed: cpu, cuda")
    except ArithmeticError as fault:
        typer.echo(f"momkit: {fault}", err=True)
        raise typer.Exit(1) from fault
    if as_json:
        typer.echo(json.dumps(documents.get(device, documents)))
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        for name, result in documents.items():
            Console().print(Markdown(REPORTS.get(name, cuda_report.markdown)(result)))


def bench_cpu(out: Path | None, rounds: int) -> dict[str, Any]:
    result = cpu.measure(rounds)
    result["bars"] = cpu.bars(result)
    write(out, "cpu", result, cpu.markdown(result))
    return result


def bench_cuda(peer: str | None, family: str, only: list[str], out: Path | None, rounds: int) -> dict[str, Any]:
    """Measure each family; what is measured is written after each section."""
    if peer is not None:
        check_peer(peer)
    families = list(cuda.CASES) if family == "all" else [family]
    wanted = [name for name in families if cuda.sections_of(name, only)]
    if not wanted:
        raise InputError(f"family = {family!r} has no section {', '.join(only)}")
    cuda.check_cuda()
    documents: dict[str, Any] = {}
    for name in wanted:
        # no peer's decoding is measured
        options = cuda.Options(rounds, peer if name != "decode" else None)
        for result in cuda.measure(name, only, options, lambda line: typer.echo(line, err=True)):
            result["bars"] = cuda_report.bars(result)
            write(out, f"cuda_{name}", result, cuda_report.markdown(result))
            documents[name] = result
    return documents


def bench_layer(peer: str | None, only: list[str], out: Path | None, rounds: int) -> dict[str, Any]:
    """Measure a whole block; what is measured is written after each section."""
    if peer is not None:
        check_peer(peer)
    whole_layer.sections_of(only)
    document: dict[str, Any] = {}
    for document in whole_layer.measure(only, cuda.Options(rounds, peer), lambda line: typer.echo(line, err=True)):
        document["bars"] = layer_report.bars(document)
        write(out, "cuda_layer", document, layer_report.markdown(document))
    return document


def write(out: Path | None, name: str, result: dict[str, Any], text: str) -> None:
    """A result as JSON and as Markdown, if there is a folder to write to."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(text, encoding="utf-8")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(bench)
