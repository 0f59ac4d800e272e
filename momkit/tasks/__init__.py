"""Tasks to train and score models on, one a file; `base` is the contract."""

from collections.abc import Callable

from momkit.hookspecs import hookimpl


class builtin:
    """The tasks that ship with momkit, behind the hook that any plugin uses."""

    @hookimpl
    def momkit_register_tasks(self, register: Callable[[type], None]) -> None:
        from momkit.tasks.bytes import Bytes
        from momkit.tasks.mqar import MQAR
        from momkit.tasks.parity import Parity
        from momkit.tasks.selective_copy import SelectiveCopy

        for cls in (Bytes, MQAR, Parity, SelectiveCopy):
            register(cls)
