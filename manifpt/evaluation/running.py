"""Tasks of an evaluation over a cluster: what has no result yet is computed, and told as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from manifpt import cluster, pipeline
from manifpt.log import event
from manifpt.resources import network_env

__all__ = ["run_works"]


def run_works(
    task: Callable[[Any], dict[str, Any]],
    works: Sequence[Any],
    stage: str,
    told: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    """Runs a task for each work, on a core and what it fills of a GPU. Tells each result, and what the rest will take.

    Args:
        task: a function of a work; leaves its result in storage and returns it.
        works: dataclasses with a field `device`, and with `gpus` and `memory_bytes`, see `Work`.
        stage: its name in the log.
        told: what the log says of a result.
    """
    cpus, gpus, _ = cluster.cluster()
    gpus_each = [work.gpus if gpus else 0.0 for work in works]
    items = [(replace(work, device="cuda" if share else "cpu"),) for work, share in zip(works, gpus_each, strict=True)]
    begin = time.monotonic()
    memory = [work.memory_bytes for work in works]
    results = pipeline.run_tasks(
        task, items, cpus=min(1.0, cpus), gpus=gpus_each, memory_bytes=memory, runtime_env=network_env(gpus)
    )
    for done, found in enumerate(results, start=1):
        rate = (time.monotonic() - begin) / done
        event(f"{stage}_done", **told(found), done=f"{done}/{len(items)}", eta_s=round(rate * (len(items) - done)))
