"""How many examples a check tries, and how large: profiles, chosen by MOMKIT_PROFILE or HYPOTHESIS_PROFILE.

`ci`, `dev` and `full` are for the CPU, `interpret` for kernels under Triton's interpreter, `cuda` for those on a GPU.
"""

import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, settings

from momkit.errors import InputError


@dataclass(frozen=True)
class Profile:
    """Number of examples, longest packed length, most heads, and whether a run repeats the last one draw by draw.

    `shrink` looks for a smaller example once a check has failed. `shapes`: sizes of H, G, K and V that go together, the
    only ones to draw; any small ones when there are none.
    """

    examples: int
    max_tokens: int = 96
    max_heads: int = 4
    shapes: tuple[Mapping[str, int], ...] = ()
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
    # an interpreted kernel takes milliseconds for a chunk of one head
    "interpret": Profile(examples=3, max_tokens=70, max_heads=2, fixed=True, shrink=False),
    # every shape is compiled anew; these reach each width of a tile, with and without a mask
    "cuda": Profile(
        examples=10,
        max_tokens=160,
        fixed=True,
        shapes=(
            {"H": 4, "G": 2, "K": 5, "V": 8},
            {"H": 2, "G": 1, "K": 64, "V": 48},
            {"H": 2, "G": 2, "K": 128, "V": 128},
            {"H": 1, "G": 1, "K": 200, "V": 40},
        ),
    ),
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
