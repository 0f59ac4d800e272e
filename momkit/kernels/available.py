"""Whether kernels can run on a device, and why not; importing this imports no triton."""

import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets kernels on a CPU; it reads this once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_kernels(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why no kernel can run on tensors of a device and dtype, None if kernels can; what is not given may be any."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device and device.type != "cuda" and not interpreting():
        return f"kernels run on CUDA, not on {device.type} (TRITON_INTERPRET=1 interprets them, slowly)"
    if device and device.type == "cuda" and torch.version.hip:
        return "the kernels are written for NVIDIA GPUs"
    here = device is not None and device.type == "cuda" and torch.cuda.is_available()
    if here and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype == torch.float64:
        return "kernels compute in float32 or narrower, not in float64"
    if dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None
