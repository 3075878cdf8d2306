"""Few lines, structured: `time event key=value ...` on stderr; a bar where a person watches a terminal.

2026-01-31T12:00:00Z progress images=40960 total=1000000 images_per_s=812.4 eta_s=1181 rejected=3
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "event", "printable"]

_EVERY_S = 10.0
_WINDOW_S = 60.0  # of the rate that the ETA follows: shards come in bursts


def event(name: str, **fields: Any) -> None:
    """One line of the log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    tqdm.write(" ".join([stamp, name, *(f"{key}={_text(value)}" for key, value in fields.items())]), file=sys.stderr)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"
    text = str(value)
    return json.dumps(text) if any(c in text for c in ' "=') or not text or not text.isprintable() else text


def printable(text: str) -> str:
    """Of one or several lines, without what a terminal obeys: a key or a label may come from anybody."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """Images done, rate, ETA and rejected images, while a run goes on; also while no shard gets done."""

    def __init__(self, total: int, done: int, rejected: int) -> None:
        self._total, self._first, self._done, self._rejected = total, done, done, rejected
        self._begin = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._begin, done)])
        self._closed = threading.Event()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="img", file=sys.stderr, dynamic_ncols=True, smoothing=0.1)
        else:
            threading.Thread(target=self._beat, daemon=True).start()

    def add(self, images: int, rejected: int) -> None:
        """Counts a committed shard."""
        self._done += images
        self._rejected += rejected
        now = time.monotonic()
        self._recent.append((now, self._done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.set_postfix(rejected=self._rejected, refresh=False)
            self._bar.update(images)
        elif self._done == self._total:
            self._line()

    def _beat(self) -> None:
        while not self._closed.wait(_EVERY_S):
            self._line()

    def _line(self) -> None:
        begin, before = self._recent[0]
        rate = (self._done - before) / max(time.monotonic() - begin, 1e-9)
        eta_s = round((self._total - self._done) / rate) if rate else "unknown"
        event("progress", images=self._done, total=self._total, images_per_s=rate, eta_s=eta_s,
              rejected=self._rejected)  # fmt: skip

    @property
    def images_per_s(self) -> float:
        """Over the whole run so far, the start of its actors included."""
        return (self._done - self._first) / max(self.running_s, 1e-9)

    @property
    def running_s(self) -> float:
        """Since the cluster was joined."""
        return time.monotonic() - self._begin

    def close(self) -> None:
        """Ends the bar, or the lines; the last one says where a run that was broken off stands."""
        self._closed.set()
        if self._bar is not None:
            self._bar.close()
        elif self._done < self._total:
            self._line()
