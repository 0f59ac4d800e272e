"""Fair timing: candidates take turns, so that whatever disturbs the machine disturbs all of them."""

import platform
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)

# more than the L2 cache of any GPU; written often enough to keep a GPU busy while the host launches a call
FLUSH_BYTES, FLUSHES = 256_000_000, 32


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest, slowest, 20th and 80th percentile, and how many calls were measured.

    host: on a GPU, the median time that the host took to launch the call.
    """

    median: float
    fastest: float
    slowest: float
    p20: float
    p80: float
    calls: int
    host: float | None = None

    @staticmethod
    def of(seconds: list[float], host: list[float] | None = None) -> "Timing":
        p20, median, p80 = (float(x) for x in np.percentile(seconds, (20, 50, 80)))
        launches = None if host is None else float(np.median(host))
        return Timing(median, min(seconds), max(seconds), p20, p80, len(seconds), launches)


def turns(candidates: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each candidate in each round, candidates taking turns, after a call each to warm up."""
    for call in candidates.values():
        call()
    seconds: dict[Key, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(candidates: Mapping[Key, Callable[[], Any]], rounds: int = 7) -> dict[Key, Timing]:
    """Time each candidate once a round, after a call each to warm up."""
    return {name: Timing.of(seconds) for name, seconds in turns(candidates, rounds).items()}


def interleaved_cuda(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 30, warm_up: int = 3
) -> dict[str, Timing]:
    """As `interleaved`, on a GPU, between CUDA events.

    Before each call the L2 cache is flushed, long enough for the host to be ahead of the GPU: what launches cost shows
    in `host`, and in the time only of a call that itself waits for the GPU.
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warm_up):
        for call in candidates.values():
            scratch.zero_()
            call()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    host: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(FLUSHES):
                scratch.zero_()
            start.record()
            launched = time.perf_counter()
            call()
            host[name].append(time.perf_counter() - launched)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    seconds = {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}
    return {name: Timing.of(s, host[name]) for name, s in seconds.items()}


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as the replay of a CUDA graph, which leaves out what its launches cost on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most GPU memory that one call holds beyond what is there before it; its results are dropped."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment(device: str, packages: Iterable[str] = ("momkit", "torch", "triton", "transformers")) -> dict[str, Any]:
    """Hardware, versions and date, as every result file records them."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }


def version(package: str) -> str | None:
    """The version of what is loaded, else of what is installed, None if neither."""
    loaded: str | None = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return loaded
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, as Linux tells it; elsewhere what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_dict(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Timings as a result file holds them."""
    return {n: {k: v for k, v in asdict(timing).items() if v is not None} for n, timing in timings.items()}
