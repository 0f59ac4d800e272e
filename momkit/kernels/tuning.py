"""The fixed table of launch settings, by GPU, kernel, element size and size of the state; nothing is tuned at run time.

`momkit tune` measures candidates and writes the table, `tuning.json`.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from momkit.errors import BackendError

# the widest side of a state, padded to a power of two, that an entry serves
SIZE_CLASSES = (64, 128, 256)
# GPUs whose programs get less than this share the reduced table
LARGE_SHARED_MEMORY = 200 * 1024


@dataclass(frozen=True)
class Config:
    """block: columns of the state that one program holds; num_warps, num_stages: Triton's launch options."""

    block: int
    num_warps: int
    num_stages: int


@cache
def table() -> dict[str, Any]:
    """GPU class -> kernel -> element bytes -> size class -> [block, num_warps, num_stages]."""
    text = resources.files("momkit.kernels").joinpath("tuning.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def gpu_class(device: torch.device) -> str:
    """ "sm90" for GPUs with Hopper's shared memory, "small" for those with about 100 KB; a CPU interprets as sm90."""
    if device.type != "cuda":
        return "sm90"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "sm90" if shared >= LARGE_SHARED_MEMORY else "small"


def padded(size: int) -> int:
    """The width of the tile that holds `size` rows or columns: a power of two, 16 or more."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def config(kernel: str, dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> Config:
    """Launch settings of a kernel for a state of `rows` x `columns`; BackendError where the table has none."""
    widest = padded(max(rows, columns))
    size_class = next((str(size) for size in SIZE_CLASSES if widest <= size), "")
    try:
        block, num_warps, num_stages = table()[gpu_class(device)][kernel][str(dtype.itemsize)][size_class]
    except KeyError:
        raise BackendError(
            f"kernel {kernel!r} has no launch settings for a state of {rows} x {columns} with {dtype} inputs; "
            f"allowed: up to {SIZE_CLASSES[-1]} x {SIZE_CLASSES[-1]}, 16 or 32 bits"
        ) from None
    return Config(min(block, padded(columns)), num_warps, num_stages)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a GPU runs side by side, at least; an interpreter counts as two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
