"""Multi-query associative recall."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from momkit.tasks.base import IGNORE
from momkit.tasks.slices import Slice, SlicedSpec, SlicedTask, TrainSlice


class MQARSlice(Slice):
    """Sequences of `seq_len` tokens that hold `num_pairs` key-value pairs."""

    num_pairs: int = Field(ge=1)

    @property
    def group(self) -> int:
        return self.num_pairs

    @model_validator(mode="after")
    def check_room(self) -> "MQARSlice":
        if 4 * self.num_pairs > self.seq_len:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs seq_len >= {4 * self.num_pairs} (two tokens a pair, two a query), "
                f"got seq_len={self.seq_len}"
            )
        return self


class MQARTrainSlice(MQARSlice, TrainSlice):
    """An `MQARSlice` with its `weight` in the training mixture."""


# the mixture and the test slices of the zoology benchmark
TRAIN = ((64, 4, 5.0), (128, 8, 1.0), (256, 16, 1.0), (256, 32, 1.0), (256, 64, 1.0))
EVAL = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


class MQARSpec(SlicedSpec):
    """Settings of MQAR; the defaults are the zoology benchmark.

    Keys are tokens 1 to vocab_size // 2 - 1, values the upper half; token 0 is the filler. power_a: the exponent of the
    gaps between pairs and queries, 1 for uniform. random_non_queries: fill with uniform tokens in place of 0; as in
    the benchmark they may happen to be keys, and nothing is asked of them.
    """

    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(8192, ge=4)
    train: tuple[MQARTrainSlice, ...] = tuple(MQARTrainSlice(seq_len=t, num_pairs=n, weight=w) for t, n, w in TRAIN)
    eval: tuple[MQARSlice, ...] = tuple(MQARSlice(seq_len=t, num_pairs=n) for t, n in EVAL)
    power_a: float = Field(0.01, gt=0.0, allow_inf_nan=False)
    random_non_queries: bool = True

    @property
    def num_keys(self) -> int:
        return self.vocab_size // 2 - 1

    @model_validator(mode="after")
    def check_keys(self) -> "MQARSpec":
        parts = [("train", i, part) for i, part in enumerate(self.train)]
        for name, i, part in parts + [("eval", i, part) for i, part in enumerate(self.eval)]:
            if part.num_pairs > self.num_keys:
                raise ValueError(
                    f"{name}[{i}].num_pairs={part.num_pairs} must be at most {self.num_keys}, the number of keys of "
                    f"vocab_size={self.vocab_size}"
                )
        return self


class MQAR(SlicedTask):
    """Read key-value pairs, then give the value of each key when it comes again.

    k1 v1 k2 v2 . . k2 . . . k1 .   asks v2 at the second k2, v1 at the second k1

    Arora, Eyuboglu et al. 2023, "Zoology", arXiv 2312.04927.
    """

    Spec = MQARSpec
    spec: MQARSpec

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def rows(self, count: int, seq_len: int, num_pairs: int, generator: torch.Generator, /) -> tuple[Tensor, Tensor]:
        vocab_size, device = self.spec.vocab_size, generator.device
        keys = distinct(count, num_pairs, 1, vocab_size // 2, generator)
        values = distinct(count, num_pairs, vocab_size // 2, vocab_size, generator)
        at = 2 * num_pairs + 2 * power_law_gaps(
            count, num_pairs, seq_len // 2 - num_pairs, self.spec.power_a, generator
        )
        if self.spec.random_non_queries:
            tokens = torch.randint(vocab_size, (count, seq_len), generator=generator, device=device)
        else:
            tokens = torch.zeros(count, seq_len, dtype=torch.int64, device=device)
        tokens[:, : 2 * num_pairs] = torch.stack([keys, values], dim=2).flatten(1)
        tokens.scatter_(1, at, keys)
        return tokens, torch.full_like(tokens, IGNORE).scatter_(1, at, values)


def distinct(rows: int, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """`[rows, count]` integers of [low, high), distinct in a row: Floyd's sampling of all rows at once, then a shuffle.

    Its cost grows with `count` and not with the range, unlike sorting one random number for every key there is.
    """
    last = torch.arange(high - low - count, high - low, device=generator.device)
    uniform = torch.rand(rows, count, dtype=torch.float64, generator=generator, device=generator.device)
    drawn = (uniform * (last + 1)).long()
    for i in range(1, count):
        taken = (drawn[:, :i] == drawn[:, i : i + 1]).any(1)
        drawn[:, i] = torch.where(taken, last[i], drawn[:, i])
    order = torch.rand(rows, count, generator=generator, device=generator.device).argsort(1)
    return low + drawn.gather(1, order)


def power_law_gaps(rows: int, count: int, space: int, power_a: float, generator: torch.Generator) -> Tensor:
    """`[rows, count]` distinct places of [0, space), drawn one after the other with p(i) ~ (i + 1)^(power_a - 1).

    The first `count` arrivals of independent clocks of rate p are such a draw.
    """
    rate = torch.arange(1, space + 1, dtype=torch.float64, device=generator.device) ** (power_a - 1)
    clocks = torch.empty(rows, space, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
    return (clocks / rate).topk(count, dim=1, largest=False, sorted=True).indices
