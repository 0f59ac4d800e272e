"""How many examples a check tries: profiles `ci`, `dev` and `full`, chosen by MOMKIT_PROFILE or HYPOTHESIS_PROFILE."""

import os
import secrets
import zlib
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, settings

from momkit.errors import InputError


@dataclass(frozen=True)
class Profile:
    """Number of examples, longest packed length, and whether a run repeats the last one draw by draw.

    `shrink` looks for a smaller example once a check has failed.
    """

    examples: int
    max_tokens: int = 96
    fixed: bool = False
    shrink: bool = True

    def settings(self, share: float) -> settings:
        """Hypothesis settings for a check that needs only a `share` of the examples."""
        phases = (Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,)
        return settings(
            max_examples=max(1, round(self.examples * share)),
            deadline=None,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )


PROFILES = {
    "ci": Profile(examples=10, fixed=True),
    "dev": Profile(examples=15),
    "full": Profile(examples=100, max_tokens=160),
    # for faults that are known to be there: the example that finds one needs no polish
    "mutants": Profile(examples=10, fixed=True, shrink=False),
}


def profile_name() -> str:
    """The profile that the environment names, `dev` when it names none."""
    name = os.environ.get("MOMKIT_PROFILE") or os.environ.get("HYPOTHESIS_PROFILE") or "dev"
    if name not in PROFILES:
        raise InputError(f"MOMKIT_PROFILE = {name!r}; allowed: {', '.join(PROFILES)}")
    return name


def current_profile() -> Profile:
    return PROFILES[profile_name()]


def seed_for(profile: Profile, identity: str) -> int:
    """The seed of one check: MOMKIT_SEED, or fixed by what is checked, or a new one each time."""
    if chosen := os.environ.get("MOMKIT_SEED"):
        if not chosen.isdecimal():
            raise InputError(f"MOMKIT_SEED = {chosen!r}; allowed: a number, 0 or more")
        return int(chosen)
    return zlib.crc32(identity.encode()) if profile.fixed else secrets.randbits(32)
