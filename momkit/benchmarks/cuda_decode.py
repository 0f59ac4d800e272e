"""What one decoding step costs on a GPU, as time and as the share of memory traffic that it must at least cause."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from momkit.benchmarks.cases import Case, agree, draw
from momkit.benchmarks.timing import as_dict, captured, interleaved_cuda
from momkit.decode import decode
from momkit.mechanisms.base import Inputs
from momkit.scan import as_mechanism

BATCHES = (1, 16, 64, 512)
# pool rows in one CUDA graph, so that a step finds none of its states in the L2 cache
POOL_ROWS = 2048
MOST_STEPS = 16


def decoding(cases: Sequence[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """Every case at every batch size: seconds of one step and bytes a second, under a CUDA graph."""
    for case in cases:
        for batch in BATCHES:
            yield {**case.facts, "batch": batch, **measure_steps(case, batch, rounds)}


def measure_steps(case: Case, batch: int, rounds: int) -> dict[str, Any]:
    """Steps on rows of their own in one graph; a step's time is the graph's by their number."""
    steps = min(MOST_STEPS, POOL_ROWS // batch)
    inputs = {name: x.detach() for name, x in draw(case, batch).items()}
    pool = 0.1 * torch.randn(steps * batch, case.heads, case.dim, case.dim, device="cuda")
    rows = torch.randperm(steps * batch, device="cuda").view(steps, batch)
    distances = check_step(case, inputs, pool, rows[0])

    def run() -> None:
        for index in rows:
            decode(case.rule, inputs, {"S": pool}, index, backend="triton")

    timings = as_dict(interleaved_cuda({"momkit": captured(run)}, rounds))
    seconds = timings["momkit"]["median"] / steps
    moved = step_bytes(inputs, pool[:batch])
    return {
        "from_float64": distances,
        "steps": steps,
        "timings": timings,
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": moved / seconds,
    }


def check_step(case: Case, inputs: Inputs, pool: torch.Tensor, index: torch.Tensor) -> dict[str, float]:
    """One step of the kernel on a copy of the pool against the rule's step in float64."""
    ours = pool.clone()
    output = decode(case.rule, inputs, {"S": ours}, index, backend="triton")
    wide = {name: x.double() for name, x in inputs.items()}
    state, expected = as_mechanism(case.rule).step({"S": pool[index].double()}, wide)
    exact = {"output": expected, "state": state["S"]}
    return agree(f"{case}, batch {len(index)}, one step", {"output": output, "state": ours[index]}, exact)


def step_bytes(inputs: Inputs, states: torch.Tensor) -> int:
    """What a step must move: states in and out, inputs in, outputs out."""
    tensors = [states, states, *inputs.values(), inputs["v"]]
    return sum(x.numel() * x.element_size() for x in tensors)
