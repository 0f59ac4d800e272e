"""A plugin of momkit: one update rule and one router."""

from collections.abc import Callable

from momkit import hookimpl
from momkit_example.cosine_topk import CosineTopK
from momkit_example.decayed_oja import DecayedOja

__all__ = ["CosineTopK", "DecayedOja"]


@hookimpl
def momkit_register_mechanisms(register: Callable[[type], None]) -> None:
    register(DecayedOja)


@hookimpl
def momkit_register_routers(register: Callable[[type], None]) -> None:
    register(CosineTopK)
