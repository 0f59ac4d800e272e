import json

import pytest
import torch
from safetensors.torch import save_file

from momkit.errors import CheckpointError
from momkit.mechanisms.deltanet import DeltaNet, DeltaNetSpec
from momkit.registry import temporarily
from momkit.training.checkpoint import load_checkpoint, save_checkpoint
from momkit.training.trainer import Trainer


@pytest.fixture
def saved(small, tmp_path):
    trainer = Trainer(small())
    trainer.train_step()
    path = tmp_path / "checkpoint.safetensors"
    trainer.save(path)
    return trainer, path


def test_carries_everything(saved):
    trainer, path = saved
    found = load_checkpoint(path)
    assert found.spec == trainer.model.spec and found.config == trainer.config and found.step == 1
    assert set(found.versions) == {"momkit", "torch", "python"}
    assert set(found.owners) == {"mechanism deltanet", "router noisy_topk", "task mqar"}
    assert all(owner.startswith("momkit ") for owner in found.owners.values())
    model = found.build()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_restored_trainer_takes_the_same_step(saved):
    trainer, path = saved
    a = trainer.train_step()
    other = Trainer(trainer.config)
    other.restore(load_checkpoint(path))
    b = other.train_step()
    assert a | {"seconds": 0} == b | {"seconds": 0}


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="is no file"):
        load_checkpoint(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, json.dumps({"a": 1}).encode() * 10])
def test_no_safetensors(tmp_path, content):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors"):
        load_checkpoint(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("about", [None, {"format": "pt"}])
def test_foreign(tmp_path, about):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"x": torch.ones(2)}, path, about)
    with pytest.raises(CheckpointError, match="no checkpoint of momkit"):
        load_checkpoint(path)


@pytest.mark.parametrize("where", ["head", "middle", "last byte"])
def test_one_wrong_byte(saved, where):
    _, path = saved
    content = bytearray(path.read_bytes())
    at = {"head": content.index(b'"step":') + 9, "middle": len(content) // 2, "last byte": -1}[where]
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_cut_short(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_missing_plugin_is_named(small, tmp_path):
    class TheirSpec(DeltaNetSpec):
        kind: str = "theirs"

    class Theirs(DeltaNet):
        Spec = TheirSpec

    path = tmp_path / "checkpoint.safetensors"
    with temporarily(Theirs):
        model = small().model.model_dump() | {"block": {"mechanism": "theirs", "num_memories": 3}}
        Trainer(small(model=model)).save(path)
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"mechanism theirs.*temporary"):
        load_checkpoint(path)


def test_weights_of_another_spec(small, saved):
    trainer, path = saved
    other = Trainer(small(model=small().model.model_dump() | {"num_layers": 1}))
    save_checkpoint(path, trainer.model, other.config, 1, {})
    found = load_checkpoint(path)
    with pytest.raises(CheckpointError, match="weights"):
        found.load_weights(other.model)


def test_a_failed_write_leaves_the_old_one(saved, monkeypatch):
    trainer, path = saved
    before = path.read_bytes()
    monkeypatch.setattr("momkit.training.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
