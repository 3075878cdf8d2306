"""The Ray Data graph, read from top to bottom: the only module that imports `ray.data`.

shard numbers -> decode (tasks) -> encode (actors) -> project (actors) -> commit (tasks) -> commits, as they happen
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from manifpt import stages
from manifpt.artifacts import to_numpy
from manifpt.cluster import NODE_TO_COME_CPUS, environment
from manifpt.decode import decode
from manifpt.errors import ConfigError, NodesLost, StorageError, WorkerError, told_as
from manifpt.isolated import IsolatedDecoder
from manifpt.log import event
from manifpt.packing import cell, pack, unpack
from manifpt.plan import Plan
from manifpt.projecting import Projecting
from manifpt.reader import ArtifactReader
from manifpt.resources import ActorShare, Shares, network_env, reservable_bytes, share
from manifpt.shards import tally

if TYPE_CHECKING:  # every process of a job imports this module, and SciPy comes with that one
    from manifpt.attributor.examples import Part

__all__ = ["artifact_rows", "run", "run_tasks", "view_rows"]

# Its errors reach us as exceptions, its progress as ours; the full story is in Ray's own log files.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)
# A limit above the number of shards is meant: see `decode_tasks` in `resources.share`.
warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", module="ray.data")


def run(
    plan: Plan, output: str, shards: Sequence[int], most_actors: int | None = None, gpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Computes shards and yields `{"shard", "rejected_images", "tally"}` as each is committed, in no promised order.

    Args:
        plan: what to compute.
        output: the run folder.
        shards: numbers of the shards that are not done.
        most_actors: a limit for each stage of actors; None: as many as the cluster has room for.
        gpu: GPUs will come, though there are none yet.

    Raises:
        ConfigError, StorageError: of a worker.
        NodesLost: more nodes vanished than Ray could make up for; shards that are left may be asked for again.
        WorkerError: a worker died again and again at the same shard.
    """
    shares = _shares(plan, len(shards), most_actors, gpu)
    s3 = environment()
    _quiet()
    work: dict[str, Any] = {"plan": plan, "s3": s3}
    dataset: ray.data.Dataset = ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the retry limits: Ray Data's own are endless, and 2.60 has no other name
        dataset = dataset.map_batches(
            _decode,  # type: ignore[arg-type]  # Ray types a function of the batch alone
            fn_kwargs=work | {"encode": shares.encode is None, "on_gpu": bool(shares.encode and shares.encode.gpus)},
            num_cpus=shares.task_cpus,
            compute=TaskPoolStrategy(size=shares.decode_tasks),
            **_ONE_SHARD,
            **_TASK_RETRIES,
        )
        if shares.encode:
            dataset = dataset.map_batches(
                _Encode,
                fn_constructor_kwargs=work | {"threads": shares.encode.threads, "gpu": shares.encode.gpus > 0},
                **_actors(shares.encode),
                runtime_env=network_env(shares.encode.gpus),
            )
        for part in range(plan.reference_shards if shares.project else 0):
            assert shares.project
            dataset = dataset.map_batches(
                _Project,
                fn_constructor_kwargs=work
                | {"threads": shares.project.threads, "part": part, "gpu": shares.project.gpus > 0},
                **_actors(shares.project),
            )
        dataset = dataset.map_batches(
            _commit,  # type: ignore[arg-type]
            fn_kwargs=work | {"output": output},
            num_cpus=shares.task_cpus,
            **_ONE_SHARD,
            **_TASK_RETRIES,
        )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in pa.table(batch).to_pylist():
                if row["error"]:
                    raise _ERRORS[row["error"]](row["detail"])
                yield {
                    "shard": row["shard"],
                    "rejected_images": row["rejected_images"],
                    "tally": json.loads(row["tally"]),
                }
    except ray.exceptions.RayError as error:
        raise _told(error) from error


