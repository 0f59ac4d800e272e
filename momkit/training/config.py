"""The typed description of a training run."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, SerializeAsAny, model_validator

from momkit.errors import InputError
from momkit.models.spec import BackboneSpec
from momkit.registry import find_task
from momkit.scan import Backend
from momkit.spec import Registered, SpecFile
from momkit.tasks.base import Task, TaskSpec

TaskField = Annotated[SerializeAsAny[TaskSpec], Registered("task")]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainConfig(SpecFile):
    """Everything that defines a training run; the same config gives the same losses.

    model: the language model without its vocabulary, which is the task's. task: a name, or a dict with `kind`.
    batch_size: sequences in one forward pass; an optimizer step takes `accumulation` of them.
    warmup: steps in which lr rises to its value; then it falls to `final_lr` times it, or stays.
    clip: largest norm of the gradient; None leaves it as it is.
    eval_every, checkpoint_every: steps between them; 0 for the end only. eval_batch_size None: as `batch_size`.
    chunk_tokens: positions whose logits exist at one time. threads: of torch on a CPU; None leaves them as they are.
    """

    schema_version: Literal[1] = 1
    model: BackboneSpec
    task: TaskField
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    accumulation: PositiveInt = 1
    lr: PositiveFloat = 1e-3
    warmup: NonNegativeInt = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip: PositiveFloat | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: NonNegativeInt = 0
    eval_batch_size: PositiveInt | None = None
    checkpoint_every: NonNegativeInt = 0
    chunk_tokens: PositiveInt = 1024
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    backend: Backend = "auto"
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup > self.steps:
            raise ValueError(f"warmup = {self.warmup}; allowed: 0 to steps = {self.steps}")
        return self

    def make_task(self) -> Task:
        """The task this run trains on."""
        return find_task(self.task.kind)(self.task)

    def differences(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which two configs differ."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


def check_device(device: str) -> str:
    """A device that torch knows and this machine has."""
    try:
        wanted = torch.device(device)
    except RuntimeError as fault:
        raise InputError(f"device = {device!r}; allowed: cpu, cuda, cuda:N") from fault
    if wanted.type not in ("cpu", "cuda"):
        raise InputError(f"device = {device!r}; allowed: cpu, cuda, cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device = {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def load_config(path: str | Path, **changes: Any) -> TrainConfig:
    """Read a TrainConfig from a YAML or JSON file; `changes` replace its top-level fields."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or "it is no UTF-8 text"
        raise InputError(f"config {str(path)!r} can't be read: {reason}") from fault
    config = TrainConfig.from_yaml(text)
    return TrainConfig.model_validate(config.model_dump() | changes) if changes else config
