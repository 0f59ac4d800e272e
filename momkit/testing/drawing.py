"""Checks that hold for everything hypothesis draws, as plain functions of one subject."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import hypothesis
from hypothesis import strategies as st

from momkit.testing.profiles import current_profile, profile_name, seed_for
from momkit.testing.subjects import Subject

S = TypeVar("S", bound=Subject)
T = TypeVar("T")
Check = Callable[[Any], None]


class Draw(Protocol):
    """Draws a value and gives it a name in the report of a failure."""

    def __call__(self, strategy: st.SearchStrategy[T], label: str | None = None) -> T: ...


def drawn(share: float = 1.0) -> Callable[[Callable[[S, Draw], None]], Callable[[S], None]]:
    """Turn `check(subject, draw)` into `check(subject)`, which runs it on many examples.

    share: the part of a profile's examples that a costly check needs.
    """

    def decorate(body: Callable[[S, Draw], None]) -> Callable[[S], None]:
        @functools.wraps(body)
        def check(subject: S) -> None:
            profile = current_profile()
            identity = f"{subject.id}-{body.__name__}"
            seed = seed_for(profile, identity)

            @hypothesis.seed(seed)
            @profile.settings(share)
            @hypothesis.given(st.data())
            def examples(data: st.DataObject) -> None:
                body(subject, data.draw)

            try:
                examples()
            except Exception as fault:
                variables = {"MOMKIT_PROFILE": profile_name(), "MOMKIT_SEED": seed} | subject.environment
                settings = " ".join(f"{name}={value}" for name, value in variables.items())
                fault.add_note(f"reproduce: {settings} momkit check '{subject.name}' --only '{identity}'")
                raise

        # functools.wraps would show the wrapped signature, from which pytest and readers would expect a `draw`
        del check.__wrapped__
        return check

    return decorate


def applies_if(condition: Callable[[S], bool]) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
    """Limit a check to subjects that declare what it is about."""

    def decorate(check: Callable[[S], None]) -> Callable[[S], None]:
        check.applies = condition  # type: ignore[attr-defined]
        return check

    return decorate


def applies(check: Check, subject: Subject) -> bool:
    """Whether a check is about what this subject declares."""
    condition: Callable[[Any], bool] | None = getattr(check, "applies", None)
    return condition is None or condition(subject)
