"""The demo: what several memories buy on associative recall, measured; then a small language model of bytes.

Every number is in `demo.yaml`, or in the file given in its place.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from momkit.errors import InputError
from momkit.models.lm import MoMLM
from momkit.spec import MoMSpec, SpecFile
from momkit.training.checkpoint import versions
from momkit.training.config import TrainConfig
from momkit.training.folder import Record, RunFolder
from momkit.training.generate import Codec, generate
from momkit.training.loop import TrainResult, train
from momkit.training.plots import plot_learning, plot_load, plot_recall, require_matplotlib
from momkit.training.report import draw_memories

LABELS = {"one_memory": "one memory", "wide_memory": "one memory, as large as MoM", "mom": "MoM"}
Progress = Callable[[str, int], AbstractContextManager[Callable[[Record], None]]]


class Sample(SpecFile):
    """What is generated from the text model."""

    prompt: str = Field(min_length=1)
    max_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt


class DemoConfig(SpecFile):
    """The three blocks, what they all share, and the text model; the blocks' hidden_size is that of `recall`."""

    recall: TrainConfig
    one_memory: MoMSpec
    wide_memory: MoMSpec
    mom: MoMSpec
    text: TrainConfig
    sample: Sample

    @model_validator(mode="before")
    @classmethod
    def _size_blocks(cls, data: Any) -> Any:
        size = data["recall"]["model"]["hidden_size"]
        return data | {name: {"hidden_size": size} | data[name] for name in LABELS}

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = {getattr(self, name).mechanism.kind for name in LABELS}
        if len(kinds) > 1:
            raise ValueError(f"mechanism: {sorted(kinds)}; allowed: one rule in all three")
        wide, mom = recurrent_bytes(self.wide_memory), recurrent_bytes(self.mom)
        if wide != mom:
            raise ValueError(f"wide_memory has {wide} bytes of state a layer; allowed: {mom}, as mom")
        return self

    def run(self, name: str, seed: int) -> TrainConfig:
        """The training run of one of the three."""
        shared = self.recall.model_dump()
        model = shared["model"] | {"block": getattr(self, name)}
        return TrainConfig.model_validate(shared | {"model": model, "seed": seed})


@dataclass(frozen=True)
class RecallRun:
    """One trained model of the comparison. State bytes are those of all memories, and of those one token touches."""

    model: str
    seed: int
    accuracy: float
    by_group: dict[int, float]
    curve: dict[int, float]
    parameters: int
    state_bytes_total: int
    state_bytes_active: int
    conv_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class TextRun:
    """The text model: held-out bits a byte, and what it writes."""

    bits_per_byte: float
    parameters: int
    state_bytes: int
    tokens_per_second: float
    data: dict[str, str | int]
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured, and on what."""

    recall: list[RecallRun]
    text: TextRun
    seconds: float
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def as_record(self) -> Record:
        return asdict(self)

    def of(self, name: str) -> list[RecallRun]:
        return [run for run in self.recall if run.model == name]


def load_demo(path: Path | None = None) -> DemoConfig:
    """The demo's own numbers, or those of a file."""
    path = path or Path(__file__).with_name("demo.yaml")
    try:
        return DemoConfig.from_yaml(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError) as fault:
        raise InputError(f"{path} is no demo config: {fault}") from fault


