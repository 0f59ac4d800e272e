"""Tasks to train and score models on, one a file; `base` is the contract."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The tasks that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_tasks(self, register: Callable[[type], None]) -> None:
        for cls in ():
            register(cls)
