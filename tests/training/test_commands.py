import json
import os
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

from momkit.cli.main import make_app
from momkit.training.folder import RunFolder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = make_app(("train",))

    def invoke(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return invoke


@pytest.fixture
def config(small, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(small(steps=2).to_yaml())
    return path


def test_train_then_generate(run, config, tmp_path):
    done = run("train", config, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["step"] == 2 and document["run"] == "runs/tiny" and len(document["plots"]) == 4
    first, again = (run("generate", "runs/tiny", "--prompt", "1 9", "--max-tokens", 5, "--seed", 3) for _ in range(2))
    assert first.exit_code == 0 and first.stdout == again.stdout
    assert first.stdout.startswith("1 9 ") and len(first.stdout.split()) == 7
    document = json.loads(
        run("generate", "runs/tiny", "--prompt", "1 9", "--max-tokens", 5, "--seed", 3, "--json").stdout
    )
    assert document["text"] + "\n" == first.stdout and len(document["tokens"]) == 5


def test_faults_are_one_line_and_exit_2(run, config, small, tmp_path):
    assert run("train", config, "--no-plots").exit_code == 0
    log = (tmp_path / "runs/tiny/log.jsonl").read_bytes()
    bad = tmp_path / "bad.yaml"
    bad.write_text(small().to_yaml() + "stepz: 3\n")
    for args, named in (
        (("train", config), "exists"),
        (("train", config, "--resume", "--steps", 5), "steps"),
        (("train", config, "--resume", "--out", tmp_path / "none"), "no run folder"),
        (("train", bad), "stepz"),
        (("train", tmp_path / "none.yaml"), "none.yaml"),
        (("train", config, "--steps", 0, "--out", "x"), "steps"),
        (("generate", tmp_path / "none", "--prompt", "1"), "no run folder"),
        (("generate", tmp_path, "--prompt", "1"), "is no file"),
        (("generate", "runs/tiny", "--prompt", "one"), "prompt"),
        (("generate", "runs/tiny", "--prompt", ""), "prompt"),
        (("demo", "--config", tmp_path / "none.yaml"), "none.yaml"),
        (("demo", "--out", tmp_path), "exists"),
    ):
        failed = run(*args)
        assert failed.exit_code == 2, args
        assert named in failed.stderr, (args, failed.stderr)
        assert "Traceback" not in failed.stderr
        assert not failed.stdout
    assert (tmp_path / "runs/tiny/log.jsonl").read_bytes() == log
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_named(run, config, tmp_path):
    run("train", config, "--no-plots")
    (tmp_path / "runs/tiny/checkpoint.safetensors").write_bytes(b"nothing")
    failed = run("generate", "runs/tiny", "--prompt", "1")
    assert failed.exit_code == 2 and "checkpoint.safetensors" in failed.stderr


def test_a_real_ctrl_c_saves_and_exits_130(run, small, tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(small(steps=100_000, eval_every=0, checkpoint_every=0).to_yaml())
    folder = RunFolder(tmp_path / "runs/long")

    def press():
        while len(folder.records("step")) < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    stopped = run("train", path)
    presser.join()
    assert stopped.exit_code == 130, stopped.stderr
    assert "--resume" in stopped.stdout
    checkpoint = folder.load()
    assert checkpoint.step == folder.records("step")[-1]["step"] >= 3
