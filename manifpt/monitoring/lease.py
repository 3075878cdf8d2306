"""A lease on an output folder: of scans that overlap one works, and another takes over when that one has died.

A holder owns the file with the highest number in `lease/`, which nobody else writes after it was created, and beats by
counting up in it. Nobody compares clocks: who waits watches, by its own monotonic clock, whether the count moves. So a
clock that is set back, or that differs between machines, changes nothing.

A holder that was only asleep may wake up when another has taken over. The lease saves work, not correctness: everything
that a scan leaves is created under names that must be free, or is a function of what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manifpt.log import event
from manifpt.storage import join, store_of

__all__ = ["BEAT_S", "DEAD_AFTER_S", "Lease", "Taken", "held"]

BEAT_S = 5.0
DEAD_AFTER_S = 30.0  # a holder that beats no more for so long is taken for dead


class Taken(Exception):
    """Another scan holds the lease and is alive. The sentence says which."""


@dataclass(slots=True)
class Lease:
    """What is held.

    Attributes:
        output: the folder.
        number: of the lease, higher than all before.
    """

    output: str
    number: int

    def is_newest(self) -> bool:
        """Whether nobody has taken over since."""
        return _newest(self.output) == self.number


@contextlib.contextmanager
def held(output: str, beat_s: float = BEAT_S, dead_after_s: float = DEAD_AFTER_S) -> Iterator[Lease]:
    """Holds the lease of a folder, and lets go of it at the end.

    Args:
        output: the folder.
        beat_s: between beats.
        dead_after_s: without a beat of another holder before its lease is taken over. This is waited for only where a
            holder hasn't let go.

    Raises:
        Taken: another holder is alive.
    """
    newest = _newest(output)
    if newest and not _is_free(output, newest, beat_s, dead_after_s):
        raise Taken(f"Another scan works on {output} ({_holder(output, newest)}); this one ends, with nothing to do.")
    lease = Lease(output, newest + 1)
    me = {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex}
    if not store_of(output).create(_uri(lease), _document(me, 0, False)):
        raise Taken(f"Another scan has begun on {output} at this moment; this one ends, with nothing to do.")
    for older in range(max(1, newest - 1), newest):  # the newest two are enough to know the next number
        store_of(output).remove(_uri(Lease(output, older)))
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, me, beat_s, over), daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(Exception):  # then the next one waits for beats that don't come
            store_of(output).write(_uri(lease), _document(me, -1, True))


def _beat(lease: Lease, me: dict[str, Any], beat_s: float, over: threading.Event) -> None:
    count = 0
    while not over.wait(beat_s):
        count += 1
        try:
            store_of(lease.output).write(_uri(lease), _document(me, count, False))
        except Exception as error:  # storage is away, or credentials ran out: the next beat tries again
            event("lease_beat_failed", why=error)


def _is_free(output: str, number: int, beat_s: float, dead_after_s: float) -> bool:
    """Whether a lease was let go, or its holder has stopped beating."""
    first, begin = _read(output, number), time.monotonic()
    while not first.get("free"):
        waited_s = time.monotonic() - begin
        if waited_s >= dead_after_s:
            event("lease_taken_over", of=_holder(output, number), silent_s=waited_s)
            return True
        time.sleep(min(beat_s, dead_after_s - waited_s))
        now = _read(output, number)
        if now.get("free"):
            return True
        if now != first:
            return False
    return True


def _newest(output: str) -> int:
    folder = join(output, "lease")
    try:
        names = [entry.key for entry in store_of(output).list(folder)]
    except FileNotFoundError:
        return 0
    return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()), default=0)


def _read(output: str, number: int) -> dict[str, Any]:
    """What a holder wrote last; `free` where nothing whole is there, since every holder writes whole files."""
    try:
        found = json.loads(store_of(output).read(_uri(Lease(output, number))))
    except (FileNotFoundError, ValueError):
        return {"free": True}
    return found if isinstance(found, dict) else {"free": True}


def _holder(output: str, number: int) -> str:
    found = _read(output, number)
    return f"process {found.get('process')} on {found.get('host')}"


def _document(me: dict[str, Any], beat: int, free: bool) -> bytes:
    return json.dumps({**me, "beat": beat, "free": free}).encode()


def _uri(lease: Lease) -> str:
    return join(lease.output, "lease", f"{lease.number:08d}.json")
