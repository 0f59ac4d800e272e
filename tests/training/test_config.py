from pathlib import Path

import pytest
from pydantic import ValidationError

from momkit.errors import InputError
from momkit.models.lm import MoMLM
from momkit.training.config import TrainConfig, load_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stepz": 3}, "stepz"),
        ({"steps": 0}, "steps"),
        ({"warmup": 7}, "warmup"),
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"clip": 0}, "clip"),
        ({"schedule": "step"}, "schedule"),
        ({"device": "tpu"}, "device"),
        ({"task": "nothing"}, "nothing"),
        ({"task": {"kind": "mqar", "vocab": 3}}, "vocab"),
        ({"model": {"hidden_size": 8, "vocab_size": 3}}, "vocab_size"),
        ({"model": {"hidden_size": 8, "block": {"mechanism": "nothing"}}}, "nothing"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_refuses(small, changes, named):
    with pytest.raises(ValidationError, match=named):
        small(**changes)


def test_round_trip(small):
    config = small()
    assert TrainConfig.from_yaml(config.to_yaml()) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_load(small, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(small().to_yaml())
    assert load_config(path) == small()
    assert load_config(path, seed=5) == small(seed=5)
    with pytest.raises(ValidationError, match="steps"):
        load_config(path, steps=0)
    with pytest.raises(InputError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_config(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_build(path):
    config = load_config(path)
    MoMLM(config.model.with_vocabulary(256))


def test_examples_exist():
    assert {"mqar", "bytes", "parity", "selective_copy", "hybrid"} <= {path.stem for path in EXAMPLES}
