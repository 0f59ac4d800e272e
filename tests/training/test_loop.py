import json
import signal

import pytest
import torch

from momkit.errors import CheckpointError, InputError
from momkit.registry import temporarily
from momkit.tasks.mqar import MQAR, MQARSpec
from momkit.training.folder import RunFolder
from momkit.training.interrupt import deferred_interrupt
from momkit.training.loop import train
from momkit.training.trainer import DivergedError, Trainer, learning_rate

TIMES = ("seconds",)


def losses(path):
    """What the log says happened, without how long it took."""
    kept = [r for r in RunFolder(path).records() if r["kind"] in ("step", "eval")]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in kept]


def weights(path):
    return RunFolder(path).load().part("model")


class InterruptedSpec(MQARSpec):
    kind: str = "interrupted"


class Interrupted(MQAR):
    """MQAR whose batches and evaluations raise KeyboardInterrupt when their number comes."""

    Spec = InterruptedSpec
    stop_batch = stop_evaluation = -1

    def batch(self, generator, batch_size, progress=1.0):
        batch = super().batch(generator, batch_size, progress)
        type(self).stop_batch -= 1
        if type(self).stop_batch == 0:
            raise KeyboardInterrupt
        return batch

    def evaluation(self, batch_size):
        type(self).stop_evaluation -= 1
        if type(self).stop_evaluation == 0:
            raise KeyboardInterrupt
        return super().evaluation(batch_size)


@pytest.fixture
def interrupted(small):
    with temporarily(Interrupted):
        yield small(task=small().task.model_dump() | {"kind": "interrupted"})
    Interrupted.stop_batch = Interrupted.stop_evaluation = -1


