"""The hooks a plugin implements; each is handed a `register` callback, which takes a class."""

from collections.abc import Callable

import pluggy

hookspec = pluggy.HookspecMarker("momkit")
hookimpl = pluggy.HookimplMarker("momkit")


@hookspec
def momkit_register_mechanisms(register: Callable[[type], None]) -> None:
    """Call `register(cls)` for every update rule, a subclass of `momkit.Mechanism`."""


@hookspec
def momkit_register_routers(register: Callable[[type], None]) -> None:
    """Call `register(cls)` for every router, a subclass of `momkit.Router`."""


@hookspec
def momkit_register_tasks(register: Callable[[type], None]) -> None:
    """Call `register(cls)` for every task, a subclass of `momkit.tasks.base.Task`."""
