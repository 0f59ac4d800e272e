"""Choosing the launch settings in `momkit/kernels/tuning.json`: candidates are measured on a rule that runs the kernel.

An entry of the table is a GPU class, a kernel, the bytes of an element and a size class of the state.
"""

import copy
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from momkit.benchmarks.cases import (
    Case,
    Work,
    agree,
    check_against_float64,
    forward,
    forward_backward,
    momkit_scan,
    ragged_lengths,
    results,
)
from momkit.benchmarks.timing import interleaved_cuda
from momkit.kernels import tuning
from momkit.kernels.tuning import Config

Table = dict[str, Any]

HEADS = {"64": 32, "128": 16, "256": 4}
DTYPES = {"2": torch.bfloat16, "4": torch.float32}
# the rule that a kernel is measured on, by the first word of its name
RULES = {"scalar": "mamba2", "delta": "gated_deltanet"}
# kernels that have work only where a segment is long enough to be cut
ON_ONE_SEQUENCE = ("delta_chain",)
# a candidate must be this much faster than the table's entry to replace it
GAIN = 0.98
MOST_WORKERS = 12

# block, num_warps, num_stages; wider elements take smaller blocks
NARROW = ((32, 4, 1), (32, 4, 2), (32, 4, 3), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2))
WIDE = ((16, 4, 1), (16, 4, 2), (32, 2, 1), (32, 4, 1), (32, 4, 2), (32, 8, 1), (64, 4, 1), (64, 8, 1))
INVERSE = ((32, 2, 2), (32, 4, 2), (64, 2, 1), (64, 2, 2), (64, 4, 1), (64, 4, 2), (64, 8, 2), (128, 4, 2))
GENERAL = {"2": NARROW, "4": WIDE}
# kernels that have a list of their own
CANDIDATES = {"delta_inverse": {"2": INVERSE, "4": WIDE}}


@dataclass(frozen=True)
class Entry:
    """One entry of the table; dtype: what the rule's q, k and v are while it is measured."""

    gpu: str
    kernel: str
    width: str
    size: str
    dtype: torch.dtype

    @property
    def case(self) -> Case:
        """The rule and shape that this entry is measured on."""
        return Case(RULES[self.kernel.split("_")[0]], HEADS[self.size], int(self.size))

    def of(self, table: Table) -> Config:
        return Config(*table[self.gpu][self.kernel][self.width][self.size])

    def put(self, table: Table, config: Config) -> Table:
        """The table with another entry here; the given one stays as it is."""
        changed = copy.deepcopy(table)
        changed[self.gpu][self.kernel][self.width][self.size] = list(astuple(config))
        return changed

    def candidates(self, table: Table) -> list[Config]:
        """The table's entry, and what may be better; no block is wider than the state."""
        listed = CANDIDATES.get(self.kernel, GENERAL)[self.width]
        others = [Config(*values) for values in listed if values[0] <= int(self.size)]
        return list(dict.fromkeys([self.of(table), *others]))


def entries(
    gpu: str, table: Table, kernels: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[str]
) -> list[Entry]:
    """Those entries of a GPU's table that are asked for; every one where nothing is."""
    found = []
    for kernel in kernels or table[gpu]:
        for width in table[gpu][kernel]:
            # a kernel with float32 entries only works on states, which are float32 whatever the inputs are
            dtype = DTYPES[width] if "2" in table[gpu][kernel] else torch.bfloat16
            if not dtypes or dtype in dtypes:
                found += [Entry(gpu, kernel, width, size, dtype) for size in sizes or HEADS]
    return found


@contextmanager
def overridden(table: Table) -> Iterator[None]:
    """Launch with the settings of another table."""
    original = tuning.table
    tuning.table = lambda: table  # type: ignore[assignment]
    tuning.config.cache_clear()
    try:
        yield
    finally:
        tuning.table = original
        tuning.config.cache_clear()


def under(table: Table, call: Callable[[], Any]) -> Any:
    with overridden(table):
        return call()


def describe(entry: Entry) -> str:
    return f"{entry.case}, {str(entry.dtype).removeprefix('torch.')}"


def work_of(entry: Entry) -> Work:
    lengths = ragged_lengths()
    return Work.of(entry.case, [sum(lengths)] if entry.kernel in ON_ONE_SEQUENCE else lengths, dtype=entry.dtype)


