"""Update rules, one a file; `base` is the contract, `reference` and `chunked` run them over packed segments."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The rules that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_mechanisms(self, register: Callable[[type], None]) -> None:
        from momkit.mechanisms.gated_deltanet import GatedDeltaNet

        for cls in (GatedDeltaNet,):
            register(cls)
