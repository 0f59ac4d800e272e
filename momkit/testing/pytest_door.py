"""The pytest door: every check of a plugin as a test of its own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from momkit.scan import Backend
from momkit.testing.suite import bound_checks
from momkit.testing.targets import Target

F = TypeVar("F", bound=Callable[..., Any])


def parametrize_with_checks(
    targets: Iterable[Target],
    expected_failures: Mapping[str, str] | None = None,
    *,
    only: str = "",
    backend: Backend | None = None,
    device: torch.device | None = None,
) -> Callable[[F], F]:
    """Parametrize a test, which takes `check` and calls it, with every check of rules and routers.

        @parametrize_with_checks(["my_rule"])
        def test_conformance(check):
            check()

    targets: registered names, specs, or classes, which need not be registered.
    expected_failures: a check's name, or its id as pytest shows it, to the reason why it fails; strict: it must fail.
    only, backend, device: as in `check`.
    """
    import pytest

    parameters = [
        pytest.param(check, id=check.id, marks=() if reason is None else pytest.mark.xfail(reason=reason, strict=True))
        for check, reason in bound_checks(targets, expected_failures, backend, device)
        if only in check.id
    ]
    return pytest.mark.parametrize("check", parameters)
