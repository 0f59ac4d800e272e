"""Parity of bit strings."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from momkit.tasks.base import IGNORE, Batch, Task, TaskSpec, check_draw, held_out_generator


class ParitySpec(TaskSpec):
    """Settings of parity.

    min_len, max_len: training lengths, uniform and both included. eval_lens: lengths that are scored, and the groups
    that accuracy is reported by; those above max_len ask for extrapolation. ask: the parity so far at "each" position,
    or of the whole at the "last". curriculum: the fraction of training over which the longest training length grows
    from min_len to max_len; 0 for max_len from the start.
    """

    kind: Literal["parity"] = "parity"
    min_len: int = Field(3, ge=1)
    max_len: int = Field(40, ge=1)
    eval_lens: tuple[int, ...] = (40, 64, 128, 256)
    eval_examples: int = Field(256, ge=1)
    eval_seed: int = 0
    ask: Literal["each", "last"] = "each"
    curriculum: float = Field(0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def check_lengths(self) -> "ParitySpec":
        if self.max_len < self.min_len:
            raise ValueError(f"max_len={self.max_len} must be at least min_len={self.min_len}")
        if not self.eval_lens or min(self.eval_lens) < 1:
            raise ValueError(f"eval_lens={self.eval_lens} must hold at least one length, and none below 1")
        return self


class Parity(Task):
    """Say whether the number of ones so far is odd: state tracking at its smallest.

    1 0 1 1   asks 1 1 0 1

    Grazzi, Siems et al. 2024, arXiv 2411.12537.
    """

    Spec = ParitySpec
    spec: ParitySpec

    @property
    def vocab_size(self) -> int:
        return 2

    def batch(self, generator: torch.Generator, batch_size: int, progress: float = 1.0) -> Batch:
        check_draw(batch_size, progress)
        low, high, curriculum = self.spec.min_len, self.spec.max_len, self.spec.curriculum
        if progress < curriculum:
            high = low + int((high - low) * progress / curriculum)
        lengths = torch.randint(low, high + 1, (batch_size,), generator=generator, device=generator.device)
        return self.draw(lengths, generator)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        check_draw(batch_size)
        for length in self.spec.eval_lens:
            # sequences follow one another in the stream of one length, so the batch size doesn't change them
            generator = held_out_generator(self.name, self.spec.eval_seed, length)
            for i in range(0, self.spec.eval_examples, batch_size):
                count = min(batch_size, self.spec.eval_examples - i)
                yield self.draw(torch.full((count,), length), generator)

    def draw(self, lengths: Tensor, generator: torch.Generator) -> Batch:
        """Sequences of these lengths, packed."""
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        bits = torch.randint(2, (int(cu_seqlens[-1]),), generator=generator, device=generator.device)
        ones = torch.cat([bits.new_zeros(1), bits.cumsum(0)])
        before = ones[cu_seqlens[:-1]].repeat_interleave(lengths)
        parity = (ones[1:] - before) % 2
        if self.spec.ask == "last":
            last = cu_seqlens[1:] - 1
            parity = torch.full_like(parity, IGNORE).scatter_(0, last, parity[last])
        return Batch(bits, parity, cu_seqlens, group=lengths.repeat_interleave(lengths))
