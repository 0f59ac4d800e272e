"""Options of `bench` and `tune`: what they refuse, and how they end where there is no GPU."""

import json

import pytest
import torch

from momkit.benchmarks import cpu, cuda
from momkit.cli import bench

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")

REFUSED = {
    ("bench", "--device", "tpu"): "device = 'tpu'; allowed: cpu, cuda",
    ("bench", "--peer", "fla"): "--peer, --family and --only belong to --device cuda",
    ("bench", "--only", "ragged"): "--peer, --family and --only belong to --device cuda",
    ("bench", "--device", "cuda", "--peer", "other"): "peer = 'other'; allowed: fla",
    ("bench", "--device", "cuda", "--family", "other"): (
        "family = 'other'; allowed: scalar, delta, channel, decode, all"
    ),
    ("bench", "--device", "cuda", "--only", "other"): "only = 'other'; allowed: ragged, one_sequence, ",
    ("bench", "--device", "cuda", "--family", "scalar", "--only", "decode"): "family = 'scalar' has no section decode",
    ("bench", "--rounds", "0"): "rounds",
    ("tune", "--kernel", "other"): "kernel = 'other'; allowed: scalar_scan, ",
    ("tune", "--dtype", "float64"): "dtype = 'float64'; allowed: bfloat16, float32",
    ("tune", "--size", "32"): "size = '32'; allowed: 64, 128, 256",
}


@pytest.mark.parametrize("args", REFUSED)
def test_wrong_options_are_refused_in_one_line(momkit, args):
    result = momkit(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert REFUSED[args] in result.stderr and len(result.stderr.splitlines()) == 1


@needs_no_gpu
@pytest.mark.parametrize("args", [("bench", "--device", "cuda", "--peer", "fla"), ("tune", "--kernel", "scalar_scan")])
def test_without_a_gpu_it_says_so(momkit, args):
    result = momkit(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "momkit: device = 'cuda': this machine has no CUDA GPU, or its torch can't use it\n"


def test_disagreement_ends_with_code_1(momkit, monkeypatch):
    def disagree(rounds):
        raise ArithmeticError("the candidates disagree by 1.0e+00: nothing was timed")

    monkeypatch.setattr(cpu, "measure", disagree)
    result = momkit("bench")
    assert result.exit_code == 1
    assert result.stderr == "momkit: the candidates disagree by 1.0e+00: nothing was timed\n"


def test_each_family_is_written_as_it_grows(momkit, monkeypatch, tmp_path):
    head = {"what": "bf16", "rounds": 30, "hardware": "H100", "date": "2026-01-01", "versions": {}}
    seen = []

    def measure(family, only, options, say):
        say(f"{family}: started")
        seen.append((family, only, options))
        result = head | {"family": family, "peer": options.peer}
        yield result
        assert json.loads((tmp_path / f"cuda_{family}.json").read_text())["family"] == family
        result["first_call"] = [{"rule": "mamba2", "heads": 16, "dim": 128, "seconds": 2.0}]
        yield result

    monkeypatch.setattr(cuda, "check_cuda", lambda: None)
    monkeypatch.setattr(bench.cuda, "measure", measure)
    result = momkit("bench", "--device", "cuda", "--peer", "fla", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == ["scalar", "delta", "channel", "decode"]
    assert "scalar: started" in result.stderr
    assert [(family, options.peer) for family, _, options in seen] == [
        ("scalar", "fla"), ("delta", "fla"), ("channel", "fla"), ("decode", None)
    ]  # fmt: skip
    found = json.loads((tmp_path / "cuda_delta.json").read_text())
    assert found["bars"][0]["kept"] and "| mamba2 16x128 | 2.0 |" in (tmp_path / "cuda_delta.md").read_text()
    text = momkit("bench", "--device", "cuda", "--family", "scalar", "--only", "first_call", "--rounds", "3")
    assert text.exit_code == 0 and "mamba2 16x128" in text.stdout
    assert seen[-1] == ("scalar", ["first_call"], cuda.Options(3, None))
