"""A layer's GPU results for people: measured against the bars this project set itself, and as tables."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from momkit.benchmarks.cpu import table
from momkit.benchmarks.cuda_report import bar, bar_line, spread

# seconds of a training step: hidden size, batch, length; MiB over weights, inputs and output gradients; of the first
SECONDS = {(1024, 8, 2048): 5e-3, (1024, 1, 32768): 9e-3, (2048, 8, 2048): 6.5e-3}
PEAK_MIB = {(1024, 8, 2048): 1200}
FIRST_STEP = 25.0
COLLAPSED, MORE_MEMORIES = 1.3, 1.15
# seconds of a decoding step under a CUDA graph, by batch
DECODE = {1: 30e-6, 16: 90e-6, 64: 220e-6, 512: 1.6e-3}
EAGER, GRAPH = "momkit", "momkit, graph"

Row = dict[str, Any]


def bars(result: Row) -> list[Row]:
    """Every bar of the project that the measured sections speak of."""
    sections: dict[str, Callable[[Row], Iterable[Row]]] = {
        "train": train_bars,
        "routing": routing_bars,
        "decode": decode_bars,
        "first_step": lambda row: [bar("first training step", row["seconds"], FIRST_STEP, "s")],
        "syncs": lambda row: [bar(f"host synchronisations in a {row['what']}", row["syncs"], 0)],
    }
    return [one for name, make in sections.items() for row in result.get(name, ()) for one in make(row)]


def train_bars(row: Row) -> Iterator[Row]:
    medians = {name: timing["median"] for name, timing in row["forward_backward"].items()}
    key = (row["hidden_size"], row["batch"], row["length"])
    if key in SECONDS:
        yield bar(f"{shape(row)}, training step", medians[EAGER] * 1e3, SECONDS[key] * 1e3, "ms")
    if key in PEAK_MIB:
        yield bar(f"{shape(row)}, peak memory", row["peak_bytes"][EAGER] / 2**30, PEAK_MIB[key] / 2**10, "GiB")


def routing_bars(row: Row) -> Iterator[Row]:
    (first, a), (second, b) = row["forward_backward"].items()
    allowed = COLLAPSED if second == "collapsed" else MORE_MEMORIES
    yield bar(f"training step, {second} by {first}", b["median"] / a["median"], allowed)


def decode_bars(row: Row) -> Iterator[Row]:
    if row["batch"] in DECODE:
        measured, allowed = row["seconds"][GRAPH] * 1e6, DECODE[row["batch"]] * 1e6
        yield bar(f"decoding step of batch {row['batch']}, graph", measured, allowed, "us")


def shape(row: Row) -> str:
    return f"hidden {row['hidden_size']}, {row['batch']} x {row['length']}"


def peers(row: Row) -> list[str]:
    """The peer's layers that a row of `train` measured."""
    return [name for name in row["peak_bytes"] if name != EAGER]


def train_lines(row: Row) -> Iterator[str]:
    tokens, ours = row["batch"] * row["length"], row["forward_backward"][EAGER]["median"]
    for name, timing in row["forward_backward"].items():
        rate, peak = tokens / timing["median"] / 1e6, row["peak_bytes"].get(name)
        cells = [shape(row), name, spread(timing), f"{timing['median'] / ours:.2f}", f"{rate:.2f}"]
        yield " | ".join([*cells, "" if peak is None else f"{peak / 2**20:.0f}"])
    yield from error_lines(row, shape(row), columns=6)


def error_lines(row: Row, first: str, columns: int) -> Iterator[str]:
    """A line for each layer of the peer's that failed, as wide as its table."""
    for name, fault in row.get("peer_errors", {}).items():
        words = " ".join(fault.split())[:200].replace("|", "/")
        yield " | ".join([first, name, f"failed: {words}", *[""] * (columns - 3)])


def routing_lines(row: Row) -> Iterator[str]:
    timings = row["forward_backward"]
    first = next(iter(timings.values()))["median"]
    for name, timing in timings.items():
        load = " ".join(f"{share:.2f}" for share in row["load"][name])
        yield f"{name} | {spread(timing)} | {timing['median'] / first:.2f} | {load}"


def decode_lines(row: Row) -> Iterator[str]:
    for name, seconds in row["seconds"].items():
        moved = f"{row['bytes'] / 2**20:.1f} | {row['share'] * 100:.0f}" if name == GRAPH else " | "
        yield f"{row['batch']} | {name} | {seconds * 1e6:.1f} | {moved}"
    yield from error_lines(row, str(row["batch"]), columns=5)


TABLES: dict[str, tuple[str, str, Callable[[Row], Iterable[str]]]] = {
    "train": (
        "Training step: forward and backward, median (20% to 80%); peak memory over weights, x and dO:",
        "shape | layer | ms | by momkit's | million tokens a second | peak, MiB",
        train_lines,
    ),
    "routing": (
        "Training step by routing:",
        "routing | ms | by the first's | share of the choices by memory",
        routing_lines,
    ),
    "decode": (
        "Decoding step of one layer; what it must move at least, and the share of 3.35 TB/s at which it does:",
        "batch | layer | us | MiB | % of bandwidth",
        decode_lines,
    ),
    "first_step": (
        "First training step with an empty Triton cache:",
        "shape | seconds",
        lambda row: [f"{shape(row)} | {row['seconds']:.1f}"],
    ),
    "syncs": (
        "Times that the host waits for the GPU:",
        "step | synchronisations",
        lambda row: [f"{row['what']} | {row['syncs']}"],
    ),
}


def markdown(result: Row) -> str:
    """The measurement as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    peer = f" --peer {result['peer']}" if result["peer"] else ""
    lines = [
        "# GPU timings: the layer",
        "",
        f"{result['what']}. {result['hardware']}, {versions}, {result['date']}.",
        f"Made by `momkit bench --device cuda --layer{peer} --rounds {result['rounds']}`.",
        "",
    ]
    if found := bars(result):
        lines += table("promise | measured | allowed | kept", map(bar_line, found))
    if left_out := [name for name in TABLES if not result.get(name)]:
        lines += [f"Not measured here: {', '.join(left_out)}.", ""]
    for name, (title, head, lines_of) in TABLES.items():
        if result.get(name):
            lines += [title, "", *table(head, (line for row in result[name] for line in lines_of(row)))]
    return "\n".join(lines)
