"""Which checks are run on what, and the door that needs no pytest."""

import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from momkit.errors import InputError
from momkit.scan import Backend
from momkit.testing import (
    block_checks,
    block_state_checks,
    decode_checks,
    dispatch_checks,
    gradient_checks,
    router_checks,
    rule_checks,
    scan_checks,
    scan_state_checks,
)
from momkit.testing.drawing import Check, applies
from momkit.testing.subjects import BlockSubject, RouterSubject, RuleSubject, Subject, registered
from momkit.testing.targets import Target, subjects_of

MODULES: dict[str, tuple[ModuleType, ...]] = {
    "rule": (rule_checks,),
    "scan": (scan_checks, scan_state_checks, gradient_checks),
    "decode": (decode_checks,),
    "block": (block_checks, block_state_checks),
    "router": (router_checks,),
    "dispatch": (dispatch_checks,),
}

Status = Literal["passed", "failed", "failed as expected", "passed unexpectedly"]


@dataclass(frozen=True)
class BoundCheck:
    """One check on one subject; calling it raises what the check raises."""

    subject: Subject
    check: Check

    @property
    def id(self) -> str:
        return f"{self.subject.id}-{self.check.__name__}"

    def __call__(self) -> None:
        about = self.subject.about if isinstance(self.subject, BlockSubject) else self.subject
        if isinstance(about, RuleSubject | RouterSubject):
            with registered(about.cls):
                self.check(self.subject)
        else:
            self.check(self.subject)


@dataclass(frozen=True)
class CheckResult:
    """What became of one check. message: the failure, or the reason why one was expected."""

    id: str
    status: Status
    seconds: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status in ("passed", "failed as expected")


def checks_on(subject: Subject) -> list[BoundCheck]:
    """Every check that is about what this subject declares."""
    functions = [
        function
        for module in MODULES[subject.kind]
        for name, function in vars(module).items()
        if name.startswith("check_") and function.__module__ == module.__name__
    ]
    return [BoundCheck(subject, function) for function in functions if applies(function, subject)]


def bound_checks(
    targets: Iterable[Target],
    expected_failures: Mapping[str, str] | None = None,
    backend: Backend | None = None,
    device: torch.device | None = None,
) -> list[tuple[BoundCheck, str | None]]:
    """Every check of the targets, with the reason where it is expected to fail.

    expected_failures: a check's name, or its whole id, to the reason; one that names no check is refused.
    """
    expected = dict(expected_failures or {})
    subjects = [subject for target in targets for subject in subjects_of(target, backend, device)]
    found = [check for subject in subjects for check in checks_on(subject)]
    names = {name for check in found for name in (check.id, check.check.__name__)}
    if unknown := sorted(set(expected) - names):
        raise InputError(f"expected_failures names {', '.join(unknown)}; there is no such check")
    return [(check, expected.get(check.id, expected.get(check.check.__name__))) for check in found]


def run_check(check: BoundCheck, expected: str | None = None) -> CheckResult:
    """Run one check; a failure it was expected to have is no fault, a pass then is one."""
    start = time.perf_counter()
    try:
        check()
    except Exception as fault:
        seconds = time.perf_counter() - start
        if expected is not None:
            return CheckResult(check.id, "failed as expected", seconds, expected)
        return CheckResult(check.id, "failed", seconds, describe_fault(fault))
    seconds = time.perf_counter() - start
    if expected is not None:
        return CheckResult(check.id, "passed unexpectedly", seconds, f"expected to fail: {expected}")
    return CheckResult(check.id, "passed", seconds)


def describe_fault(fault: Exception) -> str:
    """The message of a failure, where it happened if it is no assertion, and the notes on how to see it again."""
    lines = [str(fault) if isinstance(fault, AssertionError) else f"{type(fault).__name__}: {fault}"]
    if not isinstance(fault, AssertionError):
        frame = traceback.extract_tb(fault.__traceback__)[-1]
        lines.append(f"at {frame.filename}:{frame.lineno} in {frame.name}")
    return "\n".join([*lines, *getattr(fault, "__notes__", [])])


def check(
    target: Target,
    *,
    only: str = "",
    backend: Backend | None = None,
    device: torch.device | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Run every check of a rule or router and report on each; needs no pytest.

    target: a registered name, "dispatch", a spec, or a class, which need not be registered.
    only: checks whose id contains this. backend: the one to check a rule on; all that can run it by default.
    device: where scans are checked; the one that MOMKIT_DEVICE names, or the CPU, by default.
    expected_failures: a check's name or id to the reason why it fails; one that passes is reported.
    """
    chosen = bound_checks([target], expected_failures, backend, device)
    return [run_check(bound, reason) for bound, reason in chosen if only in bound.id]
