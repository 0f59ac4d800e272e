"""Routers, one a file; `base` is the contract, `dispatch` turns a routing into memory order."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The routers that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_routers(self, register: Callable[[type], None]) -> None:
        from momkit.routing.softmax_topk import SoftmaxTopK

        for cls in (SoftmaxTopK,):
            register(cls)
