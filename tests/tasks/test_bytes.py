"""Bytes: what is read, where it is cut, what is held out, what is refused."""

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

from momkit.errors import InputError
from momkit.tasks.base import IGNORE
from momkit.tasks.bytes import Bytes, BytesSpec

CONTENTS = {"a.txt": b"one two three. " * 9, "b/c.py": b"x", "b/d.py": b"four five six; " * 30, "e.md": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def make(*paths: Path | str, **fields: object) -> Bytes:
    return Bytes(BytesSpec(paths=tuple(map(str, paths)), **{"seq_len": 8, "held_out": 0.2, **fields}))


def test_a_folder_is_its_files_in_the_order_of_paths(folder: Path) -> None:
    task = make(folder)
    content = b"".join(CONTENTS[name] for name in sorted(CONTENTS))
    assert task.provenance == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "files": 4}
    assert sorted(bytes(task.stream.tolist())) == sorted(content)
    assert int(task.starts.sum()) == 3


def test_files_globs_and_folders_name_a_file_once(folder: Path) -> None:
    whole = make(folder)
    assert make(folder / "a.txt", folder / "*.*", folder / "**" / "*.py", folder / "b").sha256 == whole.sha256
    assert make(folder / "**" / "*.py").num_files == 2


def test_hidden_files_of_a_folder_are_left_out_unless_named(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"secret")
    (folder / ".hidden").write_bytes(b"secret")
    assert make(folder).num_files == 4
    assert make(folder, folder / ".hidden").num_files == 5


def test_a_name_with_glob_signs_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "x[1].txt").write_bytes(b"0123456789" * 20)
    assert make(tmp_path / "x[1].txt").num_files == 1


def test_the_corpus_does_not_depend_on_where_it_lies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved")
    for i, name in enumerate(reversed(CONTENTS)):
        (moved / str(i)).write_bytes(CONTENTS[name])
    a, b = make(folder), make(moved)
    assert torch.equal(a.stream, b.stream) and torch.equal(a.starts, b.starts)


def test_windows_are_pieces_of_documents_and_ask_for_the_next_byte(folder: Path) -> None:
    batch = make(folder).batch(torch.Generator().manual_seed(0), 200)
    assert batch.tokens.numel() == 200 * 8 and batch.group is None
    lengths = batch.cu_seqlens.diff().tolist()
    ends = 0
    for tokens, targets in zip(batch.tokens.split(lengths), batch.targets.split(lengths), strict=True):
        known = bytes(tokens.tolist())
        assert torch.equal(targets[:-1], tokens[1:])
        if targets[-1] == IGNORE:
            ends += 1
            assert any(document.endswith(known) for document in CONTENTS.values())
        else:
            assert any(known + bytes([int(targets[-1])]) in document for document in CONTENTS.values())
    assert ends and len(lengths) > 200
    # windows are cut, never shortened
    assert set(range(0, 1601, 8)) <= set(batch.cu_seqlens.tolist())


def test_held_out_bytes_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "count").write_bytes(bytes(range(250)))
    task = make(tmp_path, seq_len=7, held_out=0.2)
    trained = task.batch(torch.Generator().manual_seed(0), 3000)
    seen = set(trained.tokens.tolist()) | set(trained.targets.tolist())
    scored = list(task.evaluation(2))
    held = [t for batch in scored for t in batch.tokens.tolist()]
    assert seen == set(range(200))
    # 50 bytes hold seven windows of seven that know their next byte, and no two of them overlap
    assert held == list(range(200, 249)) and [len(b.cu_seqlens) - 1 for b in scored] == [2, 2, 2, 1]
    assert all(torch.equal(batch.targets, batch.tokens + 1) for batch in scored)


def test_scored_windows_are_evenly_spaced(tmp_path: Path) -> None:
    (tmp_path / "count").write_bytes(bytes(i % 251 for i in range(1000)))
    task = make(tmp_path, seq_len=5, held_out=0.5, eval_examples=3)
    (batch,) = task.evaluation(8)
    expected = [task.stream[i : i + 5].tolist() for i in (500, 500 + 33 * 5, 500 + 66 * 5)]
    assert batch.tokens.view(3, 5).tolist() == expected


def test_default_is_the_standard_library_without_tests() -> None:
    task = Bytes(BytesSpec())
    assert task.num_bytes > 5_000_000 and task.num_files > 300
    generator = torch.Generator().manual_seed(0)
    batch = task.batch(generator, 32)
    assert batch.tokens.numel() == 32 * 256 and len(batch.cu_seqlens) >= 33
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        task.batch(generator, 32)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.05
    assert sum(len(b.cu_seqlens) - 1 for b in task.evaluation(64)) >= 256


@pytest.mark.parametrize("name", ["missing.txt", "*.none", "empty_folder", ""])
def test_a_path_that_stands_for_nothing_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty_folder").mkdir()
    with pytest.raises(InputError, match=rf"paths: '{name.replace('*', '[*]')}' is no file"):
        make("a.txt", name)


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match=r"broken.txt' can't be read: No such file"):
        make(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_forbidden_file_or_folder_is_named(folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    with pytest.raises(InputError, match=r"a.txt' can't be read"):
        make(folder)
    (folder / "a.txt").chmod(0o600)
    (folder / "b").chmod(0)
    with pytest.raises(InputError, match=r"b' can't be read"):
        make(folder)
    (folder / "b").chmod(0o700)


def test_an_empty_or_too_small_corpus_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="hold 0 bytes in 1 files"):
        make(folder / "e.md")
    with pytest.raises(InputError, match=r"at least seq_len \+ 1 = 201"):
        make(folder, seq_len=200)


@pytest.mark.parametrize("fields", [{"held_out": 0.0}, {"held_out": 1.0}, {"seq_len": 0}, {"eval_examples": 0}])
def test_impossible_specs_are_refused_by_field(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        BytesSpec(**fields)
