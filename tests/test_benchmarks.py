"""Timings are fair, and what the README quotes is what the committed result files say."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from momkit.benchmarks import cpu, cuda_report, layer_report
from momkit.benchmarks.timing import interleaved

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def committed() -> dict:
    return json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))


def test_candidates_take_turns():
    calls: list[str] = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "ab" * 4
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert all(t.fastest <= t.median <= t.slowest for t in timings.values())


def test_nothing_is_timed_that_disagrees():
    x = torch.randn(5)
    assert cpu.agree({"a": x, "b": x + 1e-6}) < 1e-3
    for other in (x + 1.0, torch.full_like(x, torch.nan)):
        with pytest.raises(ArithmeticError, match="the candidates disagree"):
            cpu.agree({"a": x, "b": other})


def test_table_is_that_of_its_measurement():
    result = committed()
    assert cpu.markdown(result) == (RESULTS / "cpu.md").read_text(encoding="utf-8")
    assert cpu.bars(result) == result["bars"]


def test_readme_quotes_the_timings():
    section = README.split("On a CPU (")[1]
    against_step, against_transformers, by_length, block = cpu.bars(committed()).values()
    for quoted in (f"{against_step:.1f}x", f"{against_transformers:.1f}x", f"| {by_length:.2f} |", f"| {block:.1f} |"):
        assert quoted in section


@pytest.mark.parametrize("family", ["scalar", "delta", "decode"])
def test_gpu_tables_are_those_of_their_measurement(family: str):
    result = json.loads((RESULTS / f"cuda_{family}.json").read_text(encoding="utf-8"))
    assert cuda_report.markdown(result) == (RESULTS / f"cuda_{family}.md").read_text(encoding="utf-8")
    assert cuda_report.bars(result) == result["bars"]
    section = README.split(f"On one {result['hardware']} with Triton {result['versions']['triton']}")[1]
    for row in result.get("ragged", ()):
        cells = [cuda_report.case(row)]
        for passes in ("forward", "forward_backward"):
            cells += [f"{row[passes][name]['median'] * 1e3:.2f}" for name in ("momkit", "fla")]
        cells += [f"{row['peak_bytes'][name] / 2**20:,.0f}" for name in ("momkit", "fla")]
        assert f"| {' | '.join(cells)} |" in section


def test_readme_quotes_the_demo():
    runs = json.loads((RESULTS / "demo" / "results.json").read_text(encoding="utf-8"))["recall"]
    for name, label in (("one_memory", "one memory"), ("wide_memory", "one memory, as large as MoM"), ("mom", "MoM")):
        mine = [run for run in runs if run["model"] == name]
        cells = []
        for group in ("4", "8", "12"):
            values = [run["by_group"][group] for run in mine]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}".replace("0.", "."))
        sizes = f"{mine[0]['state_bytes_total']:,} | {mine[0]['state_bytes_active']:,}"
        assert f"| {label} | {' | '.join(cells)} | {sizes} |" in README


def test_gpu_results_without_a_peer_are_those_of_their_measurement():
    read = {n: (RESULTS / f"cuda_{n}.json").read_text(encoding="utf-8") for n in ("layer", "channel")}
    layer, channel = json.loads(read["layer"]), json.loads(read["channel"])
    for name, result, report in (("layer", layer, layer_report), ("channel", channel, cuda_report)):
        assert report.markdown(result) == (RESULTS / f"cuda_{name}.md").read_text(encoding="utf-8")
        assert report.bars(result) == result["bars"]
    section = README.split("On the same GPU and work, without a peer beside it")[1].replace("\n", " ")
    times = {cuda_report.case(row): row for row in channel["ragged"]}
    for case, words in (("gla 16x128", "{} ms forward and {} forward and backward"), ("gla 4x256", "4x256 {} and {}")):
        row = times[case]
        quoted = (f"{row[passes]['momkit']['median'] * 1e3:.2f}" for passes in ("forward", "forward_backward"))
        assert words.format(*quoted) in section
    step = next(row for row in layer["train"] if (row["hidden_size"], row["batch"]) == (1024, 8))
    skewed = layer["routing"][0]["forward_backward"]
    assert f"{step['forward_backward']['momkit']['median'] * 1e3:.1f} ms for a training step" in section
    assert f"{skewed['collapsed']['median'] / skewed['balanced']['median']:.2f} times as long" in section
