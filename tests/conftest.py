"""What stands in for a GPU in tests of code that asks for one."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come out on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class CpuGenerator(torch.Generator):
    """A generator on the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def gpu_on_cpu(monkeypatch) -> Iterator[None]:
    """Tensors, generators and modules that are asked for on a GPU, or sent to one, stay on the CPU; nothing waits."""
    module_to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *args: module_to(self, *[a for a in args if a != "cuda"]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    with OnCpu():
        yield
