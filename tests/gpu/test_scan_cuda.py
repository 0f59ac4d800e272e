"""`momkit.scan` on a GPU at sizes that train: graphs, compilation, synchronisation, bits, and the truth.

Every test takes one rule, so that a part of them can be chosen: `pytest tests/gpu/test_scan_cuda.py -k retention`.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from momkit import scan
from momkit.registry import find_mechanism
from momkit.testing.gradient_checks import assert_true_gradients
from momkit.testing.oracle import gradients_of
from momkit.testing.scan_checks import assert_true_to_step
from momkit.testing.strategies import ScanCase
from momkit.testing.subjects import ScanSubject
from momkit.testing.tolerances import assert_close, assert_equal

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
RULES = ("linear_attention", "retention", "lightning_attention", "mamba2", "deltanet", "gated_deltanet")
SIZES = {"H": 4, "G": 4, "K": 128, "V": 128}
every_rule = pytest.mark.parametrize("name", RULES)


def subject(name: str) -> ScanSubject:
    cls = find_mechanism(name)
    return ScanSubject(name, cls, cls.Spec(), "triton", CUDA)


def case(name, lengths, seed=0, sizes=SIZES, dtype=torch.bfloat16) -> ScanCase:
    return ScanCase(subject(name).rule, sizes, lengths, seed, dtype=dtype)


def leaves_on_gpu(case):
    """Inputs, initial state and bounds of a case, those that are differentiable asking for a gradient."""
    tensors = {**case.inputs, **{f"start {name}": x for name, x in case.start().items()}}
    leaves = {name: x.to(CUDA).requires_grad_() for name, x in tensors.items()}
    return leaves, case.cu_seqlens.to(CUDA)


def forward_and_backward(rule, leaves, cu_seqlens, scan=scan):
    """Outputs, final states and all gradients, by name."""
    state = {name: x for name, x in leaves.items() if name.startswith("start ")}
    inputs = {name: x for name, x in leaves.items() if name not in state}
    start = {name.removeprefix("start "): x for name, x in state.items()}
    out = scan(rule, inputs, cu_seqlens, initial_state=start, backend="triton")
    results = {"output": out.output, **out.final_state}
    total = sum(x.float().square().sum() for x in results.values())
    return results | {f"gradient of {name}": x for name, x in gradients_of(total, leaves).items()}


@every_rule
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation(name):
    made = case(name, (1000, 0, 24, 1024))
    leaves, cu_seqlens = leaves_on_gpu(made)
    forward_and_backward(made.rule, leaves, cu_seqlens)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(made.rule, leaves, cu_seqlens)
        scan(made.rule, {n: x for n, x in leaves.items() if not n.startswith("start ")}, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_rule
def test_a_captured_graph_replays_with_new_data(name):
    lengths, other = (700, 0, 90, 10), (1, 300, 99, 400)
    first, second = case(name, lengths, seed=2), case(name, other, seed=4)
    leaves, cu_seqlens = leaves_on_gpu(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(first.rule, leaves, cu_seqlens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(first.rule, leaves, cu_seqlens)

    for made in (second, first):
        new, bounds_now = leaves_on_gpu(made)
        with torch.no_grad():
            for key, x in leaves.items():
                x.copy_(new[key])
            cu_seqlens.copy_(bounds_now)
        graph.replay()
        for key, expected in forward_and_backward(made.rule, new, bounds_now).items():
            assert_equal(captured[key], expected, f"{name}: {key} of a replay")


@every_rule
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiles_whole_and_seldom(name):
    counter = CompileCounterWithBackend("aot_eager")
    rule = subject(name).rule

    def run(leaves, cu_seqlens):
        inputs = {key: x for key, x in leaves.items() if not key.startswith("start ")}
        out = scan(rule, inputs, cu_seqlens, backend="triton")
        return out.output, out.final_state["S"]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    sizes = SIZES | {"K": 32, "V": 32}
    frames = []
    for length in (*range(2, 99, 2), 1, 0):
        leaves, cu_seqlens = leaves_on_gpu(case(name, (length,), seed=2 * length, sizes=sizes))
        outputs = compiled(leaves, cu_seqlens)
        sum(x.float().square().sum() for x in outputs).backward()
        frames.append(counter.frame_count)
        for x, expected in zip(outputs, run(leaves, cu_seqlens), strict=True):
            assert_equal(x, expected, f"{name}: {length} tokens, compiled")
    assert frames[-3] <= 2, f"{name}: {frames[-3]} compilations for 49 lengths from 2 on"
    assert frames[-1] <= 4, f"{name}: {frames[-1]} compilations with lengths 1 and 0"
    torch._dynamo.reset()


# what inductor warns of is about kernels that are not ours
@every_rule
@pytest.mark.filterwarnings("default")
def test_inductor_gives_what_eager_gives(name):
    made = case(name, (500, 30, 0, 494))
    leaves, cu_seqlens = leaves_on_gpu(made)
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True)
    expected = forward_and_backward(made.rule, leaves, cu_seqlens)
    for key, x in forward_and_backward(made.rule, leaves, cu_seqlens, scan=compiled).items():
        assert_equal(x, expected[key], f"{name}: {key}, compiled by inductor")
    torch._dynamo.reset()


@every_rule
@pytest.mark.parametrize("lengths", [(4096,), (1500, 0, 1, 64, 2000, 531)])
def test_runs_give_the_same_bits(name, lengths):
    made = case(name, lengths)
    leaves, cu_seqlens = leaves_on_gpu(made)
    first = forward_and_backward(made.rule, leaves, cu_seqlens)
    for _ in range(3):
        for key, x in forward_and_backward(made.rule, leaves, cu_seqlens).items():
            assert_equal(x, first[key], f"{name}: {key} of another run")


# one segment is long enough to be cut in pieces, and key heads are shared
@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_agrees_with_the_step_in_float64(name, dtype):
    sizes = SIZES | {"G": 2, "V": 64}
    made = case(name, (700, 1, 0, 130, 105, 64), sizes=sizes, dtype=dtype)
    assert_true_to_step(subject(name), made)
    assert_true_gradients(subject(name), made)


@every_rule
def test_no_token_at_all(name):
    made = case(name, (0, 0))
    leaves, cu_seqlens = leaves_on_gpu(made)
    found = forward_and_backward(made.rule, leaves, cu_seqlens)
    assert found["output"].shape == (0, 4, 128)
    for state, x in made.start().items():
        assert_equal(found[state].cpu(), x, f"{name}: {state} of empty segments")
        assert_close(found[f"gradient of start {state}"].cpu(), 2 * x, f"{name}: gradient of {state}")
