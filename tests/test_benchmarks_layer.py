"""The layer's GPU benchmark, run through on a CPU that stands in for a GPU: what it checks, holds and writes."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from momkit.benchmarks import cuda, layer, layer_cases, layer_report, peers
from momkit.benchmarks.layer_cases import Shape
from momkit.benchmarks.timing import interleaved
from momkit.cli.main import make_app
from momkit.errors import BackendError, InputError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


@pytest.fixture
def stand_in(monkeypatch, gpu_on_cpu):
    """A GPU of the CPU: few tokens, one head of 16, perf_counter for events, calls for graphs."""
    monkeypatch.setattr(cuda, "interleaved_cuda", interleaved)
    monkeypatch.setattr(layer, "captured", lambda call: call)
    monkeypatch.setattr(layer, "peak_bytes", lambda call: 2**20)
    monkeypatch.setattr(layer, "environment", lambda *_: {"hardware": "none", "versions": {}, "date": "2026-01-01"})
    monkeypatch.setattr(layer, "check_cuda", lambda: None)
    monkeypatch.setattr(layer, "load_triton", lambda: None)
    monkeypatch.setattr(layer, "SHAPES", (Shape(32, 2, 16), Shape(32, 1, 32)))
    monkeypatch.setattr(layer, "SMALL", Shape(32, 2, 16))
    monkeypatch.setattr(layer, "BATCHES", (1, 3))
    monkeypatch.setattr(layer_cases, "HEADS", 1)
    monkeypatch.setattr(layer_cases, "DIM", 16)
    monkeypatch.setattr(layer_cases, "CHECKED", 24)
    monkeypatch.setattr(layer_cases, "PROMPT", 8)


def run(sections, peer=None):
    said: list[str] = []
    *_, result = layer.measure(sections, cuda.Options(2, peer), said.append)
    assert len(said) == len(sections)
    result["bars"] = layer_report.bars(result)
    return json.loads(json.dumps(result)), layer_report.markdown(result)


class OfPeer(nn.Module):
    """What a peer's layer looks like: several results, the router's logits last where it routes."""

    def __init__(self, routes):
        super().__init__()
        self.gate, self.o_proj = nn.Linear(32, 4).bfloat16(), nn.Linear(32, 32).bfloat16()
        self.num_memories, self.topk, self.routes = 4, 2, routes

    def forward(self, x, past_key_values=None, use_cache=False):
        logits = self.gate(x)
        output = self.o_proj(x) + logits.sum(-1, keepdim=True)
        return (output, None, past_key_values, *([logits.flatten(0, 1)] if self.routes else []))


@pytest.fixture
def fla(monkeypatch):
    """A peer that is there."""
    parts = {
        "MomAttention": OfPeer,
        "load_balancing_loss_func": lambda logits, memories, topk: logits[0].float().square().mean(),
        "Cache": dict,
    }
    monkeypatch.setattr(layer, "load", lambda peer, op: None)
    monkeypatch.setattr(peers, "load", lambda peer, op: parts[op.function])
    monkeypatch.setattr(layer, "peer_layer", lambda peer, name, spec: OfPeer(name == "mom"))


@needs_no_gpu
def test_training_is_measured_beside_the_peer(stand_in, fla, monkeypatch):
    monkeypatch.setattr(layer_report, "SECONDS", {(32, 2, 16): 5e-3, (32, 1, 32): 9e-3})
    monkeypatch.setattr(layer_report, "PEAK_MIB", {(32, 2, 16): 2})
    result, text = run(["train"], "fla")
    small, long = result["train"]
    assert (small["hidden_size"], small["batch"], small["length"]) == (32, 2, 16)
    assert list(small["forward_backward"]) == ["momkit", "fla mom", "fla gated_deltanet", "momkit, graph"]
    assert set(small["peak_bytes"]) == {"momkit", "fla mom", "fla gated_deltanet"}
    assert {"output", "aux_loss", "dx", "drouter.weight", "dproject.memory_weight"} <= set(long["from_float64"])
    assert small["parameters"]["fla mom"] == 32 * 4 + 4 + 32 * 32 + 32
    assert [(bar["allowed"], bar["unit"]) for bar in result["bars"]] == [(5, "ms"), (2 / 1024, "GiB"), (9, "ms")]
    assert result["bars"][1]["kept"], "of one MiB, which the stand-in gives"
    assert "Not measured here: routing, decode, first_step, syncs." in text and "nan" not in text


def test_a_training_step_needs_output_and_loss():
    model, x, grad_output = OfPeer(True), torch.randn(2, 3, 32).bfloat16(), torch.randn(2, 3, 32).bfloat16()

    def call(x):
        output, *_, logits = model(x)
        return output, logits.float().square().mean()

    found = layer_cases.training_step(call, model, x, grad_output)()
    start = x.clone().requires_grad_()
    output, loss = call(start)
    ((output * grad_output).sum() + loss).backward()
    for gradient, leaf in zip(found, (start, *model.parameters()), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=2e-2, atol=2e-2)
    without = layer_cases.training_step(lambda x: (call(x)[0], None), model, x, grad_output)()
    assert not torch.allclose(without[1], found[1], rtol=2e-2, atol=2e-2)


@needs_no_gpu
def test_a_peer_that_fails_is_told_of(stand_in, fla, monkeypatch):
    def failing(peer, name, spec):
        raise RuntimeError("not | on this\nGPU")

    monkeypatch.setattr(layer, "peer_layer", failing)
    result, text = run(["train", "decode"], "fla")
    assert list(result["train"][0]["forward_backward"]) == ["momkit", "momkit, graph"]
    assert result["decode"][1]["peer_errors"] == {"fla mom": "RuntimeError: not | on this\nGPU"}
    lines = text.splitlines()
    assert "| hidden 32, 2 x 16 | fla mom | failed: RuntimeError: not / on this GPU |  |  |  |" in lines
    assert "| 3 | fla mom | failed: RuntimeError: not / on this GPU |  |  |" in lines


@needs_no_gpu
def test_routing_is_what_the_rows_say(stand_in):
    result, text = run(["routing"])
    skewed, many = result["routing"]
    assert skewed["load"]["collapsed"] == [0.5, 0.5, 0.0, 0.0]
    assert min(skewed["load"]["balanced"]) > 0 and max(skewed["load"]["balanced"]) < 0.5
    assert [len(load) for load in many["load"].values()] == [4, 16]
    assert [bar["allowed"] for bar in result["bars"]] == [1.3, 1.15]
    assert "collapsed | " in text and "| 0.50 0.50 0.00 0.00 |" in text


@needs_no_gpu
def test_decoding_counts_the_bytes_it_must_move(stand_in, fla):
    result, _ = run(["decode"], "fla")
    one, three = result["decode"]
    for row in (one, three):
        assert list(row["seconds"]) == ["momkit", "momkit, graph", "fla mom"]
        assert row["seconds"]["momkit"] == pytest.approx(row["timings"]["momkit"]["median"] / layer.LAYERS)
        assert row["seconds"]["fla mom"] == row["timings"]["fla mom"]["median"]
        assert row["share"] == pytest.approx(row["bytes"] / row["seconds"]["momkit, graph"] / 3.35e12)
    # one sequence: 3 of 5 memories' states [1, 16, 16] fp32 and conv histories 3 x (q, k, v) bf16, in and out
    states = 2 * 3 * (16 * 16 * 4 + 3 * 48 * 2)
    # q, k v beta dt of 3 memories, convs, gate and output projection in bf16, norm; router, A_log, dt_bias in fp32
    weights = 2 * (16 * 32 + 3 * 34 * 32 + 48 * 4 + 2 * 16 * 32 + 16) + 4 * (4 * 32 + 2)
    assert one["bytes"] == states + weights + 2 * 2 * 32
    assert three["bytes"] > one["bytes"] + 2 * states


@needs_no_gpu
@pytest.mark.parametrize("name", ["out_proj.weight", "router.weight"])
def test_a_block_that_differs_from_float64_is_not_timed(stand_in, monkeypatch, name):
    exact = layer_cases.float64_block

    def other(block):
        wide = exact(block)
        with torch.no_grad():
            weight = wide.get_parameter(name)
            weight.copy_(-weight if name == "router.weight" else 1.1 * weight)
        return wide

    monkeypatch.setattr(layer_cases, "float64_block", other)
    expected = "choices are others" if name == "router.weight" else "output is .* of its norm away"
    for section in ("train", "decode"):
        with pytest.raises(ArithmeticError, match=expected):
            run([section])


@needs_no_gpu
def test_waits_are_counted(stand_in, monkeypatch):
    mode = {"now": "default"}

    def wait():
        if mode["now"] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def item(self):
        wait()
        return 0.0

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda now: mode.update(now=now))
    monkeypatch.setattr(torch.Tensor, "item", item)
    assert [layer.count_syncs(lambda n=n: [wait() for _ in range(n)]) for n in (0, 3)] == [0, 3]
    assert mode["now"] == "default"
    with pytest.raises(ZeroDivisionError):
        layer.count_syncs(lambda: 1 // (mode["now"] == "default"))
    assert mode["now"] == "default"
    monkeypatch.setattr(layer, "small_step", lambda: wait)
    result, text = run(["syncs"])
    assert [row["syncs"] for row in result["syncs"]] == [1, 0]
    assert [bar["kept"] for bar in result["bars"]] == [False, True]
    assert "| training step | 1 |" in text.splitlines()
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.0)
    with pytest.raises(RuntimeError, match="one synchronisation was counted as 0"):
        run(["syncs"])


def test_the_first_step_is_of_a_process_of_its_own(monkeypatch):
    def process(command, env, **_):
        assert command[1:] == ["-c", "from momkit.benchmarks import layer; layer.print_first_step()"]
        assert env["TRITON_CACHE_DIR"]
        return SimpleNamespace(returncode=codes.pop(), stdout="noise\n3.5\n", stderr="no GPU")

    codes = [1, 0]
    monkeypatch.setattr(cuda.subprocess, "run", process)
    [row] = layer.first_step(cuda.Options())
    assert row["seconds"] == 3.5
    with pytest.raises(RuntimeError, match="failed in a process of its own: no GPU"):
        list(layer.first_step(cuda.Options()))


def timing(seconds):
    return {"median": seconds, "fastest": seconds, "slowest": seconds, "p20": seconds, "p80": 2 * seconds, "calls": 3}


def made_up():
    shape = {"hidden_size": 1024, "batch": 8, "length": 2048}
    head = {"what": "bf16", "rounds": 3, "peer": "fla", "date": "2026-01-01", "hardware": "H100"}
    seconds = {"momkit": 8e-3, "fla mom": 40e-3, "fla gated_deltanet": 10e-3, "momkit, graph": 7e-3}
    peak = {"momkit": 2 * 2**30, "fla mom": 3 * 2**30, "fla gated_deltanet": 2**30}
    return head | {
        "versions": {"torch": "2.11.0", "fla": "0.6.0", "triton": None},
        "train": [{**shape, "forward_backward": {n: timing(s) for n, s in seconds.items()}, "peak_bytes": peak}],
        "routing": [
            {
                "load": {"balanced": [0.25] * 4, "collapsed": [0.5, 0.5, 0.0, 0.0]},
                "forward_backward": {"balanced": timing(2e-3), "collapsed": timing(3e-3)},
            },
            {
                "load": {"4 memories": [0.25] * 4, "16 memories": [0.0625] * 16},
                "forward_backward": {"4 memories": timing(2e-3), "16 memories": timing(2.2e-3)},
            },
        ],
        "decode": [
            {
                "batch": 1,
                "seconds": {"momkit": 90e-6, "momkit, graph": 12e-6, "fla mom": 7e-3},
                "bytes": 2**25,
                "share": 0.8,
            }
        ],
        "first_step": [{**shape, "seconds": 7.0}],
        "syncs": [{"what": "training step", "syncs": 0}, {"what": "decoding step", "syncs": 2}],
    }


def test_bars_say_what_is_kept():
    assert {bar["promise"]: bar["kept"] for bar in layer_report.bars(made_up())} == {
        "hidden 1024, 8 x 2048, training step": False,
        "hidden 1024, 8 x 2048, peak memory": False,
        "training step, collapsed by balanced": False,
        "training step, 16 memories by 4 memories": True,
        "decoding step of batch 1, graph": True,
        "first training step": True,
        "host synchronisations in a training step": True,
        "host synchronisations in a decoding step": False,
    }


def test_markdown_of_a_made_up_result():
    text = layer_report.markdown(made_up())
    for line in (
        "# GPU timings: the layer",
        "bf16. H100, torch 2.11.0, fla 0.6.0, 2026-01-01.",
        "Made by `momkit bench --device cuda --layer --peer fla --rounds 3`.",
        "| hidden 1024, 8 x 2048, training step | 8 ms | 5 ms | no |",
        "| hidden 1024, 8 x 2048 | fla mom | 40.000 (40.000 to 80.000) | 5.00 | 0.41 | 3072 |",
        "| hidden 1024, 8 x 2048 | momkit, graph | 7.000 (7.000 to 14.000) | 0.88 | 2.34 |  |",
        "| collapsed | 3.000 (3.000 to 6.000) | 1.50 | 0.50 0.50 0.00 0.00 |",
        "| 1 | momkit | 90.0 |  |  |",
        "| 1 | momkit, graph | 12.0 | 32.0 | 80 |",
        "| hidden 1024, 8 x 2048 | 7.0 |",
        "| decoding step | 2 |",
    ):
        assert line in text.splitlines(), text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    heads = [i for i, line in enumerate(tables) if line.startswith("|---")]
    for start, after in zip(heads, [*heads[1:], len(tables) + 1], strict=True):
        assert set(widths[start - 1 : after - 1]) == {widths[start]}


@pytest.fixture
def momkit():
    """Run the command in this process: `momkit("bench", "--layer")`."""
    app = make_app()
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], prog_name="momkit")


def test_options_that_are_refused(momkit, monkeypatch):
    refused = {
        ("--layer",): "--layer belongs to --device cuda",
        ("--device", "cuda", "--layer", "--family", "delta"): "it does not go with --layer",
        ("--device", "cuda", "--layer", "--only", "ragged"): "allowed with --layer: train, routing, decode, first_step",
        ("--device", "cuda", "--layer", "--peer", "other"): "peer = 'other'; allowed: fla",
    }
    for args, reason in refused.items():
        result = momkit("bench", *args)
        assert result.exit_code == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(layer, "check_cuda", lambda: None)
    monkeypatch.setattr(layer, "load_triton", lambda: None)
    monkeypatch.setitem(peers.PEER_LAYERS["fla"], "mom", peers.PeerOp("no_such_module", "Layer"))
    result = momkit("bench", "--device", "cuda", "--layer", "--peer", "fla")
    assert result.exit_code == 2 and "no_such_module" in result.stderr
    assert "pip install flash-linear-attention" in result.stderr


@needs_no_gpu
def test_without_a_gpu_it_says_so(momkit):
    with pytest.raises(BackendError, match="has no CUDA GPU"):
        list(layer.measure([], cuda.Options()))
    result = momkit("bench", "--device", "cuda", "--layer")
    assert result.exit_code == 2 and "has no CUDA GPU" in result.stderr


def test_the_layer_is_written_as_it_grows(momkit, monkeypatch, tmp_path):
    def measure(only, options, say):
        assert (only, options) == (["syncs"], cuda.Options(5, "fla"))
        say("layer: started")
        result = made_up()
        syncs = result.pop("syncs")
        yield result
        seen.append("syncs" in json.loads((tmp_path / "cuda_layer.json").read_text()))
        yield result | {"syncs": syncs}

    seen: list[bool] = []
    monkeypatch.setattr(layer, "measure", measure)
    args = ("--device", "cuda", "--layer", "--peer", "fla", "--only", "syncs", "--rounds", "5")
    result = momkit("bench", *args, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert seen == [False]
    assert len(json.loads(result.stdout)["layer"]["bars"]) == 8 and "layer: started" in result.stderr
    assert json.loads((tmp_path / "cuda_layer.json").read_text())["syncs"][1]["syncs"] == 2
    assert "| decoding step | 2 |" in (tmp_path / "cuda_layer.md").read_text()
    text = momkit("bench", *args)
    assert text.exit_code == 0 and "decoding step" in text.stdout


@pytest.mark.parametrize("name", ["mom", "gated_deltanet"])
def test_peers_layers_get_our_sizes(monkeypatch, name):
    given = {}

    class Layer(nn.Module):
        def __init__(self, **fields):
            super().__init__()
            given.update(fields)
            self.o_proj, self.A_log, self.dt_bias = (nn.Parameter(torch.ones(2)) for _ in range(3))

    monkeypatch.setattr(peers, "load", lambda peer, op: Layer)
    made = peers.peer_layer("fla", name, layer_cases.layer_spec(2048))
    sizes = {"hidden_size": 2048, "num_heads": 4, "head_dim": 256, "expand_v": 1, "conv_size": 4, "norm_eps": 1e-6}
    memories = {"num_memories": 4, "topk": 2, "shared_mem": True} if name == "mom" else {}
    assert given == {**sizes, **memories, "layer_idx": 0}
    dtypes = {n: p.dtype for n, p in made.named_parameters()}
    assert dtypes == {"o_proj": torch.bfloat16, "A_log": torch.float32, "dt_bias": torch.float32}


def test_a_peers_step_follows_its_prompt(fla):
    seen = []

    class Layer(OfPeer):
        def forward(self, x, past_key_values=None, use_cache=False):
            assert not self.training and use_cache and not torch.is_grad_enabled()
            seen.append((x.shape, past_key_values))
            return super().forward(x, past_key_values)

    step = peers.peer_step("fla", Layer(True), torch.zeros(3, 5, 32, dtype=torch.bfloat16))
    assert step(torch.zeros(3, 32, dtype=torch.bfloat16)).shape == (3, 32)
    assert [shape for shape, _ in seen] == [(3, 5, 32), (3, 1, 32)] and seen[0][1] is seen[1][1]


def test_unknown_sections_are_refused():
    assert layer.sections_of(["syncs", "train"]) == ["train", "syncs"]
    with pytest.raises(InputError, match="only = 'short'; allowed with --layer: train, "):
        layer.sections_of(["short"])
