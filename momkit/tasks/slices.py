"""Tasks whose sequences come in slices: a few lengths, each with its own load, mixed in every batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from momkit.tasks.base import Batch, Task, TaskSpec, check_draw, held_out_generator


class Slice(BaseModel):
    """Sequences of one length and one load; the load is the `group` that accuracy is reported by."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seq_len: int = Field(ge=1)

    @property
    def group(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define group")


class TrainSlice(Slice):
    """A slice of the training mixture and its share of the sequences, relative to the other slices."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)


class SlicedSpec(TaskSpec):
    """Settings that all sliced tasks share.

    train: the mixture. eval: slices scored one by one, `eval_examples` sequences each, drawn from `eval_seed`; where
        only `train` is given, its slices.
    curriculum: the fraction of training by which all of `train` is in use. Slices open in order of group, then of
        length, at equal steps of progress, the first at 0; with `curriculum=0` all of them are there from the start.
    """

    train: tuple[TrainSlice, ...]
    eval: tuple[Slice, ...]
    eval_examples: int = Field(1000, ge=1)
    eval_seed: int = 0
    curriculum: float = Field(0.0, ge=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def score_what_is_trained(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "eval" in data or not isinstance(data.get("train"), list | tuple):
            return data
        parts = [dict(part) if isinstance(part, BaseModel | dict) else part for part in data["train"]]
        for part in parts:
            if isinstance(part, dict):
                part.pop("weight", None)
        return {**data, "eval": parts}

    @model_validator(mode="after")
    def check_slices(self) -> "SlicedSpec":
        for name in ("train", "eval"):
            if not getattr(self, name):
                raise ValueError(f"{name}=() must hold at least one slice")
        groups = [part.group for part in self.eval]
        if repeated := sorted({group for group in groups if groups.count(group) > 1}):
            raise ValueError(
                f"eval has several slices of load {repeated}, which would be scored as one; name each once"
            )
        return self


class SlicedTask(Task):
    """A task of slices. Subclass it and write `vocab_size` and `rows`."""

    spec: SlicedSpec

    def rows(self, count: int, seq_len: int, group: int, generator: torch.Generator, /) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both `[count, seq_len]`, of `count` sequences of one slice."""
        raise NotImplementedError(f"{type(self).__name__} must define rows(count, seq_len, group, generator)")

    def batch(self, generator: torch.Generator, batch_size: int, progress: float = 1.0) -> Batch:
        check_draw(batch_size, progress)
        slices = open_slices(self.spec.train, self.spec.curriculum, progress)
        counts = allot(batch_size, [part.weight for part in slices], generator)
        drawn = [(part, count) for part, count in zip(slices, counts, strict=True) if count]
        return pack([(*self.rows(n, part.seq_len, part.group, generator), part.group) for part, n in drawn])

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        check_draw(batch_size)
        count = self.spec.eval_examples
        for part in self.spec.eval:
            # a slice is drawn whole, so that its sequences don't depend on the batch size
            generator = held_out_generator(self.name, self.spec.eval_seed, part.seq_len, part.group)
            tokens, targets = self.rows(count, part.seq_len, part.group, generator)
            for i in range(0, count, batch_size):
                yield pack([(tokens[i : i + batch_size], targets[i : i + batch_size], part.group)])


def open_slices(slices: Sequence[TrainSlice], curriculum: float, progress: float) -> list[TrainSlice]:
    """The slices in use at this point of training, easiest first."""
    ordered = sorted(slices, key=lambda part: (part.group, part.seq_len))
    return [part for i, part in enumerate(ordered) if progress >= curriculum * i / len(ordered)]


def allot(count: int, weights: Sequence[float], generator: torch.Generator) -> list[int]:
    """Split `count` by weight at random, each share within one of its mean: evenly spaced points, one random offset.

    A plain multinomial would make the number of tokens in a batch vary far more, for no gain.
    """
    bounds = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    offset = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device).item()
    points = (torch.arange(count, dtype=torch.float64) + offset) / count * bounds[-1]
    chosen = torch.searchsorted(bounds, points, right=True).clamp(max=len(weights) - 1)
    return torch.bincount(chosen, minlength=len(weights)).tolist()


def pack(parts: Sequence[tuple[Tensor, Tensor, int]]) -> Batch:
    """One batch of (tokens, targets, group) blocks, each of rows of one length."""
    device = parts[0][0].device
    lengths = torch.tensor([n for tokens, _, _ in parts for n in [tokens.shape[1]] * tokens.shape[0]])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Batch(
        tokens=torch.cat([tokens.flatten() for tokens, _, _ in parts]),
        targets=torch.cat([targets.flatten() for _, targets, _ in parts]),
        cu_seqlens=cu_seqlens.to(device),
        group=torch.cat([torch.full((tokens.numel(),), group, device=device) for tokens, _, group in parts]),
    )
