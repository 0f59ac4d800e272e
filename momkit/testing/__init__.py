"""The conformance kit: property tests that a rule or a router of anyone's can be held to, in three lines.

`parametrize_with_checks` makes pytest tests of them, `check` runs them without pytest, `momkit check` from a shell.
"""

from momkit.testing.pytest_door import parametrize_with_checks
from momkit.testing.suite import CheckResult, check

__all__ = ["CheckResult", "check", "parametrize_with_checks"]
