"""What workers write while they train, told to whoever waits: a file of JSON lines, followed from outside."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from manifpt.storage import store_of

__all__ = ["followed", "json_lines", "write_json_lines"]

_POLL_S = 2.0


def json_lines(uri: str) -> list[dict[str, Any]]:
    """All lines; none where there is no file."""
    try:
        return [json.loads(line) for line in store_of(uri).read(uri).decode().splitlines()]
    except FileNotFoundError:
        return []


def write_json_lines(uri: str, lines: Sequence[dict[str, Any]]) -> None:
    """The whole file anew, since S3 can't append; numbers with six digits."""
    rounded = ({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    store_of(uri).write(uri, "".join(json.dumps(line) + "\n" for line in rounded).encode())


@contextlib.contextmanager
def followed(uri: str, tell: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> Iterator[None]:
    """Tells every line that is added meanwhile, once, with all lines until now.

    Lines rise by epoch, and within one by step; its own line, without a step, ends it. A training that resumes drops
    lines and writes them again, so what was told is known by these numbers.
    """
    ended = threading.Event()
    told = max(map(_place, json_lines(uri)), default=(-1.0, 0.0))

    def tell_new() -> None:
        nonlocal told
        found = json_lines(uri)
        for line in found:
            if _place(line) > told:
                told = _place(line)
                tell(line, found)

    def watch() -> None:
        while not ended.wait(_POLL_S):
            tell_new()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    tell_new()


def _place(line: dict[str, Any]) -> tuple[float, float]:
    return line.get("epoch", 0), line.get("step", math.inf)
