"""Tasks that run in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from manifpt import cluster, pipeline

__all__ = ["tasks_here"]


def tasks_here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The items of tasks that ran, as they come."""
    ran: list[tuple[Any, ...]] = []

    def run_tasks(work: Callable[..., Any], items: Sequence[tuple[Any, ...]], **_: Any) -> Iterator[Any]:
        for item in items:
            ran.append(item)
            yield work(*item)

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "cluster", lambda: (2.0, 0.0, 1))
    monkeypatch.setattr(pipeline, "run_tasks", run_tasks)
    return ran
