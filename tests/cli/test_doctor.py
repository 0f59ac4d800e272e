"""What `doctor` says of the fused kernels."""

import torch

from momkit.cli import doctor
from momkit.errors import InputError
from momkit.scan import as_mechanism


def backend(name):
    [found] = [entry for entry in doctor.backends(["deltanet", "mamba2", "titans"]) if entry["name"] == name]
    return found


def triton():
    return backend("triton")


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


def test_a_kernel_of_a_rules_own_and_a_rule_without_its_structure(monkeypatch):
    rule = doctor.as_mechanism("titans")
    monkeypatch.setattr(doctor, "as_mechanism", lambda name: rule if name == "titans" else as_mechanism(name))
    monkeypatch.setattr(rule, "structures", refuse)
    monkeypatch.setattr(doctor, "why_not_triton", lambda rule, device: None)
    monkeypatch.setattr(doctor, "why_no_kernel", lambda *_: "none")
    said = doctor.served(["mamba", "titans"], torch.device("cpu"))
    assert said == "fused kernels; its own: mamba; no structure found: titans"


def refuse():
    raise InputError("structure = 'infer', but the step has none")


def test_generated_kernels_are_named_and_say_why_not(monkeypatch):
    monkeypatch.setattr(doctor, "why_not_generated", lambda rule, device: "no GPU")
    assert backend("generated") == {"name": "generated", "available": False, "reason": "no GPU"}
    monkeypatch.setattr(doctor, "why_not_generated", lambda rule, device: None)
    assert backend("generated")["available"] and "step" in backend("generated")["reason"]
