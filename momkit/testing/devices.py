"""Where scans are checked: on the CPU, or where MOMKIT_DEVICE says."""

import os

import torch

from momkit.errors import InputError

DEVICES = ("cpu", "cuda")
CPU = torch.device("cpu")


def current_device() -> torch.device:
    """The device that the environment names, `cpu` when it names none."""
    return device_named(os.environ.get("MOMKIT_DEVICE") or "cpu")


def device_named(name: str) -> torch.device:
    """A device that is there, by its name."""
    if name not in DEVICES:
        raise InputError(f"MOMKIT_DEVICE = {name!r}; allowed: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("MOMKIT_DEVICE = 'cuda': torch finds no CUDA GPU here; allowed: cpu")
    return torch.device(name)
