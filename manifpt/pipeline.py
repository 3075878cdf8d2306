"""The Ray Data graph, read from top to bottom: the only module that imports `ray.data`.

shard numbers -> decode (tasks) -> encode (actors) -> project (actors) -> commit (tasks) -> commits, as they happen
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

# Before Ray is imported. A forensic machine calls nobody; and the C++ core warns at every actor of an argument in the
# object store, which Ray Data puts there and which nobody can change.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from manifpt import stages
from manifpt.errors import ConfigError
from manifpt.packing import pack, unpack
from manifpt.plan import Plan
from manifpt.resources import Shares, share

__all__ = ["connect", "run"]

# Ray Data's lines say nothing that a user could act on, and its errors reach us as exceptions.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` or of this machine, or starts one here that ends with this process."""
    if not ray.is_initialized():
        with _held_stderr():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Keeps the C++ core's greeting lines back, and shows them only where joining fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def run(plan: Plan, output: str, shards: Sequence[int], most_actors: int | None = None) -> Iterator[dict[str, Any]]:
    """Computes shards and yields `{"shard", "rejected_images"}` as each is committed, in no promised order.

    Args:
        plan: what to compute.
        output: the run folder.
        shards: numbers of the shards that are not done.
        most_actors: a limit for each stage of actors; None: as many as the cluster has room for.
    """
    shares = _shares(plan, most_actors)
    s3 = {name: os.environ[name] for name in _S3_PLACE if name in os.environ}
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    dataset: ray.data.Dataset = ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
    dataset = dataset.map_batches(
        _decode,  # type: ignore[arg-type]  # Ray types a function of the batch alone
        fn_kwargs={"plan": plan, "encode": shares.encode is None, "s3": s3},
        num_cpus=shares.task_cpus,
        compute=TaskPoolStrategy(size=min(shares.decode_tasks, len(shards))),
        **_ONE_SHARD,
    )
    if shares.encode:
        dataset = dataset.map_batches(
            _Encode,
            fn_constructor_kwargs={
                "plan": plan,
                "threads": shares.encode.threads,
                "gpu": shares.encode.gpus > 0,
                "s3": s3,
            },
            num_cpus=shares.encode.cpus,
            num_gpus=shares.encode.gpus,
            compute=ActorPoolStrategy(min_size=1, max_size=shares.encode.most, max_tasks_in_flight_per_actor=2),
            **_ONE_SHARD,
        )
    if shares.project:
        dataset = dataset.map_batches(
            _Project,
            fn_constructor_kwargs={"plan": plan, "threads": shares.project.threads, "s3": s3},
            num_cpus=shares.project.cpus,
            num_gpus=shares.project.gpus,
            compute=ActorPoolStrategy(min_size=1, max_size=shares.project.most, max_tasks_in_flight_per_actor=2),
            **_ONE_SHARD,
        )
    dataset = dataset.map_batches(
        _commit,  # type: ignore[arg-type]
        fn_kwargs={"plan": plan, "output": output, "s3": s3},
        num_cpus=shares.task_cpus,
        **_ONE_SHARD,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from pa.table(batch).to_pylist()
    except ray.exceptions.RayError as error:
        raise _cause(error) from error


# Where S3 is follows the driver to the workers. Who we are does not: secrets come from each node's own role or files.
_S3_PLACE = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")


def _shares(plan: Plan, most_actors: int | None) -> Shares:
    cluster = ray.cluster_resources()
    if not cluster.get("CPU"):
        raise ConfigError("The Ray cluster has no CPUs for tasks; start a node with `ray start --num-cpus N`.")
    return share(
        cluster["CPU"],
        cluster.get("GPU", 0),
        network=any(spec.kind == "network" for spec in plan.spaces),
        project=plan.task == "artifacts",
        most_actors=most_actors,
    )


def _cause(error: BaseException) -> BaseException:
    """The project's own error in a worker, instead of Ray's wrapping of it."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith("manifpt.") or isinstance(getattr(seen, "cause", None), ConfigError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error


# One row is one shard, and one call handles one row: see manifpt.packing.
_ONE_SHARD: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}


def _packed(shard: stages.Shard) -> pa.Table:
    data = pack(shard)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.table({"shard": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])})


def _unpacked(batch: pa.Table) -> stages.Shard:
    return unpack(batch["shard"].chunk(0)[0].as_buffer())


def _decode(batch: pa.Table, plan: Plan, encode: bool, s3: dict[str, str]) -> pa.Table:
    os.environ.update(s3)
    shard = stages.decode_rows(plan, batch["shard"][0].as_py())
    return _packed(stages.Encoder(plan.spaces)(shard) if encode else shard)


class _Encode:
    def __init__(self, plan: Plan, threads: int, gpu: bool, s3: dict[str, str]) -> None:
        os.environ.update(s3)
        self._encoder = stages.Encoder(plan.spaces, threads, "cuda" if gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _packed(self._encoder(_unpacked(batch)))


class _Project:
    def __init__(self, plan: Plan, threads: int, s3: dict[str, str]) -> None:
        os.environ.update(s3)
        self._projecting = stages.Projecting(plan, threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _packed(self._projecting(_unpacked(batch)))


def _commit(batch: pa.Table, plan: Plan, output: str, s3: dict[str, str]) -> pa.Table:
    os.environ.update(s3)
    shard = _unpacked(batch)
    commit = (
        stages.commit_artifacts(plan, output, shard) if plan.task == "artifacts" else stages.commit_codes(output, shard)
    )
    # The driver gets what progress needs; the rest is in the commit file, and may be a million rejected rows.
    return pa.table({"shard": [commit["shard"]], "rejected_images": [commit["rejected_images"]]})