def artifact_rows(parts: Mapping[str, Sequence[Part]], space: str, task_cpus: float = 1.0) -> ray.data.Dataset:
    """Rows `artifact` [...], `label` and `row` (int64) of runs, as a stream: shards are read while others are used.

    Args:
        parts: by the runs' folders, what to read of each.
        space: of all of them.
        task_cpus: a reading task holds.
    """
    _quiet()
    # In any order but that of the manifest, which is by source: of a share that is too large to be shuffled whole, a
    # buffer would hold a few sources only.
    ordered = [(part, run) for run, of_run in parts.items() for part in of_run]
    packed = [
        {"part": pack(asdict(part) | {"shard": np.array(part.shard)}).to_pybytes(), "run": run}
        for part, run in (ordered[n] for n in np.random.default_rng(0).permutation(len(ordered)))
    ]
    dataset: ray.data.Dataset = ray.data.from_items(packed, override_num_blocks=len(packed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the retry limits, as in `run`
        return dataset.map_batches(
            _read_part,  # type: ignore[arg-type]
            fn_kwargs={"space": space, "s3": environment()},
            num_cpus=task_cpus,
            **_ONE_SHARD,
            **_TASK_RETRIES,
        )


def _read_part(batch: pa.Table, space: str, s3: dict[str, str]) -> dict[str, np.ndarray]:
    os.environ.update(s3)
    part = unpack(batch["part"].chunk(0)[0].as_buffer())
    table = _reader(batch["run"][0].as_py(), space).read(int(part["shard"]), part["place_n"])
    return {"artifact": to_numpy(table["artifact"]), "label": part["label_n"], "row": part["row_n"]}


def view_rows(plan: Plan, task_cpus: float = 1.0) -> ray.data.Dataset:
    """Rows `view` (uint8 [3, H, W]) and `row` (int64) of a plan with one space, as a stream. Images that can't be
    decoded are left out.

    Args:
        plan: whose manifest's images; nothing is written.
        task_cpus: a decoding task holds.
    """
    _quiet()
    dataset = ray.data.from_items([{"shard": n} for n in range(plan.shards)], override_num_blocks=plan.shards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the retry limits, as in `run`
        return dataset.map_batches(
            _views,  # type: ignore[arg-type]
            fn_kwargs={"plan": plan, "s3": environment()},
            num_cpus=task_cpus,
            **_ONE_SHARD,
            **_TASK_RETRIES,
        )


def _views(batch: pa.Table, plan: Plan, s3: dict[str, str]) -> dict[str, np.ndarray]:
    os.environ.update(s3)
    number = batch["shard"][0].as_py()
    with _decoder() as decode:
        view_bchw = stages.decode_rows(plan, number, decode=decode)[f"view:{plan.spaces[0].view.key}"]
    return {"view": view_bchw, "row": plan.rows_of(number).start + np.arange(len(view_bchw))}


@functools.lru_cache(4)
def _reader(run: str, space: str) -> ArtifactReader:
    return ArtifactReader(run, space)  # a lazy space's reference is loaded once a process


def run_tasks(
    work: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    cpus: float,
    gpus: Sequence[float] | None = None,
    memory_bytes: Sequence[int] | None = None,
    runtime_env: dict[str, Any] | None = None,
) -> Iterator[Any]:
    """Calls a function for each item, in tasks, and yields what they return as each ends.

    Args:
        work: called with the parts of an item; returns what pickles.
        items: one a task.
        cpus: of a task.
        gpus: of each; None: none.
        memory_bytes: that each reserves, as far as a node has it: fewer run at once where it is short.
        runtime_env: of the tasks' processes, as Ray has it.
    """
    task = ray.remote(_task)
    options = {"num_cpus": cpus, "max_retries": _TASK_RETRIES["max_retries"], "runtime_env": runtime_env}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    waiting = [
        task.options(
            **options, num_gpus=share, memory=reservable_bytes(wanted_bytes, nodes, cpus, share) or None
        ).remote(work, item, environment())
        for item, share, wanted_bytes in zip(
            items, gpus or [0.0] * len(items), memory_bytes or [0] * len(items), strict=True
        )
    ]
    while waiting:
        ready, waiting = ray.wait(waiting)
        try:
            found = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            raise _told(error) from error
        if isinstance(found, _Failed):
            raise _ERRORS[found.error](found.detail)
        yield found


@dataclass(frozen=True)
class _Failed:
    error: str
    detail: str


def _task(work: Callable[..., Any], item: tuple[Any, ...], s3: dict[str, str]) -> Any:
    os.environ.update(s3)
    try:
        return work(*item)
    except _TOLD as error:
        return _Failed(*_sentence(error))


def _quiet() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False


# One row is one shard, and one call handles one row: see manifpt.packing.
_ONE_SHARD: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
# A shard that kills its worker each time (a library's crash, no memory left) must end the job, not repeat forever.
_TASK_RETRIES: dict[str, Any] = {"max_retries": 5}
_ACTOR_RETRIES: dict[str, Any] = {"max_restarts": 100, "max_task_retries": 5}


def _actors(part: ActorShare) -> dict[str, Any]:
    pool = ActorPoolStrategy(min_size=1, max_size=part.most, max_tasks_in_flight_per_actor=2)
    return {"num_cpus": part.cpus, "num_gpus": part.gpus, "compute": pool, **_ONE_SHARD, **_ACTOR_RETRIES}


# An actor whose node is gone is asked for in vain, quicker than Ray notices; and what lay on the node is lost with it.
_LOST = (
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


def _told(error: BaseException) -> BaseException:
    """A sentence for a worker that died again and again; anything else is a fault of ours, and keeps its trace."""
    if isinstance(error, _LOST):
        return NodesLost(
            f"Nodes vanished, and Ray could not bring their work back ({type(error).__name__}): the same command goes "
            f"on from here."
        )
    dead = (ray.exceptions.WorkerCrashedError, ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError)
    if not isinstance(error, dead):
        return error
    return WorkerError(
        f"A worker process died {1 + _TASK_RETRIES['max_retries']} times at the same shard ({type(error).__name__}): "
        f"no memory left, or a library that crashes. Ray's logs say which; the same command goes on from here."
    )


def _shares(plan: Plan, shards: int, most_actors: int | None, gpu: bool) -> Shares:
    cluster = ray.cluster_resources()
    nodes = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not cluster.get("CPU"):  # a head that runs no tasks: an autoscaler brings nodes when work waits
        event("waiting_for_nodes", hint="without an autoscaler, start one with: ray start --address HEAD")
    return share(
        cluster.get("CPU") or NODE_TO_COME_CPUS,
        cluster.get("GPU") or float(gpu),
        network=any(spec.kind == "network" for spec in plan.spaces),
        project=plan.reference_shards if plan.task != "reference" else 0,
        shards=shards,
        largest_node_cpus=max(nodes, default=NODE_TO_COME_CPUS),
        most_actors=most_actors,
        project_on_gpu=plan.task == "attributions" or plan.estimate.uses_gpu,
        grows=len(nodes) != 1,  # one node alone is a single machine; an autoscaler's head runs no tasks
    )


# Errors with a sentence for the user. They travel as data: Ray would wrap them into its own, type and all.
_ERRORS: dict[str, type[Exception]] = {
    "ConfigError": ConfigError,
    "StorageError": StorageError,
    "WorkerError": WorkerError,
}
_TOLD = (ConfigError, StorageError, WorkerError, OSError)


def _step(batch: pa.Table, s3: dict[str, str], work: Callable[[stages.Shard], stages.Shard]) -> pa.Table:
    """One stage's work on one shard; a shard that carries an error passes through."""
    os.environ.update(s3)
    shard = unpack(batch["shard"].chunk(0)[0].as_buffer())
    if "error" not in shard:
        shard = _tried(lambda: work(shard))
    return pa.table({"shard": cell(pack(shard))})


def _tried(work: Callable[[], stages.Shard]) -> stages.Shard:
    try:
        return work()
    except _TOLD as error:
        name, detail = _sentence(error)
        return {"error": pa.table({"error": [name], "detail": [detail]})}


def _sentence(error: Exception) -> tuple[str, str]:
    told = told_as(error)
    if told is None:
        raise error
    return type(told).__name__, str(told)


def _decode(batch: pa.Table, plan: Plan, s3: dict[str, str], encode: bool, on_gpu: bool) -> pa.Table:
    os.environ.update(s3)

    def work() -> stages.Shard:
        with _decoder() as decode:
            shard = stages.decode_rows(plan, batch["shard"][0].as_py(), resize_later=on_gpu, decode=decode)
        return stages.Encoder(plan.spaces)(shard) if encode else shard

    return pa.table({"shard": cell(pack(_tried(work)))})


def _decoder() -> contextlib.AbstractContextManager[Callable[[bytes], np.ndarray]]:
    """For the task that runs. One that runs again may have been ended by an image: then each is decoded in a process
    that may end."""
    # Not in Ray's public interface as of 2.60; counted by who asks for the task, so also across nodes.
    worker: Any = ray._private.worker.global_worker
    attempt = worker.core_worker.get_current_task_attempt_number()
    return IsolatedDecoder() if attempt else contextlib.nullcontext(decode)


class _Encode:
    def __init__(self, plan: Plan, s3: dict[str, str], threads: int, gpu: bool) -> None:
        self._s3 = s3
        os.environ.update(s3)
        self._work = _Computing(lambda: _encoder(plan, threads, gpu))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _step(batch, self._s3, self._work)


def _encoder(plan: Plan, threads: int, gpu: bool) -> stages.Encoder:
    encoder = stages.Encoder(plan.spaces, threads, "cuda" if gpu else "cpu", plan.rows)
    encoder.load()
    return encoder


class _Project:
    def __init__(self, plan: Plan, s3: dict[str, str], threads: int, part: int, gpu: bool) -> None:
        self._s3 = s3
        os.environ.update(s3)
        self._work = _Computing(lambda: _projecting(plan, threads, part, gpu))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _step(batch, self._s3, self._work)


def _projecting(plan: Plan, threads: int, part: int, gpu: bool) -> Callable[[stages.Shard], stages.Shard]:
    if plan.task != "attributions":
        return Projecting(plan, threads, part, "cuda" if gpu else "cpu")
    from manifpt.monitoring.attributing import Attributing

    return Attributing(plan, threads, "cuda" if gpu else "cpu")


class _Computing:
    """The one thread of an actor that computes.

    What the actor needs is made there while the first shard is decoded elsewhere, and an error waits for that shard: in
    an actor's __init__ it would lose its type. Ray calls from another thread than it constructs in, and OpenMP gives
    each thread that computes a team of its own: with more of them than cores it lets them sleep between loops.
    """

    def __init__(self, make: Callable[[], Callable[[stages.Shard], stages.Shard]]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._made = self._thread.submit(make)

    def __call__(self, shard: stages.Shard) -> stages.Shard:
        work = self._made.result()
        return self._thread.submit(work, shard).result()


_BRIEF = pa.schema([
    ("shard", pa.int64()), ("rejected_images", pa.int64()), ("tally", pa.string()), ("error", pa.string()),
    ("detail", pa.string()),
])  # fmt: skip


def _committing(task: str) -> Callable[[Plan, str, stages.Shard], dict[str, Any]]:
    if task == "attributions":
        from manifpt.monitoring.attributing import commit_attributions

        return commit_attributions
    return stages.commit_artifacts if task == "artifacts" else stages.commit_codes


def _commit(batch: pa.Table, plan: Plan, s3: dict[str, str], output: str) -> pa.Table:
    """Commits, and leaves of the shard what the driver needs; the rest may be a million rejected rows."""
    commit = _committing(plan.task)

    def work(shard: stages.Shard) -> stages.Shard:
        done = commit(plan, output, shard)
        told = {"shard": done["shard"], "rejected_images": done["rejected_images"]}
        told |= {"tally": json.dumps(tally(done, plan.task)), "error": "", "detail": ""}
        return {"brief": pa.Table.from_pylist([told], schema=_BRIEF)}

    found = unpack(_step(batch, s3, work)["shard"].chunk(0)[0].as_buffer())
    if "error" not in found:
        return found["brief"]
    return pa.Table.from_pylist(pa.table(found["error"]).to_pylist(), schema=_BRIEF)
