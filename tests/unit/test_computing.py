from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from manifpt import cluster, pipeline
from manifpt.computing import Computing
from manifpt.errors import NodesLost, WorkerError
from manifpt.plan import Plan

PLAN = Plan(task="artifacts", manifest_uri="", manifest_digest="", rows=60, shard_rows=10, spaces=())


def running(patch: pytest.MonkeyPatch, before_loss: Sequence[int]) -> list[list[int]]:
    """Pipelines that commit so many shards each, and then lose their nodes; the last one loses none."""
    asked: list[list[int]] = []

    def run(plan: Plan, output: str, shards: Sequence[int], *rest: Any) -> Iterator[dict[str, Any]]:
        asked.append(list(shards))
        commits = [
            {"shard": n, "rejected_images": 0, "tally": {"images": {}, "reasons": {}, "seconds": {}}} for n in shards
        ]
        if len(asked) > len(before_loss):
            yield from commits
            return
        yield from commits[: before_loss[len(asked) - 1]]
        raise NodesLost("gone")

    patch.setattr(pipeline, "run", run)
    patch.setattr(cluster, "connect", lambda: None)
    patch.setattr(cluster, "on_one_node", lambda: True)
    return asked


def test_what_lost_nodes_had_is_computed_anew_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = running(monkeypatch, [2, 0, 0, 3, 0, 0])
    commits = list(Computing(PLAN, "", range(6)).commits())
    assert sorted(commit["shard"] for commit in commits) == list(range(6))
    assert asked[:2] == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]] and asked[-1] == [5]


def test_nodes_that_vanish_again_and_again_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = running(monkeypatch, [1, 0, 0, 0])
    with pytest.raises(WorkerError, match="gone"):
        list(Computing(PLAN, "", range(6)).commits())
    assert len(asked) == 4, "one that committed something, and three in vain"


def test_another_error_ends_the_job_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*rest: Any) -> Iterator[dict[str, Any]]:
        raise WorkerError("died")
        yield {}

    running(monkeypatch, [])
    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(WorkerError, match="died"):
        list(Computing(PLAN, "", range(6)).commits())
