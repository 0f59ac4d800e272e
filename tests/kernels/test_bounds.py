"""Out-of-bounds loads and stores of interpreted kernels are seen: `TRITON_INTERPRET=1 pytest`."""

import pytest
import torch

from momkit.kernels.available import interpreting

if not interpreting():
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

import triton
import triton.language as tl

from momkit.kernels.launch import launch
from momkit.testing.bounds import addresses_checked


@triton.jit
def copy_kernel(source, target, read, write):
    i = tl.arange(0, 8)
    row = tl.load(source + i, mask=i < read, other=0.0)
    tl.store(target + i, row, mask=i < write)


def copy(read: int, write: int) -> torch.Tensor:
    """Read and write that many of 5 elements; what lies beyond them is there, and no part of a tensor."""
    source, target = torch.arange(8.0), torch.zeros(8)
    launch(copy_kernel, 1, (source[:5], target[:5]), (read, write))
    return target


def test_what_is_inside_passes():
    with addresses_checked():
        assert copy(5, 5).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("read, write, what", [(5, 7, "stores 2"), (6, 5, "loads 1")])
def test_what_is_outside_is_named(read, write, what):
    message = rf"test_bounds.py:\d+, in copy_kernel: {what} of \d elements outside of all tensors, .* at index 5 of"
    with addresses_checked(), pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        copy(read, write)
    # it leaves no trace
    assert copy(read, write)[4] == 4


def test_nothing_lies_in_an_empty_tensor():
    with addresses_checked(), pytest.raises(triton.runtime.errors.InterpreterError, match="loads 1 of 1 elements"):
        launch(copy_kernel, 1, (torch.zeros(0), torch.zeros(8)), (1, 8))
