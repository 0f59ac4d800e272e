"""What the demo shows: a table, what it says in words, pictures, and one report of all of it."""

import math
from collections.abc import Iterator
from pathlib import Path

from momkit.training.demo_result import LABELS, DemoConfig, DemoResult
from momkit.training.folder import RunFolder
from momkit.training.plots import plot_learning, plot_load, plot_recall
from momkit.training.report import draw_memories


def draw(config: DemoConfig, demo: DemoResult, out: Path) -> None:
    """The pictures of the report."""
    plot_recall({label: [run.by_group for run in demo.of(name)] for name, label in LABELS.items()}, out / "recall.png")
    plot_learning({label: [run.curve for run in demo.of(name)] for name, label in LABELS.items()}, out / "learning.png")
    mom = RunFolder(out / f"mom-{config.recall.seed}")
    plot_load(mom.records(), out / "load.png")
    for folder, name in ((mom, "memories.png"), (RunFolder(out / "text"), "memories-text.png")):
        checkpoint = folder.load()
        draw_memories(checkpoint.build(), checkpoint.config.make_task(), out / name)


def table(demo: DemoResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the comparison; several seeds give mean ± standard deviation."""
    groups = sorted(demo.recall[0].by_group)
    head = ["model", *(f"{g} pairs" for g in groups), "parameters", "state bytes", "active", "tokens/s"]
    rows = []
    for name, label in LABELS.items():
        runs = demo.of(name)
        one = runs[0]
        recall = [spread([run.by_group[g] for run in runs]) for g in groups]
        sizes = [f"{n:,}" for n in (one.parameters, one.state_bytes_total, one.state_bytes_active)]
        rows.append([label, *recall, *sizes, f"{sum(run.tokens_per_second for run in runs) / len(runs):,.0f}"])
    return head, rows


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.3f}"


def findings(demo: DemoResult) -> Iterator[str]:
    """What the numbers say, whatever that is."""
    mom = {run.seed: run.accuracy for run in demo.of("mom")}
    for name in ("one_memory", "wide_memory"):
        gaps = [mom[run.seed] - run.accuracy for run in demo.of(name)]
        better = sum(gap > 0 for gap in gaps)
        yield (
            f"MoM minus {LABELS[name]}: {spread(gaps)} recall over all numbers of pairs; "
            f"MoM is ahead in {better} of {len(gaps)} {'run' if len(gaps) == 1 else 'runs'}."
        )


def report(config: DemoConfig, demo: DemoResult) -> Iterator[str]:
    """The report, in Markdown, line by line."""
    head, rows = table(demo)
    recall, text = config.recall, demo.text
    seeds = len(demo.of("mom"))
    yield from ("# What several memories buy", "")
    yield (
        f"Multi-query associative recall, rule `{config.mom.mechanism.kind}`, {recall.model.num_layers} layers of "
        f"width {recall.model.hidden_size}, {recall.steps} steps of {recall.batch_size * recall.accumulation} "
        f"sequences, {seeds} {'seed' if seeds == 1 else 'seeds'}; all three models saw the same data in the same order."
    )
    yield from ("", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield from ("", *findings(demo), "")
    one, wide, mom = (demo.of(name)[0] for name in LABELS)
    yield (
        "State bytes are those of the memories of all layers for one sequence, active those that one token touches. "
        f"The histories of the short convolutions come on top: {one.conv_bytes:,}, {wide.conv_bytes:,} and "
        f"{mom.conv_bytes:,} bytes. Parameters differ too: each memory has projections of its own."
    )
    for title, picture in (
        ("Recall against the number of pairs", "recall.png"),
        ("Learning curves", "learning.png"),
        ("Load of each memory of MoM over training", "load.png"),
        ("Memories that each token of a held-out sequence goes to", "memories.png"),
    ):
        yield from ("", f"## {title}", "", f"![{title}]({picture})")
    yield from ("", "## A language model of bytes", "")
    yield (
        f"{text.parameters:,} parameters, {config.text.steps} steps on {text.data.get('files', 0)} files of "
        f"{text.data.get('bytes', 0):,} bytes (sha256 {text.data.get('sha256', 'unknown')}): "
        f"{text.bits_per_byte:.3f} bits a byte held out, {text.tokens_per_second:,.0f} tokens/s, "
        f"{text.state_bytes:,} bytes of state while it writes. A sample:"
    )
    yield from ("", *(f"    {line}" for line in text.sample.splitlines()), "")
    yield from ("![Memories that each byte goes to](memories-text.png)", "")
    yield (
        f"Measured in {demo.seconds:.0f} s on {demo.hardware['cpu']}, {demo.hardware['cores']} cores, "
        f"{demo.hardware['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in demo.versions.items())
        + ". The numbers of every run are in `results.json`, the settings in `demo.yaml`."
    )
