"""Scoring a model on the held-out batches of a task."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momkit.models.lm import MoMLM, pick_asked
from momkit.tasks.base import IGNORE, Task


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a target. accuracy: share of targets that are the likeliest token. by_group: accuracy by Batch.group.

    bits_per_byte: of the `bytes` task, where a token is a byte.
    """

    loss: float
    accuracy: float
    num_targets: int
    by_group: dict[int, float]
    bits_per_byte: float | None = None

    def as_record(self) -> dict[str, Any]:
        record: dict[str, Any] = {"loss": self.loss, "accuracy": self.accuracy, "num_targets": self.num_targets}
        if self.by_group:
            record["by_group"] = {str(group): accuracy for group, accuracy in self.by_group.items()}
        if self.bits_per_byte is not None:
            record["bits_per_byte"] = self.bits_per_byte
        return record


@torch.no_grad()
def evaluate(model: MoMLM, task: Task, batch_size: int, *, chunk_tokens: int = 1024) -> Evaluation:
    """Loss and accuracy over `task.evaluation`; draws nothing from any generator of training."""
    training = model.training
    model.eval()
    loss, right, asked = 0.0, 0, 0
    right_by_group: dict[int, int] = defaultdict(int)
    asked_by_group: dict[int, int] = defaultdict(int)
    device = model.embedding.weight.device
    for batch in (b.to(device) for b in task.evaluation(batch_size)):
        hidden, targets = pick_asked(model(batch.tokens, cu_seqlens=batch.cu_seqlens).hidden_states, batch.targets)
        batch_loss, hits = score(model, hidden, targets, chunk_tokens)
        loss, right, asked = loss + batch_loss, right + int(hits.sum()), asked + len(targets)
        if batch.group is not None:
            groups, index = batch.group[batch.targets != IGNORE].unique(return_inverse=True)
            for group, n, k in zip(
                groups.tolist(), index.bincount().tolist(), index.bincount(hits.double()).long().tolist(), strict=True
            ):
                asked_by_group[group] += n
                right_by_group[group] += k
    model.train(training)
    mean = loss / max(1, asked)
    return Evaluation(
        loss=mean,
        accuracy=right / max(1, asked),
        num_targets=asked,
        by_group={group: right_by_group[group] / asked_by_group[group] for group in sorted(asked_by_group)},
        bits_per_byte=mean / math.log(2) if task.name == "bytes" else None,
    )


def score(model: MoMLM, hidden: Tensor, targets: Tensor, chunk_tokens: int) -> tuple[float, Tensor]:
    """Summed cross entropy, and `[n]` whether the likeliest token is the target; logits a chunk at a time."""
    loss, hits = 0.0, []
    for part, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = model.logits(part).float()
        loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        hits.append(logits.argmax(-1) == target)
    return loss, torch.cat(hits)
