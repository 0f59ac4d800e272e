"""What the CPU path costs: the chunked form against its rivals, by length, and several memories against one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momkit.benchmarks.timing import as_dict, environment, interleaved, turns
from momkit.errors import InputError
from momkit.mechanisms.base import Inputs
from momkit.registry import registry
from momkit.scan import as_mechanism, scan
from momkit.spec import MoMSpec

HEADS, DIM = 4, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FLAT = (2048, 4096, 8192, 16384)


def leaves(inputs: Inputs) -> Inputs:
    return {name: tensor.float().requires_grad_() for name, tensor in inputs.items()}


def forward_backward(call: Callable[[], Tensor], tensors: Inputs) -> Callable[[], Tensor]:
    """A call that runs forward and backward into fresh gradients; returns the output."""

    def run() -> Tensor:
        for tensor in tensors.values():
            tensor.grad = None
        output = call()
        output.sum().backward()
        return output.detach()

    return run


def sample(name: str, length: int) -> Inputs:
    """Random inputs of a rule at the benchmark's shape, 4 heads of 64."""
    rule = as_mechanism(name)
    sizes = {"T": length, "H": HEADS, "G": HEADS, "K": DIM, "V": DIM, "slots": DIM, "channels": HEADS * DIM, "N": 16}
    return leaves(rule.sample(torch.Generator().manual_seed(0), sizes))


def momkit_form(name: str, inputs: Inputs, backend: Any) -> Callable[[], Tensor]:
    return forward_backward(lambda: scan(name, inputs, backend=backend).output, inputs)


def transformers_form(inputs: Inputs) -> Callable[[], Tensor]:
    """The pure-torch chunked gated delta rule that transformers falls back to for Qwen3-Next."""
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as chunk
    except ImportError as fault:
        raise InputError(f"peer 'transformers' can't be measured: {fault}; pip install 'momkit[dev]'") from fault

    def call() -> Tensor:
        batched = {name: tensor[None] for name, tensor in inputs.items()}
        output: Tensor = chunk(batched["q"], batched["k"], batched["v"], batched["g"], batched["beta"])[0][0]
        return output

    return forward_backward(call, inputs)


def agree(outputs: dict[str, Tensor]) -> float:
    """The largest difference between candidates, relative to the largest value; refuses what is not the same result."""
    first = next(iter(outputs.values()))
    # tensors carry a NaN through max, Python's own max may drop it
    worst = float(torch.stack([(other - first).abs().max() for other in outputs.values()]).max() / first.abs().max())
    if not worst < 1e-3:
        raise ArithmeticError(f"the candidates disagree by {worst:.1e}: nothing was timed")
    return worst


def lengths(rounds: int) -> Iterator[dict[str, Any]]:
    """Gated delta rule over one sequence of each length, forward and backward.

    A round goes over all lengths: what disturbs the machine for seconds disturbs a round of each, not all of one.
    """
    candidates: dict[int, dict[str, Callable[[], Tensor]]] = {}
    for length in LENGTHS:
        inputs = sample("gated_deltanet", length)
        candidates[length] = {
            "chunked": momkit_form("gated_deltanet", inputs, "chunked"),
            "reference": momkit_form("gated_deltanet", inputs, "reference"),
            "transformers": transformers_form(inputs),
        }
    differences = {
        length: agree({name: call() for name, call in calls.items()}) for length, calls in candidates.items()
    }
    everything = {(length, name): call for length, calls in candidates.items() for name, call in calls.items()}
    timings = interleaved(everything, rounds)
    for length, calls in candidates.items():
        mine = {name: timings[length, name] for name in calls}
        yield {"tokens": length, "difference": differences[length], "timings": as_dict(mine)}


