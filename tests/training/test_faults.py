"""Faults of users around a run: other data, a device that is not there, a damaged log; each is one InputError."""

import json
import signal

import pytest
import torch

from momkit.errors import CheckpointError, InputError
from momkit.models.lm import LMState, MoMLM
from momkit.models.spec import LMSpec
from momkit.tasks.selective_copy import SelectiveCopySpec
from momkit.testing.targets import subjects_of
from momkit.training.checkpoint import load_checkpoint
from momkit.training.config import TrainConfig, check_device
from momkit.training.folder import RunFolder
from momkit.training.loop import train
from momkit.training.trainer import Trainer


def config(path, **changes):
    task = {"kind": "bytes", "paths": [str(path)], "seq_len": 16, "eval_examples": 2}
    model = {"hidden_size": 8, "num_layers": 1, "block": {}}
    return TrainConfig.model_validate(
        {"model": model, "task": task, "steps": 2, "batch_size": 2, "warmup": 0} | changes
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.mkdir()
    (path / "a.txt").write_text("a few words to learn, " * 40)
    return path


def test_resume_refuses_other_data(text, tmp_path):
    run = config(text, checkpoint_every=1)
    train(run, tmp_path / "run")
    (text / "a.txt").write_text("other words, as many, " * 40)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(InputError, match="was trained on other data"):
        train(run, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


@pytest.mark.parametrize("device", ["cuda:99", "mps", "meta", "nonsense"])
def test_devices_that_are_not_there(device, text, tmp_path):
    with pytest.raises(InputError, match=f"device = '{device}'"):
        check_device(device)
    train(config(text), tmp_path / "run")
    with pytest.raises(InputError, match=f"device = '{device}'"):
        load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").build(device)


@pytest.mark.parametrize("line", [b"5\n{}\n", b'{"kind": "step"}\n{}\n', b"\xff\xfe\n"])
def test_damaged_log(line, tmp_path):
    folder = RunFolder(tmp_path)
    folder.log.write_bytes(line)
    with pytest.raises(CheckpointError, match=r"log\.jsonl"):
        folder.records()


def test_an_interrupted_step_is_logged(text, tmp_path, monkeypatch):
    """Ctrl-C inside the optimizer's step: the step counts, so its line is there."""
    step, calls = Trainer.train_step, []

    def interrupted(self):
        calls.append(self.step)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    result = train(config(text), tmp_path / "run")
    assert result.interrupted and result.step == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1]


def model(**changes):
    torch.manual_seed(0)
    return MoMLM(LMSpec(vocab_size=9, hidden_size=8, num_layers=2, block={"hidden_size": 8}, **changes))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CASES = {
    "state of another batch": (lambda m: m(TOKENS, m.initial_state(1)), "state"),
    "state of another depth": (lambda m: m(TOKENS, LMState(m.initial_state(2).layers[:1])), "state.layers are"),
    "state no state": (lambda m: m(TOKENS, {}), "state must be a LMState"),
    "step with another batch": (lambda m: m.step(TOKENS[0], m.initial_state(2)), "state"),
    "mask of twos": (lambda m: m(TOKENS, mask=torch.full((2, 3), 2)), "mask holds"),
    "mask of floats": (lambda m: m(TOKENS, mask=torch.full((2, 3), 0.5)), "mask is torch.float32"),
    "mask a list": (lambda m: m(TOKENS, mask=[[1]]), "mask must be a tensor"),
    "targets beyond the vocabulary": (lambda m: m.loss(TOKENS, TOKENS + 9), "targets holds"),
    "targets of floats": (lambda m: m.loss(TOKENS, TOKENS.float()), "targets must be int32 or int64"),
    "chunks of nothing": (lambda m: m.loss(TOKENS, TOKENS, chunk_tokens=0), "chunk_tokens = 0"),
}


@pytest.mark.parametrize("attention", [(), (0,), (0, 1)], ids=["mom", "hybrid", "attention"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_model_refuses(case, attention):
    call, words = CASES[case]
    with pytest.raises(InputError) as caught:
        call(model(attention_layers=attention))
    assert words in str(caught.value)


@pytest.mark.parametrize("attention", [(), (0,)])
def test_autocast(attention):
    lm = model(attention_layers=attention)
    with torch.autocast("cpu", torch.bfloat16):
        out = lm(TOKENS)
        assert out.hidden_states.isfinite().all()
        assert lm.step(TOKENS[:, 0], out.state).isfinite().all()


def test_slices_that_would_be_scored_as_one():
    twice = [{"seq_len": 64, "num_tokens": 8}, {"seq_len": 128, "num_tokens": 8}]
    with pytest.raises(ValueError, match=r"eval has several slices of load \[8\]"):
        SelectiveCopySpec(eval=twice)


@pytest.mark.parametrize("name", ["gla(", "gla(num_heads", "gla(num_heads)", "gla)x"])
def test_targets_that_are_no_names(name):
    with pytest.raises(InputError, match="can't be checked"):
        subjects_of(name)


def test_keys_said_twice():
    with pytest.raises(InputError, match="'hidden_size' is said twice"):
        LMSpec.from_yaml("hidden_size: 8\nvocab_size: 3\nhidden_size: 16\n")
