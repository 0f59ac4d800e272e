"""Language modelling of bytes."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NoReturn

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from momkit.errors import InputError
from momkit.tasks.base import IGNORE, Batch, Task, TaskSpec, check_draw


class BytesSpec(TaskSpec):
    """Settings of byte-level language modelling.

    paths: files, folders (every file below; hidden ones left out, links to folders not followed) or globs; none given
    means the sources of Python's own standard library, without its tests. seq_len: tokens in a window. held_out: the
    fraction of the bytes that training never sees. eval_examples: windows scored, evenly spaced in that part, or as
    many as it has.
    """

    kind: Literal["bytes"] = "bytes"
    paths: tuple[str, ...] = ()
    seq_len: int = Field(256, ge=1)
    held_out: float = Field(0.05, gt=0.0, lt=1.0)
    eval_examples: int = Field(256, ge=1)


class Bytes(Task):
    """Predict the next byte of a text, in windows of a corpus of files.

    r e t u r n   asks e t u r n and the byte after it; the first byte of a file starts a new sequence

    Any text; by default the sources of Python's standard library, whose sha256 is in `provenance`.

    Files are put in the order of their own hash, and the tail of that stream is held out: a random choice of files,
    the same wherever they lie, and the end of the text where there is one file. The last byte of a file asks nothing.
    """

    Spec = BytesSpec
    spec: BytesSpec

    def __init__(self, spec: BytesSpec) -> None:
        super().__init__(spec)
        files = find_files(spec.paths) if spec.paths else standard_library()
        documents = [read(path) for path in files]
        self.num_files = len(files)
        self.num_bytes = sum(map(len, documents))
        self.sha256 = hashlib.sha256(b"".join(documents)).hexdigest()  # of the files in the order of their paths
        documents = sorted((d for d in documents if d), key=lambda d: hashlib.sha256(d).digest())
        held = int(self.num_bytes * spec.held_out)
        needed = spec.seq_len + 1
        if min(held, self.num_bytes - held) < needed:
            raise InputError(
                f"paths={spec.paths} hold {self.num_bytes} bytes in {self.num_files} files, of which "
                f"held_out={spec.held_out} keeps {held}; both parts need at least seq_len + 1 = {needed}"
            )
        self.stream = torch.from_numpy(np.frombuffer(bytearray(b"".join(documents)), dtype=np.uint8))
        self.starts = torch.zeros(self.num_bytes, dtype=torch.bool)
        self.starts[np.cumsum([0] + [len(d) for d in documents[:-1]])] = True
        self.train_bytes = self.num_bytes - held

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def provenance(self) -> dict[str, str | int]:
        return {"sha256": self.sha256, "bytes": self.num_bytes, "files": self.num_files}

    def batch(self, generator: torch.Generator, batch_size: int, progress: float = 1.0) -> Batch:
        """`batch_size` windows from anywhere in the training part; `progress` changes nothing."""
        check_draw(batch_size, progress)
        places = self.train_bytes - self.spec.seq_len
        at = torch.randint(places, (batch_size,), generator=generator, device=generator.device)
        return self.windows(at.cpu()).to(generator.device)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        check_draw(batch_size)
        available = (self.num_bytes - self.train_bytes - 1) // self.spec.seq_len
        count = min(self.spec.eval_examples, available)
        chosen = torch.arange(count) * available // count
        at = self.train_bytes + chosen * self.spec.seq_len
        for i in range(0, count, batch_size):
            yield self.windows(at[i : i + batch_size])

    def windows(self, at: Tensor) -> Batch:
        """The windows that begin at these bytes of the stream, cut where a document begins."""
        size = self.spec.seq_len + 1
        text = self.stream.unfold(0, size, 1)[at].long()
        starts = self.starts.unfold(0, size, 1)[at]
        targets = text[:, 1:].masked_fill(starts[:, 1:], IGNORE)
        first = starts[:, :-1]
        first[:, 0] = True
        cuts = first.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([cuts, cuts.new_tensor([first.numel()])])
        return Batch(text[:, :-1].flatten(), targets.flatten(), cu_seqlens)


def standard_library() -> list[str]:
    """The sources of this Python's standard library, without tests and installed packages, in the order of paths."""
    left_out = {"test", "site-packages", "dist-packages"}
    files = walk(sysconfig.get_path("stdlib"), left_out.__contains__)
    return sorted(path for path in files if path.endswith(".py"))


def find_files(paths: Sequence[str]) -> list[str]:
    """The files that these names, folders and globs stand for, each once, in the order of paths."""
    found: dict[str, str] = {}
    for entry in paths:
        name = os.path.expanduser(entry)
        matches = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
        files = [file for match in matches for file in (walk(match, is_hidden) if os.path.isdir(match) else [match])]
        if not files:
            raise InputError(f"paths: {entry!r} is no file, no folder with files and no glob that matches one")
        found.update((os.path.realpath(file), file) for file in files)
    return [found[place] for place in sorted(found)]


def walk(folder: str, skip: Callable[[str], bool]) -> Iterator[str]:
    """Every file below a folder but those whose name, or the name of a folder they lie in, is skipped."""
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not skip(name)]
        yield from (os.path.join(root, name) for name in files if not skip(name))


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def read(path: str) -> bytes:
    """The bytes of one file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        refuse(error)


def refuse(error: OSError) -> NoReturn:
    """What can't be read is an error that names it, not a smaller corpus."""
    raise InputError(f"paths: {error.filename!r} can't be read: {error.strerror}") from error
