"""Commands that train and use models: train, generate, demo."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from momkit.cli.console import JsonFlag, emit, print_table, stdout
from momkit.training.config import load_config
from momkit.training.demo import run_demo
from momkit.training.demo_report import findings, table
from momkit.training.demo_result import load_demo
from momkit.training.folder import RunFolder
from momkit.training.generate import Codec
from momkit.training.generate import generate as generate_tokens
from momkit.training.loop import TrainResult
from momkit.training.loop import train as train_run
from momkit.training.plots import require_matplotlib
from momkit.training.progress import describe, show_progress
from momkit.training.report import draw_run
from momkit.training.trainer import DivergedError

INTERRUPTED = 130


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(train)
    app.command()(generate)
    app.command()(demo)


def train(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of a TrainConfig, as those in examples/.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME of the config if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in that folder stopped.")] = False,
    steps: Annotated[int | None, typer.Option(help="In place of the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the config's.")] = None,
    device: Annotated[str | None, typer.Option(help="In place of the config's.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG plots at the end.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Train a small language model; Ctrl-C saves and exits, with code 130."""
    if plots:
        require_matplotlib()
    given: dict[str, Any] = {"steps": steps, "seed": seed, "device": device}
    run = load_config(config, **{name: value for name, value in given.items() if value is not None})
    path = out or Path("runs") / config.stem
    with show_progress(Console(stderr=True), config.stem, run.steps) as on_record:
        try:
            result = train_run(run, path, resume=resume, on_record=on_record)
        except DivergedError as fault:
            typer.echo(f"momkit: {fault}", err=True)
            raise typer.Exit(1) from None
    drawn = draw_run(RunFolder(path)) if plots and not result.interrupted else []
    if as_json:
        emit(result.as_record() | {"plots": [str(p) for p in drawn]})
    else:
        tell(result, drawn)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def tell(result: TrainResult, drawn: list[Path]) -> None:
    """The end of a run, for people."""
    console = stdout()
    if result.interrupted:
        console.print(f"interrupted; step {result.step} is saved in {result.folder}, go on with --resume")
        return
    if result.evaluation is not None:
        console.print(f"step {result.step}: {describe(result.evaluation)}")
    names = ", ".join(["config.yaml", "checkpoint.safetensors", "log.jsonl", *(p.name for p in drawn)])
    console.print(f"{result.folder}: {names}")


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[str, typer.Option(help="Text; for tasks other than bytes, numbers of tokens.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Stream text from a trained model, in constant memory."""
    checkpoint = RunFolder(run).load()
    model = checkpoint.build(device)
    codec = Codec(checkpoint.config.task.kind)
    tokens: list[int] = []
    start, text = time.perf_counter(), prompt
    stream = generate_tokens(model, codec.encode(prompt), max_tokens, temperature=temperature, top_k=top_k, seed=seed)
    for token in stream:
        if not tokens and not as_json:
            sys.stdout.write(prompt)
        tokens.append(token)
        piece = codec.decode(token)
        text += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        seconds = time.perf_counter() - start
        speed = len(tokens) / seconds
        emit({"run": str(run), "step": checkpoint.step, "text": text, "tokens": tokens, "tokens_per_second": speed})
    else:
        sys.stdout.write("\n")


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the report; the first free of runs/demo, -2, ...")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each of the three models.")] = 1,
    config: Annotated[Path | None, typer.Option(help="YAML file in place of the demo's own numbers.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train one memory, one large memory and MoM on recall, then a language model of bytes; write one report."""
    settings = load_demo(config)
    path = out or free_folder(Path("runs/demo"))
    console = Console(stderr=True)
    try:
        result = run_demo(settings, path, seeds, lambda title, steps: show_progress(console, title, steps))
    except DivergedError as fault:
        typer.echo(f"momkit: {fault}", err=True)
        raise typer.Exit(1) from None
    if result is None:
        raise typer.Exit(INTERRUPTED)
    if as_json:
        emit(result.as_record())
        return
    report = stdout()
    head, rows = table(result)
    print_table(report, "recall of held-out sequences by number of pairs", head, rows)
    for line in findings(result):
        report.print(line)
    report.print(f"\nbytes: {result.text.bits_per_byte:.3f} bits a byte held out; a sample:\n\n{result.text.sample}\n")
    report.print(f"report: {path / 'report.md'}")


def free_folder(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that is not there."""
    number = 1
    while (candidate := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
