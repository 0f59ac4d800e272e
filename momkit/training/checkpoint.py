"""Checkpoints: one safetensors file that holds everything a run needs to go on, and says what it is.

Tensors are named `model.*`, `optimizer.<parameter>.<what>` and `rng.*`. The metadata holds the spec of the model, the
config of the run, the step, versions, owners of what the spec names, and a digest of all of it and of the tensors.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import momkit
from momkit.errors import CheckpointError
from momkit.models.lm import MoMLM
from momkit.models.spec import LMSpec
from momkit.registry import registry
from momkit.training.config import TrainConfig, check_device

FORMAT = "momkit.checkpoint.1"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and verified; `owners` and `versions` are those it was written with."""

    path: Path
    spec: LMSpec
    config: TrainConfig
    step: int
    tensors: dict[str, Tensor]
    versions: dict[str, str]
    owners: dict[str, str]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.*`, without the prefix."""
        start = prefix + "."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def build(self, device: str = "cpu") -> MoMLM:
        """The model with its weights."""
        check_device(device)
        with torch.random.fork_rng(devices=[]):
            model = MoMLM(self.spec, backend=self.config.backend).to(device)
        self.load_weights(model)
        return model

    def load_weights(self, model: MoMLM) -> None:
        """Put the weights into a model of this spec."""
        try:
            model.load_state_dict(self.part("model"))
        except RuntimeError as fault:
            lines = " ".join(str(fault).split())
            raise CheckpointError(f"{self.path}: its weights are not those of its spec: {lines}") from fault


def save_checkpoint(path: Path, model: MoMLM, config: TrainConfig, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint under a temporary name, then move it into place: whatever happens, `path` is whole."""
    everything = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | dict(tensors)
    everything = {name: tensor.detach().contiguous() for name, tensor in everything.items()}
    about = {
        "format": FORMAT,
        "spec": model.spec.model_dump_json(),
        "config": config.model_dump_json(),
        "step": str(step),
        "versions": json.dumps(versions()),
        "owners": json.dumps(owners(model.spec, config)),
    }
    about["sha256"] = digest(everything, about)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(everything, temporary, about)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint; a missing, foreign or damaged one is a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is no checkpoint of momkit: its format is {about.get('format')!r}, not {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, ValueError) as fault:
        if isinstance(fault, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no safetensors file, or is damaged: {fault}") from fault
    said = about.pop("sha256", "")
    if said != digest(tensors, about):
        raise CheckpointError(f"{path} is damaged: its contents do not match its sha256")
    written_by = json.loads(about["owners"])
    try:
        spec = LMSpec.model_validate_json(about["spec"])
        config = TrainConfig.model_validate_json(about["config"])
    except ValidationError as fault:
        # the digest holds, so a name or a field is not known here: a plugin is missing, or another version wrote it
        lost = {name: owner for name, owner in written_by.items() if name not in known()}
        reason = f"not registered here: {lost}" if lost else " ".join(str(fault).split())
        raise CheckpointError(f"{path} can't be read by momkit {momkit.__version__}: {reason}") from fault
    return Checkpoint(path, spec, config, int(about["step"]), tensors, json.loads(about["versions"]), written_by)


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """sha256 over metadata, names, types, shapes and bytes."""
    sha = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {"momkit": momkit.__version__, "torch": torch.__version__, "python": platform.python_version()}


def known() -> set[str]:
    """Everything registered, as `kind name`."""
    return {f"{kind} {name}" for kind, classes in registry().classes.items() for name in classes}


def owners(spec: LMSpec, config: TrainConfig) -> dict[str, str]:
    """Who owns the mechanism, router and task of a run, with the version."""
    block = spec.block
    used = {"mechanism": block.mechanism.kind, "router": block.router.kind, "task": config.task.kind}
    found = {}
    for kind, name in used.items():
        owner = registry().owners[kind, name]
        plugin = next((p for p in registry().plugins if p.name == owner), None)
        found[f"{kind} {name}"] = owner if plugin is None else f"{owner} {plugin.version}"
    return found
