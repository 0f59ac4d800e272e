"""Selective copying."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from momkit.tasks.base import IGNORE
from momkit.tasks.slices import Slice, SlicedSpec, SlicedTask, TrainSlice


class SelectiveCopySlice(Slice):
    """Sequences of `seq_len` tokens with `num_tokens` to remember."""

    num_tokens: int = Field(ge=1)

    @property
    def group(self) -> int:
        return self.num_tokens

    @model_validator(mode="after")
    def check_room(self) -> "SelectiveCopySlice":
        if 2 * self.num_tokens + 1 > self.seq_len:
            raise ValueError(
                f"num_tokens={self.num_tokens} needs seq_len >= {2 * self.num_tokens + 1} (each token twice and the "
                f"copy token), got seq_len={self.seq_len}"
            )
        return self


class SelectiveCopyTrainSlice(SelectiveCopySlice, TrainSlice):
    """A `SelectiveCopySlice` with its `weight` in the training mixture."""


class SelectiveCopySpec(SlicedSpec):
    """Settings of selective copying; the defaults are those of MAD.

    Token vocab_size - 2 is the blank, vocab_size - 1 the copy token; the others are there to be remembered.
    """

    kind: Literal["selective_copy"] = "selective_copy"
    vocab_size: int = Field(16, ge=3)
    train: tuple[SelectiveCopyTrainSlice, ...] = (SelectiveCopyTrainSlice(seq_len=256, num_tokens=16),)
    eval: tuple[SelectiveCopySlice, ...] = (
        SelectiveCopySlice(seq_len=256, num_tokens=16),
        SelectiveCopySlice(seq_len=256, num_tokens=32),
    )


class SelectiveCopy(SlicedTask):
    """Remember the few tokens scattered among blanks, and give them in order after the copy token.

    . a . . b . . . c . copy . . .   asks a, b, c at the last three blanks

    Gu and Dao 2023, "Mamba", arXiv 2312.00752; laid out as in Poli et al. 2024, "MAD", arXiv 2403.17844.
    """

    Spec = SelectiveCopySpec
    spec: SelectiveCopySpec

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def rows(self, count: int, seq_len: int, num_tokens: int, generator: torch.Generator, /) -> tuple[Tensor, Tensor]:
        blank, copy, device = self.vocab_size - 2, self.vocab_size - 1, generator.device
        room = seq_len - num_tokens - 1
        content = torch.randint(blank, (count, num_tokens), generator=generator, device=device)
        places = torch.rand(count, room, generator=generator, device=device).topk(num_tokens, dim=1).indices
        tokens = torch.full((count, seq_len), blank, device=device)
        tokens.scatter_(1, places.sort(dim=1).values, content)
        tokens[:, room] = copy
        targets = torch.full_like(tokens, IGNORE)
        targets[:, room + 1 :] = content
        return tokens, targets
