"""Fair timing: candidates take turns, so that whatever disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest, slowest, and how many calls were measured."""

    median: float
    fastest: float
    slowest: float
    calls: int


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, Timing]:
    """Time each candidate once a round, after a call each to warm up."""
    for call in candidates.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and date, as every result file records them."""
    names = ("momkit", "torch", "triton", "transformers")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    hardware = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name, as Linux tells it; elsewhere what Python knows."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_dict(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}
