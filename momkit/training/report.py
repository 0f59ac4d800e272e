"""What a finished run leaves to look at: its plots."""

from pathlib import Path

import torch
from torch import Tensor

from momkit.models.lm import MoMLM
from momkit.tasks.base import Task
from momkit.training.folder import RunFolder
from momkit.training.plots import plot_load, plot_loss, plot_memories, plot_recall

SAMPLE_TOKENS = 96


def draw_run(folder: RunFolder) -> list[Path]:
    """Every plot that the log and the checkpoint of a run have something for."""
    records = folder.records()
    drawn = [folder.path / "loss.png"]
    plot_loss(records, drawn[0])
    evaluations = [r for r in records if r["kind"] == "eval" and "by_group" in r]
    if evaluations:
        drawn.append(folder.path / "recall.png")
        points = {int(group): accuracy for group, accuracy in evaluations[-1]["by_group"].items()}
        plot_recall({f"step {evaluations[-1]['step']}": [points]}, drawn[-1])
    if plot_load(records, folder.path / "load.png"):
        drawn.append(folder.path / "load.png")
        checkpoint = folder.load()
        drawn.append(folder.path / "memories.png")
        draw_memories(checkpoint.build(), checkpoint.config.make_task(), drawn[-1])
    return drawn


def draw_memories(model: MoMLM, task: Task, path: Path) -> None:
    """The memories that each token of the first held-out sequence goes to."""
    batch = next(iter(task.evaluation(1)))
    tokens = batch.tokens[: min(SAMPLE_TOKENS, int(batch.cu_seqlens[1]))]
    labels = [show_byte(t) if task.name == "bytes" else str(t) for t in tokens.tolist()]
    plot_memories(labels, choices_by_layer(model, tokens), model.spec.block.num_memories, path)


@torch.no_grad()
def choices_by_layer(model: MoMLM, tokens: Tensor) -> dict[int, Tensor]:
    """layer -> memories `[T, slots]` that the tokens of one sequence `[T]` go to."""
    training = model.training
    routings = model.eval()(tokens).routings
    model.train(training)
    return {layer: routing.memory_ids for layer, routing in enumerate(routings) if routing is not None}


def show_byte(byte: int) -> str:
    """A byte as one printable character."""
    return {10: "↵", 32: "␣", 36: r"\$"}.get(byte, chr(byte) if 32 < byte < 127 else "·")
