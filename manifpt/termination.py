"""SIGTERM, as `ray job stop`, an orchestrator and a node that is taken away send it: what runs may end, then we do.

Python's default would drop the process between two lines, Ray's handlers would end it with code 15 or 1. After SIGTERM
Ray waits three seconds before it kills, so a run has half of them for commits under way, and the rest to let go.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["EXIT_CODE", "Terminated", "grace", "terminable"]

EXIT_CODE = 128 + signal.SIGTERM
_GRACE_S = 1.5


class Terminated(SystemExit):
    """Raised where the main thread is; ends the process with code 143 where nobody catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated` in the main thread, which is the one that has to call this."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def grace() -> Iterator[None]:
    """Within, `Terminated` comes 1.5 s after SIGTERM. Does nothing outside of `terminable`: a caller who uses this
    project as a library has signals of its own."""
    if signal.getsignal(signal.SIGTERM) is not _leave:
        yield
        return
    main = threading.get_ident()
    again = threading.Timer(_GRACE_S, lambda: signal.pthread_kill(main, signal.SIGTERM))
    again.daemon = True

    def wait(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, _leave)
        again.start()

    signal.signal(signal.SIGTERM, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _leave)
        asked = again.is_alive()
        again.cancel()
        if asked:  # what was to end has ended before its time
            raise Terminated


def _leave(signum: int, frame: FrameType | None) -> None:
    raise Terminated
