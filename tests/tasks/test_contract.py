"""What every task promises: seeded draws, a fixed evaluation apart from them, well-formed packed batches."""

import ast
from pathlib import Path

import pytest
import torch

from momkit.errors import InputError
from momkit.tasks import base
from momkit.tasks.base import IGNORE, Batch, Task, TaskSpec
from momkit.tasks.bytes import Bytes, BytesSpec
from momkit.tasks.mqar import MQAR, MQARSpec
from momkit.tasks.parity import Parity, ParitySpec
from momkit.tasks.selective_copy import SelectiveCopy, SelectiveCopySpec

TASKS = (MQAR, SelectiveCopy, Parity, Bytes)
every_task = pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate((1, 300, 7, 1200, 50, 33)):
        data = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        (folder / f"{i}.txt").write_bytes(bytes(data.tolist()))
    return str(folder)


def make(cls: type[Task], corpus: str) -> Task:
    specs: dict[type[Task], TaskSpec] = {
        MQAR: MQARSpec(
            vocab_size=64,
            train=[{"seq_len": 16, "num_pairs": 2, "weight": 2}, {"seq_len": 33, "num_pairs": 8}],
            eval=[{"seq_len": 16, "num_pairs": 4}, {"seq_len": 64, "num_pairs": 16}],
            eval_examples=10,
        ),
        SelectiveCopy: SelectiveCopySpec(
            train=[{"seq_len": 20, "num_tokens": 3}, {"seq_len": 40, "num_tokens": 6}],
            eval=[{"seq_len": 50, "num_tokens": 8}],
            eval_examples=10,
        ),
        Parity: ParitySpec(min_len=1, max_len=9, eval_lens=(5, 20), eval_examples=10),
        Bytes: BytesSpec(paths=(corpus,), seq_len=16, held_out=0.2, eval_examples=10),
    }
    return cls(specs[cls])


def draw(task: Task, seed: int, batch_size: int = 13, progress: float = 1.0) -> Batch:
    return task.batch(torch.Generator().manual_seed(seed), batch_size, progress)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.tokens, b.tokens), (a.targets, b.targets), (a.cu_seqlens, b.cu_seqlens)]
    if a.group is not None and b.group is not None:
        pairs.append((a.group, b.group))
    return all(torch.equal(x, y) for x, y in pairs)


def sequences(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    found = []
    for batch in batches:
        lengths = batch.cu_seqlens.diff().tolist()
        found += zip(batch.tokens.split(lengths), batch.targets.split(lengths), strict=True)
    return [(tokens.tolist(), targets.tolist()) for tokens, targets in found]


def check_form(batch: Batch, vocab_size: int) -> None:
    T = batch.tokens.numel()
    for tensor in (batch.tokens, batch.targets, batch.cu_seqlens):
        assert tensor.dtype == torch.int64 and tensor.dim() == 1
    assert batch.targets.shape == (T,)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == T and (batch.cu_seqlens.diff() > 0).all()
    assert batch.tokens.min() >= 0 and batch.tokens.max() < vocab_size
    asked = batch.targets[batch.targets != IGNORE]
    assert asked.numel() and asked.min() >= 0 and asked.max() < vocab_size
    if batch.group is not None:
        assert batch.group.shape == (T,) and batch.group.dtype == torch.int64


@every_task
def test_batches_are_well_formed(cls: type[Task], corpus: str) -> None:
    task = make(cls, corpus)
    for seed in range(3):
        for progress in (0.0, 0.5, 1.0):
            check_form(draw(task, seed, progress=progress), task.vocab_size)
    check_form(draw(task, 0, batch_size=1), task.vocab_size)
    for batch in task.evaluation(4):
        check_form(batch, task.vocab_size)


@every_task
def test_same_generator_state_same_batch(cls: type[Task], corpus: str) -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = make(cls, corpus), make(cls, corpus)
    stream = [first.batch(generator, 8) for _ in range(3)]
    generator.manual_seed(7)
    for batch in stream:
        torch.rand(3)  # the global generator has no say
        assert same(batch, second.batch(generator, 8))
    assert not same(stream[0], stream[1])


@every_task
def test_evaluation_is_fixed_and_does_not_depend_on_the_batch_size(cls: type[Task], corpus: str) -> None:
    task = make(cls, corpus)
    once = list(task.evaluation(4))
    draw(task, 0)
    assert all(same(a, b) for a, b in zip(once, task.evaluation(4), strict=True))
    assert sequences(once) == sequences(list(task.evaluation(3)))


@pytest.mark.parametrize("cls", (MQAR, SelectiveCopy, Parity), ids=lambda cls: cls.name)
def test_eval_seed_changes_evaluation_and_is_no_training_seed(cls: type[Task], corpus: str) -> None:
    task = make(cls, corpus)
    other = cls(task.spec.model_copy(update={"eval_seed": 1}))
    assert sequences(list(task.evaluation(4))) != sequences(list(other.evaluation(4)))
    seed = base.held_out_generator(cls.name, 0).initial_seed()
    assert seed > 1_000_000
    assert seed != base.held_out_generator(cls.name, 1).initial_seed()


@every_task
def test_spec_round_trip_and_refusals(cls: type[Task], corpus: str) -> None:
    task = make(cls, corpus)
    assert cls.Spec.model_validate_json(task.spec.model_dump_json()) == task.spec
    assert cls.Spec().kind == cls.name
    with pytest.raises(ValueError, match="nonsense"):
        cls.Spec(nonsense=1)
    with pytest.raises(TypeError, match=cls.Spec.__name__):
        cls(TaskSpec())
    with pytest.raises(InputError, match="batch_size=0"):
        draw(task, 0, batch_size=0)
    with pytest.raises(InputError, match="batch_size=0"):
        next(task.evaluation(0))
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="progress="):
            draw(task, 0, progress=progress)


def test_batch_moves_whole(corpus: str) -> None:
    for cls in TASKS:
        batch = draw(make(cls, corpus), 0)
        moved = batch.to("meta")
        assert moved.tokens.device.type == moved.targets.device.type == moved.cu_seqlens.device.type == "meta"
        assert (moved.group is None) == (batch.group is None)


def test_tasks_import_neither_routing_nor_mechanisms() -> None:
    for path in Path(base.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.startswith(("momkit.routing", "momkit.mechanisms"))], path.name
