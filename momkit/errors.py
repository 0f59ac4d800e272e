"""The library's own errors; each is a ValueError, so that callers need know no more than that."""


class InputError(ValueError):
    """An argument of a public function is wrong; the message names it, its value and what is allowed."""


class UnknownNameError(ValueError):
    """A mechanism, router, task or backend that nobody registered; the message lists those that exist."""


class BackendError(ValueError):
    """A backend was asked for that can't run here; the message says why."""


class CheckpointError(ValueError):
    """A file is not a checkpoint of this library, or is damaged."""
