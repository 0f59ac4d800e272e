"""Ctrl-C that waits for a moment at which a run is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that what is inside happens whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = False

    def note(signum: int, frame: object) -> None:
        nonlocal pending
        pending = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
    if pending:
        signal.raise_signal(signal.SIGINT)
