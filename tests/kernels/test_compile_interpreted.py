"""`torch.compile(fullgraph=True)` of `momkit.scan` on kernels, traced on a CPU under Triton's interpreter."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from momkit import scan
from momkit.kernels.available import interpreting
from momkit.registry import find_mechanism
from momkit.testing.oracle import gradients_of
from momkit.testing.strategies import ScanCase
from momkit.testing.tolerances import assert_equal

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

SIZES = {"H": 2, "G": 1, "K": 3, "V": 5}
one_of_each_family = pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(name, lengths, seed=0):
    cls = find_mechanism(name)
    return ScanCase(cls(cls.Spec()), SIZES, lengths, seed, dtype=torch.float32)


def forward_and_backward(door, case):
    inputs = {name: x.clone().requires_grad_() for name, x in case.inputs.items()}
    out = door(case.rule, inputs, case.cu_seqlens, initial_state=case.start(), backend="triton")
    results = {"output": out.output, **out.final_state}
    total = sum(x.square().sum() for x in results.values())
    return results | {f"gradient of {name}": x for name, x in gradients_of(total, inputs).items()}


@one_of_each_family
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(name, backend):
    made = case(name, (5, 0, 3))
    compiled = torch.compile(scan, fullgraph=True, backend=backend)
    expected = forward_and_backward(scan, made)
    for key, x in forward_and_backward(compiled, made).items():
        assert_equal(x, expected[key], f"{name}: {key}, compiled")


@one_of_each_family
def test_one_recompilation_serves_every_length(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scan, fullgraph=True, backend=counter)
    frames = []
    for length in (2, 3, 9, 17, 1, 0):
        made = case(name, (length,), seed=2 * length)
        out = compiled(made.rule, made.inputs, made.cu_seqlens, backend="triton")
        expected = scan(made.rule, made.inputs, made.cu_seqlens, backend="triton")
        assert_equal(out.output, expected.output, f"{name}: {length} tokens, compiled")
        frames.append(counter.frame_count)
    assert frames[3] <= 2, f"{frames} compilations"
    assert frames[-1] <= 4, f"{frames} compilations"


@one_of_each_family
def test_one_sequence_by_default(name):
    made = case(name, (6,))
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    out, expected = (door(made.rule, made.inputs, backend="triton") for door in (compiled, scan))
    assert_equal(out.output, expected.output, f"{name}: compiled")