@pytest.mark.parametrize("where", ["first batch", "second batch of a step", "evaluation"])
def test_ctrl_c_saves_and_resumes_exactly(interrupted, tmp_path, where):
    whole = train(interrupted, tmp_path / "whole")
    assert whole.step == 6 and not whole.interrupted
    Interrupted.stop_batch = {"first batch": 1, "second batch of a step": 8}.get(where, -1)
    Interrupted.stop_evaluation = 2 if where == "evaluation" else -1
    cut = train(interrupted, tmp_path / "cut")
    assert cut.interrupted
    assert cut.step == {"first batch": 0, "second batch of a step": 3, "evaluation": 4}[where]
    assert RunFolder(tmp_path / "cut").load().step == cut.step
    done = train(interrupted, tmp_path / "cut", resume=True)
    assert done.step == 6 and not done.interrupted
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "noisy_topk", "read_write"])
def test_resume_after_a_kill_is_exact(small, tmp_path, router):
    config = small(model=small().model.model_dump() | {"block": {"num_memories": 3, "router": router}})
    train(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(record):
        if record["kind"] == "step" and record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "cut", on_record=kill)
    assert RunFolder(tmp_path / "cut").load().step == 4
    train(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_same_config_gives_the_same_losses_whatever_came_before(small, tmp_path):
    torch.manual_seed(1)
    train(small(), tmp_path / "a")
    before = torch.get_rng_state()
    torch.rand(3)
    after = torch.get_rng_state()
    train(small(), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
    train(small(seed=1), tmp_path / "c")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_accumulation_is_a_larger_batch(small):
    model = small().model.model_dump() | {"dropout": 0.0, "aux_loss_scale": 0.0}
    model["block"]["router"] = {"kind": "softmax_topk"}
    trainer = Trainer(small(model=model, clip=None))
    batches = [trainer.task.batch(torch.Generator().manual_seed(i), 4, 1.0) for i in range(2)]
    drawn = iter(batches)
    trainer.task.batch = lambda *args: next(drawn)
    trainer.train_step()
    both = torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches])
    bounds = torch.cat([batches[0].cu_seqlens, batches[1].cu_seqlens[1:] + len(batches[0].tokens)])
    accumulated = [p.grad.clone() for p in trainer.model.parameters()]
    fresh = Trainer(small(model=model, clip=None))
    fresh.model.loss(*both, bounds).loss.backward()
    for a, p in zip(accumulated, fresh.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_clipping(small):
    trainer = Trainer(small(clip=1e-3))
    record = trainer.train_step()
    assert record["grad_norm"] > 1e-3
    assert sum(p.grad.square().sum() for p in trainer.model.parameters()).sqrt() <= 1e-3 * 1.001


def test_router_is_told_the_load_of_the_step_once(small, monkeypatch):
    trainer = Trainer(small())
    told = []
    for block in trainer.model.blocks():
        monkeypatch.setattr(block.router, "update", lambda load: told.append(load))
    record = trainer.train_step()
    assert len(told) == 2
    for load, logged in zip(told, record["load"], strict=True):
        assert int(load.sum()) == 2 * record["tokens"]  # two choices a token, both batches
        assert logged == pytest.approx((load / load.sum()).tolist())


def test_learning_falls(small, tmp_path):
    task = {"kind": "mqar", "vocab_size": 8, "train": [{"seq_len": 8, "num_pairs": 1}], "eval_examples": 64}
    task["eval"] = task["train"]
    model = {"hidden_size": 32, "num_layers": 1}
    model["block"] = {"num_memories": 2, "mechanism": {"kind": "deltanet", "num_heads": 1, "head_dim": 8}}
    config = small(model=model, task=task, steps=100, batch_size=16, accumulation=1, lr=2e-2, eval_every=0)
    result = train(config, tmp_path / "run")
    assert result.evaluation["accuracy"] > 0.9
    assert result.evaluation["by_group"] == {"1": result.evaluation["accuracy"]}


def test_documents_become_sequences(small, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document number {i} of a few\n" * 3)
    config = small(task={"kind": "bytes", "paths": [str(tmp_path / "text")], "seq_len": 64})
    batch = Trainer(config).task.batch(torch.Generator().manual_seed(0), 4)
    assert len(batch.cu_seqlens) > 5
    result = train(config, tmp_path / "run")
    assert result.evaluation["bits_per_byte"] == pytest.approx(result.evaluation["loss"] / 0.6931472, rel=1e-5)
    assert len(RunFolder(tmp_path / "run").records("run")[0]["data"]["sha256"]) == 64


def test_divergence_stops_the_run(small, tmp_path, monkeypatch):
    healthy = Trainer.train_step

    def train_step(trainer):
        if trainer.step == 3:
            trainer.model.embedding.weight.data.fill_(torch.nan)
        return healthy(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(DivergedError, match="step 4"):
        train(small(), tmp_path / "run")
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_nothing_is_overwritten(small, tmp_path):
    train(small(steps=2), tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="exists"):
        train(small(), tmp_path / "run")
    with pytest.raises(InputError, match="steps"):
        train(small(), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="no run folder"):
        train(small(), tmp_path / "nothing", resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "nothing").exists()


def test_a_finished_run_resumed_does_nothing(small, tmp_path):
    first = train(small(), tmp_path / "run")
    before = losses(tmp_path / "run")
    again = train(small(), tmp_path / "run", resume=True)
    assert again.step == 6 and again.evaluation == first.evaluation
    assert losses(tmp_path / "run") == before


def test_interrupt_waits_for_the_block():
    seen = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        seen.append("the rest")
    assert seen == ["the rest"]


def test_schedule(small):
    config = small(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(small(steps=100, schedule="constant", lr=1.0), 99) == 1.0


def test_log_is_json_lines(small, tmp_path):
    train(small(), tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["run", "step", "step", "eval", "step", "step", "eval", "step", "step", "eval"]
    first = json.loads(lines[1])
    assert {"loss", "cross_entropy", "aux_loss", "grad_norm", "lr", "tokens", "load"} <= set(first)