def cost_per_token(rounds: int) -> dict[str, float]:
    """The chunked gated delta rule's time a token at each length, as a share of that at 2048 in the same round.

    Every timing runs over as many tokens, in one sequence or several calls, and a round takes about a second: other
    load, which comes and goes over seconds, then falls on all lengths of a round. The median is over the rounds.
    """
    longest = FLAT[-1]

    def repeated(length: int) -> Callable[[], None]:
        call = momkit_form("gated_deltanet", sample("gated_deltanet", length), "chunked")

        def run() -> None:
            for _ in range(longest // length):
                call()

        return run

    seconds = turns({length: repeated(length) for length in FLAT}, rounds)
    shares = np.array([seconds[length] for length in FLAT]) / np.array(seconds[FLAT[0]])
    return {str(length): float(share) for length, share in zip(FLAT, np.median(shares, axis=1), strict=True)}


def rules(rounds: int) -> Iterator[dict[str, Any]]:
    """Every rule with a chunked form at 2048 tokens, forward and backward."""
    for name in registry().names("mechanism"):
        if as_mechanism(name).has_chunked_form:
            inputs = sample(name, 2048)
            candidates = {backend: momkit_form(name, inputs, backend) for backend in ("chunked", "reference")}
            difference = agree({backend: call() for backend, call in candidates.items()})
            yield {"rule": name, "difference": difference, "timings": as_dict(interleaved(candidates, rounds))}


def blocks(rounds: int) -> Iterator[dict[str, Any]]:
    """The default block (4 memories, top 2, shared) against the same block with one memory, forward and backward."""
    for batch, length in ((1, 4096), (8, 512)):
        torch.manual_seed(0)
        one = MoMSpec(hidden_size=256, num_memories=1, shared_memory=False, router={"kind": "softmax_topk", "top_k": 1})
        candidates = {}
        for name, spec in (("mom", MoMSpec(hidden_size=256)), ("one_memory", one)):
            block = spec.build()
            x = torch.randn(batch, length, 256, requires_grad=True)
            tensors = {"x": x} | dict(block.named_parameters())
            candidates[name] = forward_backward(lambda block=block, x=x: block(x).hidden_states, tensors)  # type: ignore[misc]
        yield {"batch": batch, "tokens": length, "timings": as_dict(interleaved(candidates, rounds))}


def measure(rounds: int = 7) -> dict[str, Any]:
    """Every CPU measurement, with hardware, versions and date."""
    return {
        "what": f"CPU, float32, forward and backward, {HEADS} heads of {DIM}; seconds",
        **environment("cpu"),
        "lengths": list(lengths(rounds)),
        "cost_per_token": cost_per_token(3 * rounds),
        "rules": list(rules(rounds)),
        "blocks": list(blocks(rounds)),
    }


def bars(result: dict[str, Any]) -> dict[str, float]:
    """The ratios that this library promises, from a measurement."""
    by_length = {row["tokens"]: {n: t["median"] for n, t in row["timings"].items()} for row in result["lengths"]}
    per_token = result["cost_per_token"].values()
    block = [row["timings"]["mom"]["median"] / row["timings"]["one_memory"]["median"] for row in result["blocks"]]
    return {
        "reference / chunked at 2048": by_length[2048]["reference"] / by_length[2048]["chunked"],
        "transformers / chunked at 4096": by_length[4096]["transformers"] / by_length[4096]["chunked"],
        "cost per token, most / least, 2048 to 16384": max(per_token) / min(per_token),
        "mom block / one-memory block, most": max(block),
    }


def milliseconds(timing: dict[str, float]) -> str:
    """The median of a timing, for a table."""
    value = timing["median"] * 1e3
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(head: str, rows: Iterable[str]) -> list[str]:
    """A Markdown table from its lines, cells apart by bars."""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows), ""]


def compared(row: dict[str, Any], slow: str, fast: str) -> tuple[str, str, float]:
    """Both timings of a row, and how many times the one is the other."""
    a, b = row["timings"][slow], row["timings"][fast]
    return milliseconds(a), milliseconds(b), a["median"] / b["median"]


def length_row(row: dict[str, Any]) -> str:
    cells = [milliseconds(row["timings"][name]) for name in ("chunked", "reference", "transformers")]
    micro = row["timings"]["chunked"]["median"] / row["tokens"] * 1e6
    return " | ".join([str(row["tokens"]), *cells, f"{micro:.1f}"])


def rule_row(row: dict[str, Any]) -> str:
    reference, chunked, ratio = compared(row, "reference", "chunked")
    return f"`{row['rule']}` | {chunked} | {reference} | {ratio:.0f}x"


def block_row(row: dict[str, Any]) -> str:
    mom, one, ratio = compared(row, "mom", "one_memory")
    return f"{row['batch']} x {row['tokens']} | {mom} | {one} | {ratio:.2f}"


def markdown(result: dict[str, Any]) -> str:
    """The measurement as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        "# CPU timings",
        "",
        f"{result['what']}. {result['hardware']}, {result['threads']} threads, {versions}, {result['date']}.",
        "Made by `momkit bench --device cpu`; medians, candidates interleaved in one process.",
        "",
        *table("promise | measured", (f"{name} | {value:.2f}" for name, value in bars(result).items())),
        "Gated delta rule, one sequence, milliseconds:",
        "",
        *table("tokens | chunked | reference | transformers | chunked, us a token", map(length_row, result["lengths"])),
        "Its chunked form's time a token, lengths side by side, as a share of that at 2048 tokens:",
        "",
        *table("tokens | share", (f"{tokens} | {share:.2f}" for tokens, share in result["cost_per_token"].items())),
        "Every rule with a chunked form, 2048 tokens, milliseconds:",
        "",
        *table("rule | chunked | reference | ratio", map(rule_row, result["rules"])),
        "Block of width 256, milliseconds:",
        "",
        *table("batch x tokens | 4 memories, top 2, shared | one memory | ratio", map(block_row, result["blocks"])),
    ]
    return "\n".join(lines)
