"""PNG plots of runs. Matplotlib is imported when the first is drawn, and needs no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from momkit.errors import BackendError
from momkit.training.folder import Record

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
Points = Mapping[int, float]


def require_matplotlib() -> Any:
    """`matplotlib.figure`, or a BackendError that says how to get it."""
    try:
        import matplotlib.figure
    except ImportError as fault:
        raise BackendError("plots need matplotlib: pip install 'momkit[plot]', or go without plots") from fault
    return matplotlib.figure


def new_figure(width: float = 6.4, height: float = 4.0) -> Any:
    # a figure made without pyplot draws with Agg and keeps no global state
    return require_matplotlib().Figure(figsize=(width, height), layout="constrained")


def plot_loss(records: Sequence[Record], path: Path) -> None:
    """Cross entropy of training steps and evaluations."""
    figure = new_figure()
    axes = figure.subplots()
    steps = [r for r in records if r["kind"] == "step"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    training = [r["step"] for r in steps], [r["cross_entropy"] for r in steps]
    held_out = [r["step"] for r in evaluations], [r["loss"] for r in evaluations]
    axes.plot(*training, color=COLOURS[0], lw=0.8, label="training")
    axes.plot(*held_out, "o", color=COLOURS[1], label="held out")
    axes.set(xlabel="step", ylabel="cross entropy (nats a target)")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_recall(curves: Mapping[str, Sequence[Points]], path: Path) -> None:
    """Accuracy against the number of pairs: one line a model, the mean of its runs, and each run as a dot."""
    figure = new_figure()
    axes = figure.subplots()
    for colour, (label, runs) in zip(COLOURS, curves.items(), strict=False):
        groups = sorted(runs[0])
        axes.plot(groups, [sum(run[g] for run in runs) / len(runs) for g in groups], "-", color=colour, label=label)
        for run in runs:
            axes.plot(groups, [run[g] for g in groups], "o", color=colour, ms=4)
    axes.set(xlabel="key-value pairs in the sequence", ylabel="recall", ylim=(-0.03, 1.03))
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups, [str(g) for g in groups])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_learning(curves: Mapping[str, Sequence[Points]], path: Path) -> None:
    """Accuracy against training steps: one colour a model, one line a run."""
    figure = new_figure()
    axes = figure.subplots()
    for colour, (label, runs) in zip(COLOURS, curves.items(), strict=False):
        for i, run in enumerate(runs):
            axes.plot(list(run), list(run.values()), "-", color=colour, lw=1.2, label=label if i == 0 else None)
    axes.set(xlabel="step", ylabel="recall, all numbers of pairs", ylim=(-0.03, 1.03))
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_load(records: Sequence[Record], path: Path) -> bool:
    """Share of the choices that each memory of each layer got, over training; False when there is nothing to draw."""
    steps = [r for r in records if r["kind"] == "step"]
    layers = [i for i, load in enumerate(steps[0]["load"]) if load is not None and len(load) > 1] if steps else []
    if not layers:
        return False
    figure = new_figure(height=2.2 * len(layers))
    for axes, layer in zip(figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0], layers, strict=True):
        loads = list(zip(*(r["load"][layer] for r in steps), strict=True))
        axes.stackplot([r["step"] for r in steps], loads, colors=[COLOURS[m % len(COLOURS)] for m in range(len(loads))])
        axes.set(ylabel=f"load, layer {layer}", ylim=(0, 1), xlim=(steps[0]["step"], steps[-1]["step"] + 1e-6))
    axes.set_xlabel("step")
    figure.savefig(path, dpi=150)
    return True


def plot_memories(labels: Sequence[str], memory_ids: Mapping[int, Tensor], num_memories: int, path: Path) -> None:
    """Which memories each token of a text goes to.

    labels: `T` texts, one a token. memory_ids: layer -> `[T, slots]`; each layer is a strip with one row a memory.
    """
    figure = new_figure(width=max(4.0, 0.14 * len(labels)), height=0.5 + (0.16 * num_memories + 0.25) * len(memory_ids))
    strips = figure.subplots(len(memory_ids), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (layer, ids) in zip(strips, memory_ids.items(), strict=True):
        for m in range(num_memories):
            at = (ids == m).any(1).nonzero().flatten().tolist()
            axes.bar(at, [0.9] * len(at), bottom=[m - 0.45] * len(at), width=0.9, color=COLOURS[m % len(COLOURS)])
        axes.set(ylabel=f"layer {layer}", ylim=(num_memories - 0.5, -0.5), xlim=(-0.5, len(labels) - 0.5))
        axes.set_yticks(range(num_memories))
    axes.set_xticks(range(len(labels)), labels, fontsize=6, family="monospace")
    axes.tick_params(axis="x", length=0)
    figure.savefig(path, dpi=150)