def compile_one(job: tuple[Entry, Table]) -> None:
    """Run one candidate in this process, so that Triton's cache holds it for the others."""
    entry, table = job
    under(table, forward_backward(momkit_scan(entry.case), work_of(entry)))
    torch.cuda.synchronize()


def compile_all(jobs: Sequence[tuple[Entry, Table]]) -> None:
    """Fill Triton's cache from several processes; a candidate that fails here fails again, and is told of, when it is
    measured."""
    workers = min(MOST_WORKERS, os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_one, job) for job in jobs]:
            future.exception()


def tune_entry(entry: Entry, table: Table, rounds: int) -> dict[str, Any]:
    """Measure every candidate whose results are those of the table's entry; the fastest forward and backward wins."""
    case, work = entry.case, work_of(entry)
    call = momkit_scan(case)
    default = entry.of(table)
    with overridden(table):
        check_against_float64(case, call, work)
        expected = results(call, work)
    rows: dict[Config, dict[str, Any]] = {}
    good: dict[Config, Table] = {}
    for config in entry.candidates(table):
        changed = entry.put(table, config)
        rows[config] = {"config": list(astuple(config))} | verdict(
            f"{entry.kernel} {astuple(config)}", partial(under, changed, partial(results, call, work)), expected
        )
        if len(rows[config]) == 1:
            good[config] = changed
    runs = {"forward": forward(call, work), "forward_backward": forward_backward(call, work)}
    for name, run in runs.items():
        candidates = {str(astuple(c)): partial(under, changed, run) for c, changed in good.items()}
        timings = interleaved_cuda(candidates, rounds)
        for config in good:
            rows[config][name] = timings[str(astuple(config))].median
    chosen = choose(default, {config: rows[config]["forward_backward"] for config in good})
    facts = {"kernel": entry.kernel, "bytes": entry.width, "size": entry.size, "measured_on": describe(entry)}
    return facts | {"was": list(astuple(default)), "chosen": list(astuple(chosen)), "candidates": list(rows.values())}


def verdict(what: str, call: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor]) -> dict[str, str]:
    """Nothing for a candidate that gives the expected results, else what is wrong with it."""
    try:
        agree(what, call(), expected)
    except ArithmeticError as fault:
        return {"wrong": str(fault)}
    except Exception as fault:  # most often more shared memory than there is: one candidate less
        return {"failed": f"{type(fault).__name__}: {fault}"}
    return {}


def choose(default: Config, seconds: dict[Config, float]) -> Config:
    """The fastest, unless what it gains over the default may be noise."""
    fastest = min(seconds, key=lambda config: seconds[config])
    return fastest if default not in seconds or seconds[fastest] < GAIN * seconds[default] else default


def tune(
    wanted: Sequence[Entry], table: Table, rounds: int = 20, say: Callable[[str], None] = print
) -> tuple[Table, list[dict[str, Any]]]:
    """The table with the best settings found, entry by entry, each measured with those already chosen; and reports."""
    jobs = [(e, e.put(table, config)) for e in wanted for config in e.candidates(table)]
    say(f"{len(wanted)} entries, {len(jobs)} candidates: compiling")
    compile_all(jobs)
    reports = []
    for entry in wanted:
        report = tune_entry(entry, table, rounds)
        table = entry.put(table, Config(*report["chosen"]))
        reports.append(report)
        say(f"{entry.kernel}, {entry.width} bytes, {entry.size}: {report['was']} -> {report['chosen']}")
    return table, reports


def text_of(table: Table) -> str:
    """The table as `tuning.json` holds it: a line for each kernel's element size."""

    def block(indent: str, named: dict[str, str]) -> str:
        return "{\n" + ",\n".join(f"{indent}  {json.dumps(n)}: {text}" for n, text in named.items()) + f"\n{indent}}}"

    def kernel(widths: dict[str, Any]) -> str:
        return block(" " * 4, {width: json.dumps(sizes) for width, sizes in widths.items()})

    gpus = {gpu: block("  ", {k: kernel(widths) for k, widths in kernels.items()}) for gpu, kernels in table.items()}
    return block("", gpus) + "\n"
