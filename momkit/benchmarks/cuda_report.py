"""GPU results for people: measured against the bars this project set itself, and as tables."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from momkit.benchmarks.cpu import table

# seconds for 32768 tokens in 32 ragged segments: forward, forward and backward
SECONDS = {
    ("mamba2", 16, 128): (0.26e-3, 1.10e-3),
    ("deltanet", 16, 128): (0.50e-3, 1.85e-3),
    ("gated_deltanet", 16, 128): (0.50e-3, 1.90e-3),
    ("mamba2", 4, 256): (0.25e-3, 0.95e-3),
    ("gated_deltanet", 4, 256): (0.35e-3, 1.40e-3),
    ("gla", 16, 128): (0.60e-3, 2.40e-3),
    ("gla", 4, 256): (0.40e-3, 1.70e-3),
}
PEAK_SHARE = 0.5
ONE_SEQUENCE = {"scalar": 1.5, "delta": 2.0, "channel": 1.5}
BY_LENGTH = 1.15
FIRST_CALL = 15.0
PASSES = {"forward": "forward", "forward_backward": "forward and backward"}

Row = dict[str, Any]


def bar(promise: str, measured: float, allowed: float, unit: str = "") -> Row:
    return {"promise": promise, "measured": measured, "allowed": allowed, "unit": unit, "kept": measured <= allowed}


def bars(result: Row) -> list[Row]:
    """Every bar of the project that the measured sections speak of."""
    sections: dict[str, Callable[[Row], Iterable[Row]]] = {
        "ragged": peer_bars,
        "one_sequence": lambda row: one_sequence_bars(row, ONE_SEQUENCE[result["family"]]),
        "first_call": lambda row: [bar(f"{case(row)}, first call", row["seconds"], FIRST_CALL, "s")],
    }
    found = [one for name, make in sections.items() for row in result.get(name, ()) for one in make(row)]
    return found + list(length_bars(result.get("by_length", ())))


def peer_bars(row: Row) -> Iterator[Row]:
    key = (row["rule"], row["heads"], row["dim"])
    limits = zip(PASSES.items(), SECONDS[key], strict=True) if key in SECONDS else ()
    for (name, words), allowed in limits:
        yield bar(f"{case(row)}, {words}", row[name]["momkit"]["median"] * 1e3, allowed * 1e3, "ms")
    for peer in peers(row):
        share = row["peak_bytes"]["momkit"] / row["peak_bytes"][peer]
        yield bar(f"{case(row)}, peak memory as a share of {peer}'s", share, PEAK_SHARE)


def one_sequence_bars(row: Row, allowed: float) -> Iterator[Row]:
    for name, words in PASSES.items():
        ratio = row[name]["one"]["median"] / row[name]["ragged"]["median"]
        yield bar(f"{case(row)}, one sequence by ragged, {words}", ratio, allowed)


def length_bars(rows: Iterable[Row]) -> Iterator[Row]:
    """The dearest token by the cheapest, for each rule."""
    costs: dict[str, list[float]] = {}
    for row in rows:
        if "forward_backward" in row:
            cost = row["forward_backward"]["momkit"]["median"] / row["tokens"]
            costs.setdefault(case(row), []).append(cost)
    for name, per_token in costs.items():
        yield bar(f"{name}, cost per token, most by least", max(per_token) / min(per_token), BY_LENGTH)


def case(row: Row) -> str:
    return f"{row['rule']} {row['heads']}x{row['dim']}"


def peers(row: Row) -> list[str]:
    """The peers that a row of `ragged` measured."""
    return [name for name in row["peak_bytes"] if name != "momkit"]


def spread(timing: dict[str, float], unit: float = 1e3, digits: int = 3) -> str:
    """A median with its 20th and 80th percentile."""
    median, p20, p80 = (timing[name] * unit for name in ("median", "p20", "p80"))
    return f"{median:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"


def bar_line(one: Row) -> str:
    value, allowed = (f"{one[name]:.3g} {one['unit']}".strip() for name in ("measured", "allowed"))
    return f"{one['promise']} | {value} | {allowed} | {'yes' if one['kept'] else 'no'}"


def peer_lines(row: Row) -> Iterator[str]:
    for name in ("momkit", *peers(row)):
        mine = row["forward"][name]["median"], row["forward_backward"][name]["median"]
        ours = row["forward"]["momkit"]["median"], row["forward_backward"]["momkit"]["median"]
        passes = [f"{spread(row[p][name])} | {a / b:.2f}" for p, a, b in zip(PASSES, mine, ours, strict=True)]
        yield " | ".join([case(row), name, *passes, f"{row['peak_bytes'][name] / 2**20:.0f}"])
    if "peer_error" in row:
        yield f"{case(row)} | failed: {' '.join(row['peer_error'].split())[:200]} | | | | |"


def pair_line(row: Row, first: str, second: str) -> str:
    cells = []
    for name in PASSES:
        a, b = row[name][first], row[name][second]
        cells += [spread(a), spread(b), f"{b['median'] / a['median']:.2f}"]
    return " | ".join([case(row), f"{row['tokens']}", *cells])


def length_line(row: Row) -> str:
    if "skipped" in row:
        return f"{case(row)} | {row['tokens']} | {row['skipped']} | "
    timing = row["forward_backward"]["momkit"]
    return f"{case(row)} | {row['tokens']} | {spread(timing)} | {timing['median'] / row['tokens'] * 1e9:.1f}"


def decode_line(row: Row) -> str:
    micro, rate = row["seconds"] * 1e6, row["bytes_per_second"] / 1e9
    return f"{case(row)} | {row['batch']} | {micro:.1f} | {rate:.0f}"


def markdown(result: Row) -> str:
    """The measurement as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    peer = f" --peer {result['peer']}" if result["peer"] else ""
    lines = [
        f"# GPU timings: {result['family']}",
        "",
        f"{result['what']}. {result['hardware']}, {versions}, {result['date']}.",
        f"Made by `momkit bench --device cuda --family {result['family']}{peer} --rounds {result['rounds']}`.",
        "",
    ]
    if found := bars(result):
        lines += table("promise | measured | allowed | kept", map(bar_line, found))
    both = "forward, ms | by momkit's | forward and backward, ms | by momkit's"
    pair = "forward, {0} | {1} | ratio | forward and backward, {0} | {1} | ratio"
    tables: dict[str, tuple[str, str, Callable[[Row], Iterable[str]]]] = {
        "ragged": (
            "32768 tokens in 32 ragged segments, median (20% to 80%); peak memory over inputs and dO:",
            f"rule | library | {both} | peak, MiB",
            peer_lines,
        ),
        "one_sequence": (
            "One sequence against ragged segments, ms:",
            "rule | tokens | " + pair.format("ragged", "one"),
            lambda row: [pair_line(row, "ragged", "one")],
        ),
        "short": (
            "Few tokens in 32 ragged segments, as a CUDA graph and eager, ms:",
            "rule | tokens | " + pair.format("graph", "eager"),
            lambda row: [pair_line(row, "graph", "eager")],
        ),
        "by_length": (
            "Segments of 1024 tokens, forward and backward:",
            "rule | tokens | ms | ns a token",
            lambda row: [length_line(row)],
        ),
        "first_call": (
            "First forward and backward with an empty Triton cache:",
            "rule | seconds",
            lambda row: [f"{case(row)} | {row['seconds']:.1f}"],
        ),
        "decode": (
            "One decoding step under a CUDA graph:",
            "rule | batch | us | GB/s",
            lambda row: [decode_line(row)],
        ),
    }
    if left_out := [
        name for name in tables if (name == "decode") == (result["family"] == "decode") and not result.get(name)
    ]:
        lines += [f"Not measured here: {', '.join(left_out)}.", ""]
    for name, (title, head, lines_of) in tables.items():
        if result.get(name):
            lines += [title, "", *table(head, (line for row in result[name] for line in lines_of(row)))]
    return "\n".join(lines)
