"""The folder of one run: its config, its checkpoint, its log, its plots."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from momkit.errors import CheckpointError, InputError
from momkit.training.checkpoint import Checkpoint, load_checkpoint
from momkit.training.config import TrainConfig

Record = dict[str, Any]


class RunFolder:
    """Paths of a run, and its log: JSON lines, each with `kind` (run, step, eval, ...) and `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoint.safetensors"
        self.log = path / "log.jsonl"

    @staticmethod
    def create(path: Path, config: TrainConfig) -> "RunFolder":
        """A new folder; one that holds anything is refused."""
        folder = RunFolder(path)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists already and is left as it is; name another folder, or resume the run")
        path.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(config.to_yaml(), encoding="utf-8")
        return folder

    @staticmethod
    def reopen(path: Path, config: TrainConfig) -> tuple["RunFolder", Checkpoint]:
        """A folder to go on in: same config as before, log cut back to the checkpoint."""
        folder = RunFolder(path)
        found = folder.load()
        if different := found.config.differences(config):
            raise InputError(
                f"{path} was trained with another config, it differs in: {', '.join(different)}; "
                f"an exact continuation needs the same, which is {folder.config}"
            )
        # steps after the checkpoint will be taken again
        kept = [record for record in folder.records() if record["step"] <= found.step]
        temporary = folder.log.with_name(f".{folder.log.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, folder.log)
        return folder, found

    def load(self) -> Checkpoint:
        """The checkpoint of this run."""
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is no run folder")
        return load_checkpoint(self.checkpoint)

    def write(self, record: Mapping[str, Any]) -> None:
        """One line at the end of the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self, kind: str | None = None) -> list[Record]:
        """Lines of the log, of one kind or all; a last line that was cut off is left out."""
        if not self.log.exists():
            return []
        found: list[Record] = []
        try:
            lines = self.log.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as fault:
            raise CheckpointError(f"{self.log} is no UTF-8 text") from fault
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as fault:
                if number == len(lines):
                    break
                raise CheckpointError(f"{self.log} line {number} is no JSON") from fault
            if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
                raise CheckpointError(f"{self.log} line {number} is no record of a run")
            found.append(record)
        return [record for record in found if kind in (None, record["kind"])]
