"""Initial values of gates that several rules share."""

import math

import torch
from torch import Tensor


def decay_rate(*shape: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """A_log with exp(A_log) uniform in [low, high], as in Mamba-2 (arXiv 2405.21060) and its descendants."""
    return torch.empty(shape).uniform_(low, high).log()


def step_bias(*shape: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """A bias whose softplus, the step size at the start, is log-uniform in [low, high] (Mamba, arXiv 2312.00752)."""
    dt = torch.exp(torch.empty(shape).uniform_(math.log(low), math.log(high))).clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))
