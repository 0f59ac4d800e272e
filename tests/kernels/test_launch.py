"""Launching kernels and compiling those that are missing, and the table of launch settings.

No GPU is needed: where `launch` would compile for one, stand-ins for tensors and kernels note what they are asked.
"""

import ast
from importlib import resources
from types import SimpleNamespace

import pytest
import torch

from momkit.kernels.available import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from momkit.errors import BackendError
from momkit.kernels import launch as launching
from momkit.kernels import tuning
from momkit.kernels.launch import compiled_together, launch
from momkit.kernels.tuning import SIZE_CLASSES, Config, config, padded


class Kernel:
    """Notes in a shared log what a Triton kernel would do: compile, run, or both."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.log.append((self.name, "compile and run", grid, options))
            return {(programs, 1, 1): lambda *arguments: self.log.append((self.name, "run")) for programs in range(9)}

        return compile_and_run

    def warmup(self, *arguments, grid, **options):
        self.log.append((self.name, "compile", grid, options))


@pytest.fixture
def log():
    return []


@pytest.fixture
def gpu(monkeypatch):
    """A tensor that says it is on a GPU, with nothing compiled."""
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, data_ptr=lambda: 0)


def did(log):
    return [entry[:2] for entry in log]


def test_no_programs_do_nothing(log, gpu):
    for tensor in (torch.zeros(0), gpu):
        launch(Kernel("a", log), 0, (tensor,), ())
    assert log == []


def test_on_a_cpu_a_kernel_is_interpreted_at_once(log):
    launch(Kernel("a", log), 3, (None, torch.zeros(2)), (1,), 64, num_warps=8)
    assert log == [("a", "compile and run", (3,), {})]


def test_a_kernel_is_compiled_once(log, gpu):
    kernel = Kernel("a", log)
    for programs in (2, 3):
        launch(kernel, programs, (gpu, None), (programs, 0.5), 64, num_warps=8, num_stages=2)
    assert log == [("a", "compile and run", (2,), {"num_warps": 8, "num_stages": 2}), ("a", "run")]


def variants(gpu):
    like = {"device": gpu.device, "dtype": gpu.dtype, "data_ptr": gpu.data_ptr}
    yield "dtype", ((SimpleNamespace(**like | {"dtype": torch.float16}),), (1,), 64), {}
    yield "alignment", ((SimpleNamespace(**like | {"data_ptr": lambda: 8}),), (1,), 64), {}
    yield "constant", ((gpu,), (1,), 32), {}
    yield "warps", ((gpu,), (1,), 64), {"num_warps": 8}
    yield "stages", ((gpu,), (1,), 64), {"num_stages": 1}
    yield "None", ((gpu, None), (1,), 64), {}


@pytest.mark.parametrize("what", ["dtype", "alignment", "constant", "warps", "stages", "None"])
def test_what_a_kernel_is_compiled_anew_for(what, log, gpu):
    kernel = Kernel("a", log)
    launch(kernel, 2, (gpu,), (1,), 64)
    (arguments, options) = next((arguments, options) for name, arguments, options in variants(gpu) if name == what)
    launch(kernel, 2, *arguments, **options)
    launch(kernel, 2, (gpu,), (7,), 64)
    assert did(log) == [("a", "compile and run"), ("a", "compile and run"), ("a", "run")]


@pytest.fixture
def body(log, gpu):
    """A body of two kernels that notes its calls."""
    kernels = [Kernel(name, log) for name in "ab"]

    @compiled_together
    def run(x, *, y):
        log.append(("body", (x, y)))
        for kernel in kernels:
            launch(kernel, 2, (gpu,), ())
        return x + y

    return run


def test_missing_kernels_are_compiled_together(body, log):
    assert body(1, y=2) == 3
    once, compiled = ("body", (1, 2)), [(name, "compile") for name in "ab"]
    # the first run stops at the first missing kernel, the second runs nothing
    assert did(log) == [once, once, *compiled, once, *((name, "compile and run") for name in "ab")]


def test_compiling_runs_nothing_that_is_there_already(log, gpu):
    kernels = [Kernel(name, log) for name in "ab"]
    launch(kernels[0], 2, (gpu,), ())
    log.clear()
    compiled_together(lambda: [launch(kernel, 2, (gpu,), ()) for kernel in kernels])()
    # in the first run, which stops at the missing one, and in the last
    assert did(log).count(("a", "run")) == 2
    assert did(log).count(("b", "compile and run")) == 1


def test_with_nothing_missing_a_body_runs_once(body, log):
    body(1, y=2)
    log.clear()
    assert body(3, y=4) == 7
    assert did(log) == [("body", (3, 4)), ("a", "run"), ("b", "run")]


def test_on_a_cpu_a_body_runs_once(log):
    @compiled_together
    def body():
        log.append("body")
        launch(Kernel("a", log), 1, (torch.zeros(1),), ())

    body()
    assert log[0] == "body"
    assert did(log[1:]) == [("a", "compile and run")]


# in the first run, while kernels compile, and in the last
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_what_a_body_raises_passes_through(turn, log, gpu):
    kernel, turns = Kernel("a", log), []

    @compiled_together
    def body():
        turns.append(None)
        if len(turns) == turn:
            raise ArithmeticError("of the body")
        launch(kernel, 1, (gpu,), ())

    with pytest.raises(ArithmeticError, match="of the body"):
        body()
    # and leaves no rule behind: a kernel that is missing is compiled and run
    launch(Kernel("b", log), 1, (gpu,), ())
    assert did(log)[-1] == ("b", "compile and run")


TABLE = tuning.table()


def kernels_named_in_code() -> set[str]:
    """Every string in the first argument of a call of `config` or `settings`."""
    files = (path for path in resources.files("momkit.kernels").iterdir() if path.name.endswith(".py"))
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    calls = (node for node in nodes if isinstance(node, ast.Call) and node.args)
    named = (call.args[0] for call in calls if ast.unparse(call.func).split(".")[-1] in ("config", "settings"))
    leaves = (leaf for argument in named for leaf in ast.walk(argument) if isinstance(leaf, ast.Constant))
    return {leaf.value for leaf in leaves if isinstance(leaf.value, str)}


@pytest.mark.parametrize("gpu", TABLE)
def test_every_entry_is_legal(gpu):
    for kernel, itemsizes in TABLE[gpu].items():
        for itemsize, sizes in itemsizes.items():
            for size, (block, num_warps, num_stages) in sizes.items():
                where = gpu, kernel, itemsize, size
                # a block is a power of two, no wider than the state that it is a part of
                assert block in (16, 32, 64, 128, 256), where
                assert block <= int(size), where
                assert num_warps in (1, 2, 4, 8), where
                assert num_stages in (1, 2, 3, 4), where


def test_the_table_is_complete():
    assert set(TABLE) == {"sm90", "small"}
    named = kernels_named_in_code()
    assert {"scalar_scan", "delta_scan", "delta_states", "delta_chain"} <= named
    for gpu, kernels in TABLE.items():
        assert set(kernels) == named, gpu
        for kernel, itemsizes in kernels.items():
            # states are float32 whatever the inputs are, and the chain reads nothing else
            assert set(itemsizes) == ({"4"} if kernel == "delta_chain" else {"2", "4"}), (gpu, kernel)
            for sizes in itemsizes.values():
                assert tuple(sizes) == tuple(str(size) for size in SIZE_CLASSES), (gpu, kernel)


@pytest.fixture
def small_table(monkeypatch):
    """A table of one kernel, in which every entry tells where it stands."""
    sizes = {"64": [64, 1, 1], "128": [64, 2, 2], "256": [128, 8, 4]}
    monkeypatch.setattr(tuning, "table", lambda: {"sm90": {"scan": {"2": sizes}}})
    config.cache_clear()
    yield
    config.cache_clear()


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        (1, 1, Config(16, 1, 1)),
        (64, 20, Config(32, 1, 1)),
        (20, 65, Config(64, 2, 2)),
        (128, 128, Config(64, 2, 2)),
        (129, 70, Config(128, 8, 4)),
        (256, 256, Config(128, 8, 4)),
    ],
)
def test_the_wider_side_chooses_the_entry(rows, columns, expected, small_table):
    # a block is never wider than the tile that holds all columns
    assert config("scan", torch.float16, rows, columns, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    "kernel, dtype, rows", [("scam", torch.float16, 64), ("scan", torch.float32, 64), ("scan", torch.float16, 257)]
)
def test_what_the_table_lacks_is_an_error(kernel, dtype, rows, small_table):
    with pytest.raises(BackendError, match="has no launch settings"):
        config(kernel, dtype, rows, 64, torch.device("cpu"))


@pytest.mark.parametrize("size, width", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)])
def test_padded(size, width):
    assert padded(size) == width


@pytest.mark.parametrize("shared, gpu", [(227 * 1024, "sm90"), (99 * 1024, "small")])
def test_the_class_of_a_gpu_is_its_shared_memory(shared, gpu, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared, multi_processor_count=48)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 7)
    for cached in (tuning.gpu_class, tuning.multiprocessors):
        cached.cache_clear()
    assert tuning.gpu_class(device) == gpu
    assert tuning.multiprocessors(device) == 48
    for cached in (tuning.gpu_class, tuning.multiprocessors):
        cached.cache_clear()


def test_a_cpu_interprets_as_the_larger_gpu():
    assert tuning.gpu_class(torch.device("cpu")) == "sm90"
