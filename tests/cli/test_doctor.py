"""What `doctor` says of the fused kernels."""

import torch

from momkit.cli import doctor


def triton():
    return doctor.backends(["deltanet", "mamba2", "titans"])[-1]


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(doctor, "why_not_triton", lambda rule, device: f"{rule.name}: triton is not installed")
    assert triton() == {"name": "triton", "available": False, "reason": "gated_deltanet: triton is not installed"}


def test_kernels_that_can_run_say_which_rules_they_serve(monkeypatch):
    def why_not(rule, device):
        return None if rule.structure else "the rule declares no affine structure"

    monkeypatch.setattr(doctor, "why_not_triton", why_not)
    monkeypatch.setattr(doctor, "why_no_kernel", lambda rule, device, dtype, sizes: why_not(rule, device))
    assert triton()["available"]
    assert triton()["reason"] == "fused kernels; delta: deltanet; decode: deltanet, mamba2; scalar: mamba2"
    assert doctor.served([], torch.device("cpu")) == "fused kernels; "
