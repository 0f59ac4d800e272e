"""Routers, one a file; `base` is the contract, `dispatch` turns a routing into memory order."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The routers that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_routers(self, register: Callable[[type], None]) -> None:
        from momkit.routing.dense import Dense
        from momkit.routing.hash import HashRouter
        from momkit.routing.noisy_topk import NoisyTopK
        from momkit.routing.read_write import ReadWrite
        from momkit.routing.sigmoid_topk import SigmoidTopK
        from momkit.routing.softmax_topk import SoftmaxTopK

        for cls in (SoftmaxTopK, SigmoidTopK, NoisyTopK, HashRouter, Dense, ReadWrite):
            register(cls)
