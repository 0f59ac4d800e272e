"""The training loop: steps, log, evaluations and checkpoints, and an exact way back into an interrupted run."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from momkit.errors import InputError
from momkit.training.checkpoint import versions
from momkit.training.config import TrainConfig, check_device
from momkit.training.folder import Record, RunFolder
from momkit.training.interrupt import deferred_interrupt
from momkit.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; `evaluation` is the last one, None when it was interrupted before any."""

    folder: Path
    step: int
    interrupted: bool
    parameters: int
    tokens_per_second: float
    evaluation: Record | None

    def as_record(self) -> Record:
        return {
            "run": str(self.folder),
            "step": self.step,
            "interrupted": self.interrupted,
            "parameters": self.parameters,
            "tokens_per_second": self.tokens_per_second,
            "evaluation": self.evaluation,
        }


def train(
    config: TrainConfig,
    path: Path,
    *,
    resume: bool = False,
    on_record: Callable[[Record], None] = lambda record: None,
) -> TrainResult:
    """Train in a new folder, or go on in one, exactly as if it had never stopped.

    on_record is called with every line of the log. Ctrl-C saves the last whole step and returns.
    """
    check_device(config.device)
    with own_torch(config):
        trainer = Trainer(config)
        if resume:
            folder, checkpoint = RunFolder.reopen(path, config)
            check_data(folder, trainer.task.provenance)
            trainer.restore(checkpoint)
        else:
            folder = RunFolder.create(path, config)
        return Run(trainer, folder, on_record).finish(resume)


def check_data(folder: RunFolder, provenance: Mapping[str, Any]) -> None:
    """Going on with other data than the run began with would be no continuation."""
    began = next((record["data"] for record in folder.records("run") if "data" in record), None)
    if began is not None and began != json.loads(json.dumps(provenance)):
        raise InputError(f"{folder.path} was trained on other data: {began}, now {dict(provenance)}")


@dataclass
class Run:
    """A trainer at work in a folder."""

    trainer: Trainer
    folder: RunFolder
    on_record: Callable[[Record], None]

    def finish(self, resumed: bool) -> TrainResult:
        """Take the steps that are left."""
        trainer, config = self.trainer, self.trainer.config
        evaluations = {record["step"]: record for record in self.folder.records("eval")}
        parameters = sum(p.numel() for p in trainer.model.parameters())
        interrupted = False
        tokens, seconds = 0, 0.0
        try:
            self.write(self.opening(resumed, parameters))
            if not resumed:
                trainer.save(self.folder.checkpoint)
            while True:
                if due(trainer.step, config.eval_every, config.steps) and trainer.step not in evaluations:
                    record = {"kind": "eval", "step": trainer.step, **trainer.evaluate().as_record()}
                    evaluations[trainer.step] = record
                    self.write(record)
                if trainer.step == config.steps:
                    break
                # Ctrl-C waits until a step is taken and logged
                with deferred_interrupt():
                    record = trainer.train_step()
                    self.write(record)
                tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
                if due(trainer.step, config.checkpoint_every, config.steps):
                    trainer.save(self.folder.checkpoint)
        except KeyboardInterrupt:
            interrupted = True
            trainer.save(self.folder.checkpoint)
            self.write({"kind": "interrupt", "step": trainer.step})
        return TrainResult(
            folder=self.folder.path,
            step=trainer.step,
            interrupted=interrupted,
            parameters=parameters,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            evaluation=evaluations[max(evaluations)] if evaluations else None,
        )

    def opening(self, resumed: bool, parameters: int) -> Record:
        """What a reader of the log needs to know first."""
        return {
            "kind": "resume" if resumed else "run",
            "step": self.trainer.step,
            "parameters": parameters,
            "state_bytes": self.trainer.model.initial_state(1).nbytes(),
            "data": self.trainer.task.provenance,
            "versions": versions(),
        }

    def write(self, record: Record) -> None:
        with deferred_interrupt():
            self.folder.write(record)
        self.on_record(record)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is to be done now."""
    return step == last or (step > 0 and every > 0 and step % every == 0)


@contextmanager
def own_torch(config: TrainConfig) -> Iterator[None]:
    """The global generators and number of threads of torch for the length of a run, given back as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[] if config.device == "cpu" else [config.device]):
        try:
            torch.set_num_threads(config.threads or threads)
            yield
        finally:
            torch.set_num_threads(threads)
