"""The two doors of the kit: pytest parameters, and a list of results without pytest."""

import subprocess
import sys
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from momkit.errors import BackendError, InputError, UnknownNameError
from momkit.mechanisms.gated_deltanet import GatedDeltaNet, GatedDeltaNetSpec
from momkit.mechanisms.linear_attention import LinearAttentionSpec
from momkit.mechanisms.mamba2 import Mamba2, Mamba2Spec
from momkit.registry import registry
from momkit.routing.softmax_topk import SoftmaxTopK, SoftmaxTopKSpec
from momkit.testing import CheckResult, check, parametrize_with_checks
from momkit.testing.devices import current_device
from momkit.testing.subjects import ScanSubject
from momkit.testing.suite import bound_checks


class MySpec(GatedDeltaNetSpec):
    kind: Literal["my_rule"] = "my_rule"


class MyRule(GatedDeltaNet):
    """A rule that nobody registered."""

    Spec = MySpec


class MyRouterSpec(SoftmaxTopKSpec):
    kind: Literal["my_router"] = "my_router"


class MyRouter(SoftmaxTopK):
    """A router that nobody registered."""

    Spec = MyRouterSpec


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", "mutants")


def ids(targets, **options):
    return [bound.id for bound, _ in bound_checks(targets, **options)]


def parameters(decorator):
    """The parameters that a decorator gives a test."""

    @decorator
    def test(check):
        check()

    (mark,) = test.pytestmark
    assert mark.args[0] == "check"
    return mark.args[1]


def test_a_rule_is_checked_alone_on_every_backend_and_in_a_block():
    found = ids(["gated_deltanet"])
    for expected in (
        "gated_deltanet-check_documented",
        "gated_deltanet-reference-check_causal",
        "gated_deltanet-chunked-check_causal",
        "gated_deltanet-block-check_causal",
    ):
        assert expected in found
    assert len(found) == len(set(found))


def test_checks_apply_by_what_is_declared():
    assert not [i for i in ids(["mamba"]) if "chunked" in i or "structure" in i]
    assert "retention-reference-check_constants_may_vary" in ids(["retention"])
    assert "gated_deltanet-reference-check_constants_may_vary" not in ids(["gated_deltanet"])
    assert "softmax_topk-block-check_one_memory_is_the_bare_rule" not in ids(["softmax_topk"])


def test_one_backend_can_be_chosen():
    assert not [i for i in ids(["gated_deltanet"], backend="chunked") if "-reference-" in i]
    with pytest.raises(BackendError, match="mamba"):
        ids(["mamba"], backend="chunked")


