"""The settings of the demo, and what it measures."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from momkit.errors import InputError
from momkit.spec import MoMSpec, SpecFile
from momkit.training.config import TrainConfig
from momkit.training.folder import Record

LABELS = {"one_memory": "one memory", "wide_memory": "one memory, as large as MoM", "mom": "MoM"}


class Sample(SpecFile):
    """What is generated from the text model."""

    prompt: str = Field(min_length=1)
    max_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt


class DemoConfig(SpecFile):
    """The three blocks, what they all share, and the text model; the blocks' hidden_size is that of `recall`."""

    recall: TrainConfig
    one_memory: MoMSpec
    wide_memory: MoMSpec
    mom: MoMSpec
    text: TrainConfig
    sample: Sample

    @model_validator(mode="before")
    @classmethod
    def _size_blocks(cls, data: Any) -> Any:
        size = data["recall"]["model"]["hidden_size"]
        return data | {name: {"hidden_size": size} | data[name] for name in LABELS}

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = {getattr(self, name).mechanism.kind for name in LABELS}
        if len(kinds) > 1:
            raise ValueError(f"mechanism: {sorted(kinds)}; allowed: one rule in all three")
        wide, mom = recurrent_bytes(self.wide_memory), recurrent_bytes(self.mom)
        if wide != mom:
            raise ValueError(f"wide_memory has {wide} bytes of state a layer; allowed: {mom}, as mom")
        return self

    def run(self, name: str, seed: int) -> TrainConfig:
        """The training run of one of the three."""
        shared = self.recall.model_dump()
        model = shared["model"] | {"block": getattr(self, name)}
        return TrainConfig.model_validate(shared | {"model": model, "seed": seed})


@dataclass(frozen=True)
class RecallRun:
    """One trained model of the comparison. State bytes are those of all memories, and of those one token touches."""

    model: str
    seed: int
    accuracy: float
    by_group: dict[int, float]
    curve: dict[int, float]
    parameters: int
    state_bytes_total: int
    state_bytes_active: int
    conv_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class TextRun:
    """The text model: held-out bits a byte, and what it writes."""

    bits_per_byte: float
    parameters: int
    state_bytes: int
    tokens_per_second: float
    data: dict[str, str | int]
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured, and on what."""

    recall: list[RecallRun]
    text: TextRun
    seconds: float
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def as_record(self) -> Record:
        return asdict(self)

    def of(self, name: str) -> list[RecallRun]:
        return [run for run in self.recall if run.model == name]


def load_demo(path: Path | None = None) -> DemoConfig:
    """The demo's own numbers, or those of a file."""
    path = path or Path(__file__).with_name("demo.yaml")
    try:
        return DemoConfig.from_yaml(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError) as fault:
        raise InputError(f"{path} is no demo config: {fault}") from fault


def recurrent_bytes(spec: MoMSpec) -> int:
    """Bytes of one block's memories."""
    with torch.random.fork_rng(devices=[]):
        state = spec.build().initial_state(1)
    return sum(tensor.nbytes for tensor in state.recurrent.values())
