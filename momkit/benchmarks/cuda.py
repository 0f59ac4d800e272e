"""What the fused kernels cost on a GPU: against a peer's, by packing and by length, on the first call, in decoding."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from momkit.benchmarks.cases import (
    TOKENS,
    Case,
    Scan,
    Work,
    agree,
    check_against_float64,
    forward,
    forward_backward,
    found,
    momkit_scan,
    ragged_lengths,
    results,
)
from momkit.benchmarks.cuda_decode import decoding
from momkit.benchmarks.peers import PEERS, check_peer, peer_function, peer_scan
from momkit.benchmarks.timing import as_dict, captured, environment, interleaved_cuda, peak_bytes
from momkit.errors import BackendError, InputError

CASES = {
    "scalar": (Case("mamba2", 16, 128), Case("mamba2", 4, 256)),
    "delta": (Case("deltanet", 16, 128), Case("gated_deltanet", 16, 128), Case("gated_deltanet", 4, 256)),
    "channel": (Case("gla", 16, 128), Case("gla", 4, 256), Case("hgrn2", 16, 128), Case("rwkv6", 16, 128)),
    "decode": (Case("gated_deltanet", 16, 128), Case("gated_deltanet", 4, 256)),
}
SEGMENT = 1024
LENGTHS = tuple(2**n for n in range(15, 21))
SHORT = (4096, 8192, 16384)


@dataclass(frozen=True)
class Options:
    """How to measure: the calls of each candidate, and the peer to measure beside ours, if any."""

    rounds: int = 30
    peer: str | None = None


Section = Callable[[Sequence[Case], Options], Iterator[dict[str, Any]]]


def ragged(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """32 ragged segments: forward, forward and backward, peak memory of the latter; ours and the peer's."""
    for case in cases:
        work, scans = Work.of(case, ragged_lengths()), {"momkit": momkit_scan(case)}
        row: dict[str, Any] = {**case.facts, "tokens": TOKENS, "segments": len(work.cu_seqlens) - 1}
        row["from_float64"] = check_against_float64(case, scans["momkit"], work)
        if options.peer and case.rule in PEERS[options.peer]:
            row |= add_peer(options.peer, case, work, scans)
        row["forward"] = timings({name: forward(call, work) for name, call in scans.items()}, options)
        both = {name: forward_backward(call, work) for name, call in scans.items()}
        row["forward_backward"] = timings(both, options)
        row["peak_bytes"] = {name: peak_bytes(call) for name, call in both.items()}
        yield row


def add_peer(peer: str, case: Case, work: Work, scans: dict[str, Scan]) -> dict[str, Any]:
    """Add the peer's scan to those measured if it runs; ArithmeticError if it runs and its results are others."""
    call = peer_scan(peer, case.rule)
    try:
        expected = results(call, work)
        torch.cuda.synchronize()
    except Exception as fault:  # a fault of the peer's is a finding about the peer
        return {"peer_error": f"{type(fault).__name__}: {fault}"}
    distances = agree(f"{case}, against {peer}", results(scans["momkit"], work), expected)
    scans[peer] = call
    return {"from_peer": distances}


