"""What one input may cost: a second of CPU time, and 512 MiB over what the process had at its start.

CPU time and not time, since a busy machine must not make findings; and without the kernel's, which on a virtual machine
that has just begun is for the most part the host's search for memory: 64 MiB took 0.9 s. An image has a right to a
second more for each 16 million pixels that its header asks for, and that are allowed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.helpers.memory import peak_rss_bytes

__all__ = ["MOST_BYTES", "MOST_S", "Limits", "OverLimit"]

MOST_S = 1.0
MOST_BYTES = 512 << 20
_PIXELS_A_S = 1 << 24


class OverLimit(AssertionError):
    """An input took too long, or too much memory."""


class Limits:
    """Calls a check on one input after the other."""

    def __init__(self, check: Callable[[bytes], int]) -> None:
        """Measures what the process has now; call it when all is loaded."""
        self._check = check
        self._start_bytes = _reset_peak()

    def __call__(self, data: bytes) -> None:
        """Raises:
        OverLimit: it took more than it may.
        Exception: whatever the check raised.
        """
        _reset_peak()
        begin, pixels = os.times().user, 0
        try:
            pixels = self._check(data)
        finally:
            took_s = os.times().user - begin
            grown_bytes = peak_rss_bytes(os.getpid()) - self._start_bytes
        if took_s > MOST_S + pixels / _PIXELS_A_S:
            raise OverLimit(f"{took_s:.2f} s")
        if grown_bytes > MOST_BYTES:
            raise OverLimit(f"{grown_bytes >> 20} MiB")


def _reset_peak() -> int:
    """Lets the kernel measure the peak anew; the bytes that are resident."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes(os.getpid())