def test_kernels_are_checked_where_they_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not [i for i in ids(["gated_deltanet"]) if "-triton-" in i]
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        ids(["gated_deltanet"], backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "gated_deltanet-triton-check_causal" in ids(["gated_deltanet"])
    assert not [i for i in ids(["kda"]) if i.startswith("kda-triton-")]


def test_what_a_subject_takes_follows_from_backend_and_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    scans = {b: ScanSubject("mamba2", Mamba2, Mamba2Spec(), b) for b in ("reference", "chunked", "triton")}
    assert scans["triton"].dtypes == scans["triton"].computes_in == (torch.float32, torch.float16)
    assert scans["triton"].widest == torch.float32
    assert scans["triton"].multiplied_in(torch.float16) == torch.float16
    assert scans["triton"].environment == {"TRITON_INTERPRET": "1"}
    for backend in ("reference", "chunked"):
        assert torch.float16 not in scans[backend].dtypes
        assert scans[backend].widest == torch.float64
        assert scans[backend].multiplied_in(torch.bfloat16) == torch.float32
        assert scans[backend].environment == {}
    assert [backend for backend, subject in scans.items() if subject.exact] == ["reference"]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = ScanSubject("mamba2", Mamba2, Mamba2Spec(), "triton", torch.device("cuda"))
    assert on_gpu.dtypes == (torch.float32, torch.float16, torch.bfloat16)
    assert on_gpu.environment == {"MOMKIT_DEVICE": "cuda"}


def test_the_device_is_one_that_is_there(monkeypatch):
    monkeypatch.delenv("MOMKIT_DEVICE", raising=False)
    assert current_device() == torch.device("cpu")
    monkeypatch.setenv("MOMKIT_DEVICE", "gpu")
    with pytest.raises(InputError, match="MOMKIT_DEVICE = 'gpu'"):
        ids(["gated_deltanet"])
    monkeypatch.setenv("MOMKIT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA GPU"):
        ids(["gated_deltanet"])


def test_everything_registered_has_checks():
    for name in [*registry().names("mechanism"), *registry().names("router"), "dispatch"]:
        assert len(ids([name])) > 5


def test_a_spec_is_checked_with_its_fields():
    found = bound_checks([GatedDeltaNetSpec(num_heads=3)])
    assert found[0][0].subject.spec.num_heads == 3
    assert found[0][0].id == "gated_deltanet(num_heads=3)-check_spec_round_trips"
    assert ids(["gated_deltanet(num_heads=3)"]) == [bound.id for bound, _ in found]
    assert ids(["linear_attention(normalize=True,feature_map=relu)"]) == ids(
        [LinearAttentionSpec(normalize=True, feature_map="relu")]
    )
    with pytest.raises(ValidationError, match="no_such_field"):
        ids(["gated_deltanet(no_such_field=1)"])


@pytest.mark.parametrize(
    "cls, one", [(MyRule, "my_rule-block-check_causal"), (MyRouter, "my_router-block-check_causal")]
)
def test_a_class_that_is_not_registered(cls, one):
    (result,) = check(cls, only=one)
    assert result.status == "passed", result.message
    assert cls.name not in registry().names("mechanism") + registry().names("router")


def test_unknown_targets_are_refused():
    with pytest.raises(UnknownNameError, match="no_such_rule"):
        check("no_such_rule")
    with pytest.raises(InputError, match="can't be checked"):
        check(3)


def test_results_without_pytest(monkeypatch):
    (good,) = check("gated_deltanet", only="gated_deltanet-check_documented")
    assert good == CheckResult("gated_deltanet-check_documented", "passed", good.seconds)
    assert good.ok
    monkeypatch.setattr(GatedDeltaNet, "freeze", lambda self, inputs, where: inputs)
    (bad,) = check("gated_deltanet", only="gated_deltanet-check_freeze_keeps_state")
    assert bad.status == "failed"
    assert not bad.ok
    assert "frozen token" in bad.message
    assert "(case)" in bad.message, "the drawn case is labelled"
    assert "reproduce: MOMKIT_PROFILE=mutants MOMKIT_SEED=" in bad.message


def test_a_failure_can_be_reproduced_from_its_note(monkeypatch):
    monkeypatch.setattr(GatedDeltaNet, "freeze", lambda self, inputs, where: inputs)
    name = "gated_deltanet-check_freeze_keeps_state"
    (first,) = check("gated_deltanet", only=name)
    monkeypatch.setenv("MOMKIT_SEED", first.message.partition("MOMKIT_SEED=")[2].split()[0])
    (second,) = check("gated_deltanet", only=name)
    assert second.status == "failed"


def test_a_crash_in_a_plugin_is_a_failed_check(monkeypatch):
    def freeze(self, inputs, where):
        raise KeyError("beta")

    monkeypatch.setattr(GatedDeltaNet, "freeze", freeze)
    (result,) = check("gated_deltanet", only="gated_deltanet-check_freeze_keeps_state")
    assert result.status == "failed"
    assert "KeyError" in result.message
    assert "test_doors.py" in result.message, "it says where"


def test_expected_failures_are_strict(monkeypatch):
    name = "gated_deltanet-check_freeze_keeps_state"
    expected = {"check_freeze_keeps_state": "it is known"}
    (result,) = check("gated_deltanet", only=name, expected_failures=expected)
    assert (result.status, result.ok) == ("passed unexpectedly", False)
    monkeypatch.setattr(GatedDeltaNet, "freeze", lambda self, inputs, where: inputs)
    (result,) = check("gated_deltanet", only=name, expected_failures={name: "it is known"})
    assert (result.status, result.ok, result.message) == ("failed as expected", True, "it is known")


def test_expected_failures_name_checks_that_exist():
    with pytest.raises(InputError, match="check_nothing"):
        parametrize_with_checks(["gated_deltanet"], expected_failures={"check_nothing": "no reason"})


def test_pytest_parameters():
    reason = "its future leaks"
    found = {p.id: p for p in parameters(parametrize_with_checks([MyRule], {"my_rule-reference-check_causal": reason}))}
    assert set(found) == set(ids([MyRule]))
    (mark,) = found["my_rule-reference-check_causal"].marks
    assert (mark.name, mark.kwargs) == ("xfail", {"reason": reason, "strict": True})
    assert not found["my_rule-block-check_causal"].marks
    found["my_rule-check_declares_itself"].values[0]()
    some = parameters(parametrize_with_checks([MyRule], only="-chunked-", backend="chunked"))
    assert [p.id for p in some] == [i for i in ids([MyRule]) if "-chunked-" in i]


def test_three_lines_make_a_test_file(tmp_path):
    (tmp_path / "test_plugin.py").write_text(
        "from momkit.testing import parametrize_with_checks\n\n\n"
        '@parametrize_with_checks(["gated_deltanet"], {"check_documented": "it is documented"})\n'
        "def test_conformance(check):\n    check()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "check_documented or check_freeze"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "1 failed" in done.stdout, "an unexpected pass fails"
    assert "XPASS(strict)" in done.stdout


def test_the_kit_needs_no_pytest():
    code = "import sys, momkit.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