def one_sequence(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """All tokens in one sequence, against the same number in ragged segments."""
    for case in cases:
        call = momkit_scan(case)
        works = {"ragged": Work.of(case, ragged_lengths()), "one": Work.of(case, [TOKENS])}
        check_forward(case, call, works["one"])
        yield {
            **case.facts,
            "tokens": TOKENS,
            "forward": timings({name: forward(call, work) for name, work in works.items()}, options),
            "forward_backward": timings({n: forward_backward(call, work) for n, work in works.items()}, options),
        }


def check_forward(case: Case, call: Scan, work: Work) -> dict[str, float]:
    """Output and final state of the whole work against the chunked form in float64."""
    with torch.no_grad():
        wide = {name: x.double() for name, x in work.inputs.items()}
        expected = found(*momkit_scan(case, "chunked")(wide, work.cu_seqlens))
        got = found(*call(work.inputs, work.cu_seqlens))
        return agree(f"{case}, {len(work.grad_output)} tokens, against float64", got, expected)


def by_length(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """Forward and backward over ever more segments of 1024 tokens; what does not fit in memory says so."""
    for case in small(cases):
        for tokens in LENGTHS:
            torch.cuda.empty_cache()
            row = {**case.facts, "tokens": tokens}
            try:
                yield row | {"forward_backward": timings(at_length(case, tokens), options)}
            except torch.OutOfMemoryError:
                yield row | {"skipped": "out of memory"}
    torch.cuda.empty_cache()


def at_length(case: Case, tokens: int) -> dict[str, Callable[[], Any]]:
    """The candidate of one length, once the last of its segments has given what it gives alone."""
    call, work = momkit_scan(case), Work.of(case, [SEGMENT] * (tokens // SEGMENT))
    tail = {name: x[-SEGMENT:].contiguous() for name, x in work.inputs.items()}
    with torch.no_grad():
        alone = call(tail, torch.tensor([0, SEGMENT], device="cuda"))[0]
        whole = call(work.inputs, work.cu_seqlens)[0][-SEGMENT:]
    agree(f"{case}, last of {tokens} tokens, against the same alone", {"output": whole}, {"output": alone})
    return {"momkit": forward_backward(call, work)}


def short(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """Few tokens in 32 ragged segments, eager and as a CUDA graph, which leaves out what launches cost on the host."""
    for case in small(cases):
        for tokens in SHORT:
            call, work = momkit_scan(case), Work.of(case, ragged_lengths(tokens))
            row: dict[str, Any] = {**case.facts, "tokens": tokens}
            for name, run in (("forward", forward(call, work)), ("forward_backward", forward_backward(call, work))):
                row[name] = timings({"eager": run, "graph": captured(run)}, options)
            yield row


def first_call(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """Seconds of the first forward and backward of a process with nothing compiled, after imports and CUDA's start."""
    for case in small(cases):
        program = f"from momkit.benchmarks import cuda; cuda.print_first_call({case.rule!r}, {case.heads}, {case.dim})"
        yield {**case.facts, "seconds": seconds_in_new_process(program, f"{case}: its first call")}


def print_first_call(rule: str, heads: int, dim: int) -> None:
    """Time the first call of this process and print its seconds."""
    case = Case(rule, heads, dim)
    load_triton()
    print_seconds(forward_backward(momkit_scan(case), Work.of(case, ragged_lengths())))


def seconds_in_new_process(program: str, what: str) -> float:
    """What a program prints by `print_seconds` in a process with nothing compiled; RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as cache:
        environ = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{what} failed in a process of its own: {done.stderr[-2000:]}")
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return seconds


def print_seconds(call: Callable[[], Any]) -> None:
    """Time one call, and print its seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    print(json.dumps(time.perf_counter() - start))


def decode(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """One token for each row of a batch, on states in a pool."""
    return decoding(cases, options.rounds)


SECTIONS: dict[str, Section] = {
    "ragged": ragged,
    "one_sequence": one_sequence,
    "by_length": by_length,
    "first_call": first_call,
    "short": short,
    "decode": decode,
}


def small(cases: Sequence[Case]) -> list[Case]:
    """The cases of 16 heads of 128."""
    return [case for case in cases if (case.heads, case.dim) == (16, 128)]


def timings(candidates: dict[str, Callable[[], Any]], options: Options) -> dict[str, Any]:
    return as_dict(interleaved_cuda(candidates, options.rounds))


def sections_of(family: str, only: Sequence[str] = ()) -> list[str]:
    """The sections of a family, in order, or those of them asked for; InputError for what is unknown."""
    if family not in CASES:
        raise InputError(f"family = {family!r}; allowed: {', '.join([*CASES, 'all'])}")
    if unknown := [name for name in only if name not in SECTIONS]:
        raise InputError(f"only = {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    return [n for n in SECTIONS if (n == "decode") == (family == "decode") and (not only or n in only)]


def check_cuda() -> None:
    """BackendError where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise BackendError("device = 'cuda': this machine has no CUDA GPU, or its torch can't use it")


def load_triton() -> None:
    """Import the kernels' compiler ahead of any timing."""
    importlib.import_module("momkit.kernels.layout")


def measure(
    family: str, only: Sequence[str], options: Options, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Measure a family section by section; yields the result as it grows, so that what there is can be kept."""
    check_cuda()
    load_triton()
    if options.peer:
        check_peer(options.peer)
        for case in CASES[family]:
            if case.rule in PEERS[options.peer]:
                peer_function(options.peer, case.rule)
    what = "bfloat16 with float32 gates and states; medians between CUDA events, candidates interleaved, L2 flushed"
    result = {"what": what, "family": family, "rounds": options.rounds, "peer": options.peer}
    result |= environment("cuda", ("momkit", "torch", "triton", *([options.peer] if options.peer else [])))
    for name in sections_of(family, only):
        start = time.perf_counter()
        result[name] = list(SECTIONS[name](CASES[family], options))
        say(f"{family}: {name}, {time.perf_counter() - start:.0f} s")
        yield result
