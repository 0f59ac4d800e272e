"""A run in memory: one optimizer step at a time, and everything that it takes to repeat the next one exactly."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from momkit.models.lm import LMLoss, MoMLM
from momkit.routing.balance import memory_load
from momkit.tasks.base import IGNORE, Batch
from momkit.training.checkpoint import Checkpoint, save_checkpoint
from momkit.training.config import TrainConfig
from momkit.training.evaluate import Evaluation, evaluate
from momkit.training.folder import Record
from momkit.training.interrupt import deferred_interrupt


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a finite number; the last checkpoint is from before."""


class Trainer:
    """A run in memory: model, optimizer, generators and the number of steps taken."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.task = config.make_task()
        torch.manual_seed(config.seed)
        self.model = MoMLM(config.model.with_vocabulary(self.task.vocab_size), backend=config.backend).to(config.device)
        groups = self.model.parameter_groups(config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.rng = self.rng_state()

    def train_step(self) -> Record:
        """One optimizer step over `accumulation` batches; an interrupt leaves all of it done, or none of it."""
        config, start = self.config, time.perf_counter()
        lr = learning_rate(config, self.step)
        progress = self.step / config.steps
        batches = [self.task.batch(self.generator, config.batch_size, progress) for _ in range(config.accumulation)]
        asked = [int((batch.targets != IGNORE).sum()) for batch in batches]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "cross_entropy": 0.0, "aux_loss": 0.0}
        loads: list[Tensor | None] = [None] * len(self.model.layers)
        for batch, count in zip(batches, asked, strict=True):
            # each batch weighs as many targets as it has, so that splitting one changes nothing
            share = count / sum(asked) if any(asked) else 1 / len(asked)
            out = self.backward(batch.to(config.device), share)
            for name in sums:
                sums[name] += share * float(getattr(out, name).detach())
            loads = [add_load(load, layer) for load, layer in zip(loads, self.loads(out), strict=True)]
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        if not math.isfinite(sums["loss"] + norm):
            raise DivergedError(f"step {self.step + 1}: loss = {sums['loss']}, norm of the gradient = {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with deferred_interrupt():
            self.optimizer.step()
            for block, load in zip(self.model.blocks(), loads, strict=True):
                if block is not None and load is not None:
                    block.router.update(load)
            self.step += 1
            self.rng = self.rng_state()
        tokens = sum(len(batch.tokens) for batch in batches)
        return {
            "kind": "step",
            "step": self.step,
            **sums,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "seconds": time.perf_counter() - start,
            "load": [None if load is None else (load / load.sum()).tolist() for load in loads],
        }

    def backward(self, batch: Batch, share: float) -> LMLoss:
        out = self.model.loss(batch.tokens, batch.targets, batch.cu_seqlens, chunk_tokens=self.config.chunk_tokens)
        (out.loss * share).backward()
        return out

    def loads(self, out: LMLoss) -> list[Tensor | None]:
        """Choices that fell on each memory, `[M]` a MoM layer."""
        num_memories = self.config.model.block.num_memories
        return [None if r is None else memory_load(r.memory_ids, num_memories) for r in out.routings]

    def evaluate(self) -> Evaluation:
        batch_size = self.config.eval_batch_size or self.config.batch_size
        return evaluate(self.model, self.task, batch_size, chunk_tokens=self.config.chunk_tokens)

    def save(self, path: Path) -> None:
        """A checkpoint of the last whole step."""
        tensors = {f"rng.{name}": state for name, state in self.rng.items()}
        for name, parameter in self.model.named_parameters():
            for what, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{what}"] = value
        save_checkpoint(path, self.model, self.config, self.step, tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over everything from a checkpoint of the same config."""
        checkpoint.load_weights(self.model)
        optimizer = checkpoint.part("optimizer")
        for name, parameter in self.model.named_parameters():
            start = name + "."
            self.optimizer.state[parameter] = {
                key.removeprefix(start): value.to(parameter.device)
                for key, value in optimizer.items()
                if key.startswith(start)
            }
        self.rng = checkpoint.part("rng")
        torch.set_rng_state(self.rng["torch"])
        self.generator.set_state(self.rng["task"])
        if "cuda" in self.rng:
            torch.cuda.set_rng_state(self.rng["cuda"], self.config.device)
        self.step = checkpoint.step

    def rng_state(self) -> dict[str, Tensor]:
        states = {"torch": torch.get_rng_state(), "task": self.generator.get_state()}
        if self.config.device != "cpu":
            states["cuda"] = torch.cuda.get_rng_state(self.config.device)
        return states


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the step after `step` steps: a line up over `warmup`, then a half cosine down to `final_lr` of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def add_load(total: Tensor | None, load: Tensor | None) -> Tensor | None:
    return load if total is None or load is None else total + load