def run_demo(config: DemoConfig, out: Path, seeds: int, progress: Progress) -> DemoResult | None:
    """Train everything into folders below `out`, write the report; None when interrupted."""
    require_matplotlib()
    if out.exists():
        raise InputError(f"{out} exists already and is left as it is; name another folder")
    start = time.perf_counter()
    out.mkdir(parents=True)
    (out / "demo.yaml").write_text(config.to_yaml(), encoding="utf-8")
    recall: list[RecallRun] = []
    for seed in range(config.recall.seed, config.recall.seed + seeds):
        for name, label in LABELS.items():
            folder = RunFolder(out / f"{name}-{seed}")
            result = train_shown(config.run(name, seed), folder, f"{label}, seed {seed}", progress)
            if result.interrupted:
                return None
            recall.append(measure_recall(name, seed, folder, result))
    text_folder = RunFolder(out / "text")
    result = train_shown(config.text, text_folder, "bytes", progress)
    if result.interrupted:
        return None
    text = measure_text(config, text_folder, result)
    demo = DemoResult(recall, text, time.perf_counter() - start, hardware(), versions())
    (out / "results.json").write_text(json.dumps(demo.as_record(), indent=2) + "\n", encoding="utf-8")
    draw(config, demo, out)
    (out / "report.md").write_text("\n".join(report(config, demo)) + "\n", encoding="utf-8")
    return demo


def train_shown(config: TrainConfig, folder: RunFolder, title: str, progress: Progress) -> TrainResult:
    with progress(title, config.steps) as on_record:
        return train(config, folder.path, on_record=on_record)


def measure_recall(name: str, seed: int, folder: RunFolder, result: TrainResult) -> RecallRun:
    model = folder.load().build()
    evaluations = folder.records("eval")
    total, active, conv = state_bytes(model)
    return RecallRun(
        model=name,
        seed=seed,
        accuracy=evaluations[-1]["accuracy"],
        by_group={int(group): accuracy for group, accuracy in evaluations[-1]["by_group"].items()},
        curve={record["step"]: record["accuracy"] for record in evaluations},
        parameters=result.parameters,
        state_bytes_total=total,
        state_bytes_active=active,
        conv_bytes=conv,
        tokens_per_second=result.tokens_per_second,
    )


def measure_text(config: DemoConfig, folder: RunFolder, result: TrainResult) -> TextRun:
    model = folder.load().build()
    opening, last = folder.records("run")[0], folder.records("eval")[-1]
    codec, sample = Codec(config.text.task.kind), config.sample
    tokens = generate(
        model, codec.encode(sample.prompt), sample.max_tokens, temperature=sample.temperature, top_k=sample.top_k
    )
    return TextRun(
        bits_per_byte=last["loss"] / math.log(2),
        parameters=result.parameters,
        state_bytes=opening["state_bytes"],
        tokens_per_second=result.tokens_per_second,
        data=opening["data"],
        sample=sample.prompt + "".join(codec.decode(token) for token in tokens),
    )


def recurrent_bytes(spec: MoMSpec) -> int:
    """Bytes of one block's memories."""
    with torch.random.fork_rng(devices=[]):
        state = spec.build().initial_state(1)
    return sum(tensor.nbytes for tensor in state.recurrent.values())


def state_bytes(model: MoMLM) -> tuple[int, int, int]:
    """Bytes of all memories, of those that one token touches, and of the short convolutions' histories."""
    total, active, conv = 0, 0, 0
    for block in (block for block in model.blocks() if block is not None):
        state = block.initial_state(1)
        here = sum(tensor.nbytes for tensor in state.recurrent.values())
        touched = min(block.num_groups, block.router.slots + block.spec.shared_memory)
        total, active = total + here, active + here * touched // block.num_groups
        conv += sum(tensor.nbytes for tensor in state.conv.values())
    return total, active, conv


def hardware() -> dict[str, str | int]:
    """The processor, and how much of it torch may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"cpu": name, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}


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
        f"Multi-query associative recall, rule `{config.mom.mechanism.kind}`, {recall.model.num_layers} layers of width "
        f"{recall.model.hidden_size}, {recall.steps} steps of {recall.batch_size * recall.accumulation} sequences, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; all three models saw the same data in the same order."
    )
    yield from ("", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield from ("", *findings(demo), "")
    one, wide, mom = (demo.of(name)[0] for name in LABELS)
    yield (
        "State bytes are those of the memories of all layers for one sequence, active those that one token touches. The "
        f"histories of the short convolutions come on top: {one.conv_bytes:,}, {wide.conv_bytes:,} and "
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
