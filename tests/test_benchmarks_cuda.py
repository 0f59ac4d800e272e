"""GPU benchmarks and the tuner, run through on a CPU that stands in for a GPU: what they check, hold and write."""

import json
from dataclasses import astuple

import pytest
import torch

from momkit.benchmarks import cases, cuda, cuda_decode, cuda_report, peers, tune
from momkit.benchmarks.cases import Case, Work, agree, momkit_scan, ragged_lengths, results
from momkit.benchmarks.timing import Timing, interleaved
from momkit.errors import BackendError, InputError
from momkit.kernels import tuning

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
SMALL = {
    "scalar": (Case("mamba2", 16, 128),),
    "delta": (Case("deltanet", 16, 128), Case("gated_deltanet", 16, 128)),
    "decode": (Case("gated_deltanet", 2, 16),),
}


@pytest.fixture
def stand_in(monkeypatch, gpu_on_cpu):
    """A GPU of the CPU: the chunked form for kernels, perf_counter for events, few tokens."""

    def scan_there(case, backend="chunked"):
        return momkit_scan(case, "chunked")

    def timed(candidates, rounds):
        return interleaved(candidates, rounds)

    for module in (cuda, tune, cases):
        monkeypatch.setattr(module, "momkit_scan", scan_there)
    for module in (cuda, cuda_decode, tune):
        monkeypatch.setattr(module, "interleaved_cuda", timed)
    for module in (cuda, cuda_decode):
        monkeypatch.setattr(module, "captured", lambda call: call)
    for module in (cuda, tune):
        monkeypatch.setattr(module, "ragged_lengths", lambda tokens=64: [tokens // 2, 0, tokens - tokens // 2])
    original = cuda_decode.decode
    monkeypatch.setattr(cuda_decode, "decode", lambda *args, backend: original(*args, backend="reference"))
    monkeypatch.setattr(cuda, "peak_bytes", lambda call: 2**20)
    monkeypatch.setattr(cuda, "environment", lambda *_: {"hardware": "none", "versions": {}, "date": "2026-01-01"})
    monkeypatch.setattr(cuda, "check_cuda", lambda: None)
    monkeypatch.setattr(cuda, "load_triton", lambda: None)
    monkeypatch.setattr(cuda, "CASES", SMALL)
    monkeypatch.setattr(cuda, "TOKENS", 64)
    monkeypatch.setattr(cuda, "SEGMENT", 16)
    monkeypatch.setattr(cuda, "LENGTHS", (32, 64))
    monkeypatch.setattr(cuda, "SHORT", (32,))
    monkeypatch.setattr(cuda_decode, "BATCHES", (1, 4))
    monkeypatch.setattr(cuda_decode, "POOL_ROWS", 8)


SECTIONS = ["ragged", "one_sequence", "by_length", "short", "decode"]


@needs_no_gpu
@pytest.mark.parametrize("family", SMALL)
def test_a_family_is_measured_section_by_section(stand_in, monkeypatch, family):
    monkeypatch.setattr(cuda, "peer_function", lambda *_: None)
    monkeypatch.setattr(cuda, "peer_scan", lambda peer, rule: momkit_scan(Case(rule, 16, 128), "reference"))
    peer = "fla" if family != "decode" else None
    said: list[str] = []
    grown = [len(r) for r in cuda.measure(family, SECTIONS, cuda.Options(2, peer), said.append)]
    assert grown == sorted(set(grown)) and len(said) == len(grown) == (1 if family == "decode" else 4)
    *_, result = cuda.measure(family, SECTIONS, cuda.Options(2, peer), said.append)
    result["bars"] = cuda_report.bars(result)
    assert len(result["bars"]) == {"scalar": 6, "delta": 12, "decode": 0}[family]
    text = cuda_report.markdown(json.loads(json.dumps(result)))
    for case in SMALL[family]:
        assert f"| {case} | " in text
    assert "nan" not in text
    if peer:
        assert set(result["ragged"][0]["forward"]) == {"momkit", "fla"}
        assert result["ragged"][0]["from_peer"]["output"] < 1e-2


@needs_no_gpu
def test_a_peer_that_fails_is_told_of_and_one_that_disagrees_stops(stand_in, monkeypatch):
    def failing(peer, rule):
        def call(inputs, cu_seqlens):
            raise RuntimeError("not on this GPU")

        return call

    monkeypatch.setattr(cuda, "peer_function", lambda *_: None)
    monkeypatch.setattr(cuda, "peer_scan", failing)
    *_, result = cuda.measure("scalar", ["ragged"], cuda.Options(1, "fla"), lambda _: None)
    assert result["ragged"][0]["peer_error"] == "RuntimeError: not on this GPU"
    assert list(result["ragged"][0]["forward"]) == ["momkit"]
    assert "failed: RuntimeError: not on this GPU" in cuda_report.markdown(result)

    def other(peer, rule):
        def call(inputs, cu_seqlens):
            output, final = momkit_scan(Case(rule, 16, 128), "chunked")(inputs, cu_seqlens)
            return 1.05 * output, final

        return call

    monkeypatch.setattr(cuda, "peer_scan", other)
    with pytest.raises(ArithmeticError, match="mamba2 16x128, against fla: output is"):
        list(cuda.measure("scalar", ["ragged"], cuda.Options(1, "fla"), lambda _: None))


@needs_no_gpu
def test_what_does_not_fit_says_so(stand_in, monkeypatch):
    def at_length(case, tokens):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda, "at_length", at_length)
    *_, result = cuda.measure("scalar", ["by_length"], cuda.Options(1), lambda _: None)
    assert [row["skipped"] for row in result["by_length"]] == ["out of memory"] * 2
    assert "| 64 | out of memory |" in cuda_report.markdown(result)


def test_the_segments_of_every_benchmark():
    lengths = ragged_lengths()
    assert len(lengths) == 32 and sum(lengths) == 32768 and min(lengths) > 0 and len(set(lengths)) > 25
    assert lengths == ragged_lengths() and sum(ragged_lengths(4096)) == 4096
    work = Work.of(Case("gated_deltanet", 2, 16), [3, 0, 6], "cpu")
    assert work.cu_seqlens.tolist() == [0, 3, 3, 9]
    assert {n: x.dtype for n, x in work.inputs.items()} == {
        "q": torch.bfloat16, "k": torch.bfloat16, "v": torch.bfloat16, "g": torch.float32, "beta": torch.bfloat16
    }  # fmt: skip
    assert bool((work.inputs["k"].float().norm(dim=-1) - 1).abs().max() < 1e-2)
    assert bool((work.inputs["g"] < 0).all())
    assert work.first(6).cu_seqlens.tolist() == [0, 2, 3, 6]


def test_agreement_is_by_the_norm_and_refuses_nan():
    x = torch.randn(100)
    assert agree("here", {"output": 1.001 * x}, {"output": x})["output"] == pytest.approx(1e-3, rel=1e-2)
    assert agree("here", {"dq": 1.02 * x}, {"dq": x})["dq"] > 1e-2
    for wrong in (1.02 * x, x * float("nan")):
        with pytest.raises(ArithmeticError, match=r"here: output is .* of its norm away, allowed is 1e-02"):
            agree("here", {"output": wrong}, {"output": x})


def test_float64_is_what_ours_is_held_to():
    case = Case("gated_deltanet", 2, 16)
    work = Work.of(case, [40], "cpu")
    distances = cases.check_against_float64(case, momkit_scan(case, "chunked"), work)
    assert set(distances) == {"output", "final_state", "dq", "dk", "dv", "dg", "dbeta"}


@pytest.mark.parametrize("rule", peers.PEERS["fla"])
def test_peers_are_given_a_batch_axis_their_names_and_our_scale(monkeypatch, rule):
    case, given = Case(rule, 2, 16), {}
    work = Work.of(case, [5, 7], "cpu")

    def function(*, q, k, v, scale, cu_seqlens, g=None, beta=None):
        given.update(scale=scale, g=g, beta=beta, shape=q.shape)
        mine = {"q": q, "k": k, "v": v, "g": g, "gk": g, "beta": beta}
        inputs = {name: mine[name].squeeze(0) for name in work.inputs}
        return momkit_scan(case, "chunked")(inputs, cu_seqlens)[0].unsqueeze(0), None

    monkeypatch.setattr(peers, "peer_function", lambda *_: function)
    got = results(peers.peer_scan("fla", rule), work)
    expected = results(momkit_scan(case, "chunked"), work)
    assert set(got) == set(expected) - {"final_state"}
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert given["shape"] == (1, 12, 2, 16)
    assert given["scale"] == (1.0 if rule == "mamba2" else 0.25)


def test_peers_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(InputError, match="peer = 'other'; allowed: fla"):
        peers.check_peer("other")
    with pytest.raises(InputError, match="peer 'fla' has no counterpart of 'titans'; it has: mamba2, "):
        peers.peer_function("fla", "titans")
    monkeypatch.setitem(peers.PEERS["fla"], "mamba2", peers.PeerOp("no_such_module", "scan"))
    with pytest.raises(InputError, match=r"can't be measured: .*no_such_module.*pip install flash-linear-attention"):
        peers.peer_scan("fla", "mamba2")


def timing(seconds):
    return {"median": seconds, "fastest": seconds, "slowest": seconds, "p20": seconds, "p80": 2 * seconds, "calls": 3}


def made_up():
    facts = {"rule": "mamba2", "heads": 16, "dim": 128, "tokens": 32768}
    head = {"what": "bf16", "family": "scalar", "rounds": 3, "peer": "fla", "date": "2026-01-01", "hardware": "H100"}
    ours = {"momkit": timing(0.2e-3), "fla": timing(0.6e-3)}
    both = {"momkit": timing(1.2e-3), "fla": timing(3e-3)}
    peak = {"momkit": 400 * 2**20, "fla": 1000 * 2**20}
    pair = {"one": timing(2e-3), "ragged": timing(1e-3)}
    return head | {
        "versions": {"torch": "2.11.0", "fla": "0.6.0", "triton": None},
        "ragged": [{**facts, "segments": 32, "forward": ours, "forward_backward": both, "peak_bytes": peak}],
        "one_sequence": [{**facts, "forward": pair, "forward_backward": pair}],
        "by_length": [
            {**facts, "forward_backward": {"momkit": timing(1e-3)}},
            {**facts, "tokens": 65536, "forward_backward": {"momkit": timing(2.2e-3)}},
            {**facts, "tokens": 131072, "skipped": "out of memory"},
        ],
        "first_call": [{**facts, "seconds": 7.0}],
    }


def test_bars_say_what_is_kept():
    kept = {bar["promise"].removeprefix("mamba2 16x128, "): bar["kept"] for bar in cuda_report.bars(made_up())}
    assert kept == {
        "forward": True,
        "forward and backward": False,
        "peak memory as a share of fla's": True,
        "one sequence by ragged, forward": False,
        "one sequence by ragged, forward and backward": False,
        "first call": True,
        "cost per token, most by least": True,
    }


def test_markdown_of_a_made_up_result():
    text = cuda_report.markdown(made_up())
    for line in (
        "# GPU timings: scalar",
        "bf16. H100, torch 2.11.0, fla 0.6.0, 2026-01-01.",
        "| mamba2 16x128, forward | 0.2 ms | 0.26 ms | yes |",
        "| mamba2 16x128, forward and backward | 1.2 ms | 1.1 ms | no |",
        "| mamba2 16x128 | momkit | 0.200 (0.200 to 0.400) | 1.00 | 1.200 (1.200 to 2.400) | 1.00 | 400 |",
        "| mamba2 16x128 | fla | 0.600 (0.600 to 1.200) | 3.00 | 3.000 (3.000 to 6.000) | 2.50 | 1000 |",
        "| mamba2 16x128 | 65536 | 2.200 (2.200 to 4.400) | 33.6 |",
        "| mamba2 16x128 | 7.0 |",
    ):
        assert line in text.splitlines()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    heads = [i for i, line in enumerate(tables) if line.startswith("|---")]
    for head, after in zip(heads, [*heads[1:], len(tables) + 1], strict=True):
        assert set(widths[head - 1 : after - 1]) == {widths[head]}


def test_spread_is_of_the_measured_calls():
    spread = Timing.of([float(x) for x in range(1, 12)], [1.0, 3.0])
    assert (spread.fastest, spread.p20, spread.median, spread.p80, spread.slowest) == (1.0, 3.0, 6.0, 9.0, 11.0)
    assert spread.calls == 11 and spread.host == 2.0
    assert Timing.of([2.0]).p20 == Timing.of([2.0]).p80 == 2.0


def every_entry():
    table = tuning.table()
    return [entry for gpu in table for entry in tune.entries(gpu, table, [], [], [])]


def test_candidates_are_unique_and_legal():
    for entry in every_entry():
        candidates = entry.candidates(tuning.table())
        assert candidates[0] == entry.of(tuning.table()) and 2 <= len(candidates) <= 9
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert 16 <= config.block <= 256 and config.block & (config.block - 1) == 0
            assert config.num_warps in (1, 2, 4, 8) and 1 <= config.num_stages <= 4
        assert entry.case.rule in ("mamba2", "gated_deltanet") and entry.case.dim == int(entry.size)


def test_entries_are_those_asked_for():
    table = {"sm90": {"delta_scan": {"2": {}, "4": {}}, "delta_chain": {"4": {}}}}
    every = tune.entries("sm90", table, [], [], [])
    assert len(every) == 9 and {(e.kernel, e.width, e.dtype) for e in every} == {
        ("delta_scan", "2", torch.bfloat16), ("delta_scan", "4", torch.float32), ("delta_chain", "4", torch.bfloat16)
    }  # fmt: skip
    [one] = tune.entries("sm90", table, ["delta_scan"], [torch.float32], ["128"])
    assert one == tune.Entry("sm90", "delta_scan", "4", "128", torch.float32)
    assert str(one.case) == "gated_deltanet 16x128"


def test_another_table_holds_for_as_long_as_it_is_asked_for():
    table, cpu = tuning.table(), torch.device("cpu")
    entry = tune.Entry("sm90", "scalar_scan", "2", "128", torch.bfloat16)
    other = tuning.Config(16, 2, 1)
    changed = entry.put(table, other)
    assert entry.of(changed) == other != entry.of(table)

    def used():
        return tuning.config("scalar_scan", torch.bfloat16, 128, 128, cpu)

    before = used()
    with pytest.raises(ZeroDivisionError), tune.overridden(changed):
        assert used() == other
        raise ZeroDivisionError
    assert used() == before and tuning.table() is table


def test_the_table_is_written_as_it_is_read():
    table = tuning.table()
    text = tune.text_of(table)
    assert json.loads(text) == table
    assert text.count("\n") == 1 + 1 + sum(2 + sum(2 + len(k) for k in kernels.values()) for kernels in table.values())


def test_a_candidate_must_win_by_more_than_noise():
    slow, fast = tuning.Config(32, 4, 1), tuning.Config(64, 4, 1)
    assert tune.choose(slow, {slow: 1.0, fast: 0.9}) == fast
    assert tune.choose(slow, {slow: 1.0, fast: 0.99}) == slow


@needs_no_gpu
def test_tuning_measures_what_agrees_and_leaves_other_gpus_alone(stand_in, monkeypatch):
    monkeypatch.setattr(tune, "compile_all", lambda jobs: None)
    table = tuning.table()
    entry = tune.Entry("sm90", "scalar_scan", "2", "64", torch.bfloat16)
    bad, missing, best = (tuning.Config(*c) for c in ((32, 4, 1), (32, 4, 2), (64, 8, 2)))

    def scan_there(case, backend="chunked"):
        def call(inputs, cu_seqlens):
            config = tuning.config("scalar_scan", torch.bfloat16, 64, 64, torch.device("cpu"))
            if config == missing:
                raise RuntimeError("out of shared memory")
            output, final_state = momkit_scan(case, "chunked")(inputs, cu_seqlens)
            return output * (2 if config == bad else 1), final_state

        return call

    def timed(candidates, rounds):
        return {name: Timing.of([0.1 if name == str(astuple(best)) else 1.0]) for name in candidates}

    monkeypatch.setattr(tune, "momkit_scan", scan_there)
    monkeypatch.setattr(tune, "interleaved_cuda", timed)
    tuned, [report] = tune.tune([entry], table, 1, lambda _: None)
    by_config = {tuple(row["config"]): row for row in report["candidates"]}
    assert "of its norm away" in by_config[astuple(bad)]["wrong"]
    assert by_config[astuple(missing)]["failed"] == "RuntimeError: out of shared memory"
    assert report["chosen"] == [64, 8, 2] and entry.of(tuned) == best
    assert tuned["small"] == table["small"] and entry.of(tuning.table()) == entry.of(table) != best


@needs_no_gpu
def test_a_machine_without_a_gpu_is_told():
    with pytest.raises(BackendError, match="has no CUDA GPU"):
        cuda.check_cuda()
