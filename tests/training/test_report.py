import builtins

import pytest
import yaml
from pydantic import ValidationError

from momkit.errors import BackendError, InputError
from momkit.training import demo as demo_module
from momkit.training.demo import run_demo
from momkit.training.demo_report import findings, spread
from momkit.training.demo_result import DemoConfig, load_demo
from momkit.training.folder import RunFolder
from momkit.training.loop import train
from momkit.training.plots import require_matplotlib
from momkit.training.report import draw_run, show_byte

pytest.importorskip("matplotlib")


class Quiet:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return lambda record: None

    def __exit__(self, *_):
        pass


@pytest.fixture
def tiny():
    settings = load_demo().model_dump()
    settings["recall"] |= {"steps": 2, "batch_size": 4, "warmup": 1, "eval_every": 1}
    settings["recall"]["task"]["eval_examples"] = 4
    settings["text"] |= {"steps": 2, "batch_size": 1, "warmup": 1}
    settings["text"]["task"] |= {"eval_examples": 2, "seq_len": 32, "paths": [demo_module.__file__], "held_out": 0.2}
    settings["sample"]["max_tokens"] = 5
    return settings


def test_a_run_is_drawn(small, tmp_path):
    train(small(), tmp_path / "run")
    drawn = draw_run(RunFolder(tmp_path / "run"))
    assert [path.name for path in drawn] == ["loss.png", "recall.png", "load.png", "memories.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_nothing_to_route_nothing_to_draw(small, tmp_path):
    model = {"hidden_size": 8, "block": {"num_memories": 1, "router": {"kind": "softmax_topk", "top_k": 1}}}
    train(small(model=model), tmp_path / "run")
    assert [path.name for path in draw_run(RunFolder(tmp_path / "run"))] == ["loss.png", "recall.png"]


def test_matplotlib_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"momkit\[plot\]"):
        require_matplotlib()


def test_demo_reports_what_came_out(tiny, tmp_path):
    config = DemoConfig.model_validate(tiny)
    demo = run_demo(config, tmp_path / "out", 2, Quiet)
    assert [(run.model, run.seed) for run in demo.recall] == [
        (name, seed) for seed in (0, 1) for name in ("one_memory", "wide_memory", "mom")
    ]
    one, wide, mom = demo.recall[:3]
    assert wide.state_bytes_total == mom.state_bytes_total > one.state_bytes_total
    assert mom.state_bytes_active < mom.state_bytes_total
    assert all(sorted(run.curve) == [1, 2] for run in demo.recall)
    report = (tmp_path / "out" / "report.md").read_text()
    for run in demo.recall:
        assert f"{run.parameters:,}" in report
    for picture in ("recall.png", "learning.png", "load.png", "memories.png", "memories-text.png"):
        assert picture in report and (tmp_path / "out" / picture).exists()
    assert demo.text.sample.splitlines()[0] in report
    again = yaml.safe_load((tmp_path / "out" / "demo.yaml").read_text())
    assert DemoConfig.model_validate(again) == config
    with pytest.raises(InputError, match="exists"):
        run_demo(config, tmp_path / "out", 1, Quiet)
    assert len(list(findings(demo))) == 2


def test_demo_compares_equal_states(tiny):
    tiny["wide_memory"]["mechanism"]["head_v_dim"] = 8
    with pytest.raises(ValidationError, match="wide_memory"):
        DemoConfig.model_validate(tiny)
    tiny["wide_memory"]["mechanism"] = "gla"
    with pytest.raises(ValidationError, match="one rule"):
        DemoConfig.model_validate(tiny)


def test_no_demo_config(tmp_path):
    (tmp_path / "demo.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="no demo config"):
        load_demo(tmp_path / "demo.yaml")


def test_spread():
    assert spread([0.5]) == "0.500"
    assert spread([0.4, 0.6]) == "0.500 ± 0.141"


def test_bytes_are_shown_as_one_character():
    assert [show_byte(b) for b in b"a \n\x00"] == ["a", "␣", "↵", "·"]
