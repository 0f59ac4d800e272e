"""The task contract: an endless, seeded stream of batches, and a way to score a model on them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from momkit.errors import InputError

IGNORE = -100


class TaskSpec(BaseModel):
    """Settings of one task; `kind` is the name it is registered under."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str = ""


@dataclass(frozen=True)
class Batch:
    """Tokens of packed sequences and what each should be followed by.

    tokens: `[T]` int64. targets: `[T]` int64, `IGNORE` where nothing is asked. cu_seqlens: `[B + 1]` int64.
    group: `[T]` int64, a number to report accuracy by (for mqar: pairs in the sequence), or None.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    group: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        group = None if self.group is None else self.group.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), self.cu_seqlens.to(device), group)


def held_out_generator(*key: object) -> torch.Generator:
    """A generator for evaluation, one a key; hashing keeps it away from the small seeds that training uses."""
    digest = hashlib.sha256(repr(("evaluation", *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def check_draw(batch_size: int, progress: float = 1.0) -> None:
    """Refuse a batch of nothing, and a progress that is no fraction."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if not 0.0 <= progress <= 1.0:
        raise InputError(f"progress={progress} must lie in [0, 1]")


class Task:
    """A source of training and evaluation batches, deterministic in (spec, split, seed, index).

    The docstring of a task has three paragraphs: one sentence, an example, the paper or source.
    """

    Spec: ClassVar[type[TaskSpec]]
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Spec" in cls.__dict__:
            cls.name = cls.Spec.model_fields["kind"].default

    def __init__(self, spec: TaskSpec) -> None:
        if not isinstance(spec, self.Spec):
            raise TypeError(f"{type(self).__name__} takes a {self.Spec.__name__}, got {type(spec).__name__}")
        self.spec = spec

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define vocab_size")

    @property
    def provenance(self) -> dict[str, str | int]:
        """What the data came from, for the log of a run; nothing for a task that is all in its spec."""
        return {}

    def batch(self, generator: torch.Generator, batch_size: int, progress: float = 1.0) -> Batch:
        """One training batch; `progress` in [0, 1] is how far training is, for curricula."""
        raise NotImplementedError(f"{type(self).__name__} must define batch(generator, batch_size, progress)")

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """A finite, fixed set of held-out batches."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluation(batch_size)")
