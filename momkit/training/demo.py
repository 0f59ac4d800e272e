"""The demo: what several memories buy on associative recall, measured; then a small language model of bytes.

Every number is in `demo.yaml`, or in the file given in its place.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from momkit.errors import InputError
from momkit.models.lm import MoMLM
from momkit.training.checkpoint import versions
from momkit.training.config import TrainConfig
from momkit.training.demo_report import draw, report
from momkit.training.demo_result import LABELS, DemoConfig, DemoResult, RecallRun, TextRun
from momkit.training.folder import Record, RunFolder
from momkit.training.generate import Codec, generate
from momkit.training.loop import TrainResult, train
from momkit.training.plots import require_matplotlib

Progress = Callable[[str, int], AbstractContextManager[Callable[[Record], None]]]


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
    demo = DemoResult(recall, text, time.perf_counter() - start, hardware(config.recall), versions())
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


def hardware(config: TrainConfig) -> dict[str, str | int]:
    """The processor, and how much of it torch may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"cpu": name, "cores": os.cpu_count() or 1, "threads": config.threads or torch.get_num_threads()}
