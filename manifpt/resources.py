"""How a cluster's CPUs and GPUs are shared between the stages. Pure arithmetic, so that it can be tested."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "KEPT_BLOCKS",
    "ActorShare",
    "Shares",
    "TrainingShares",
    "memory_bytes",
    "network_env",
    "reservable_bytes",
    "share",
    "share_training",
]


# Environment of a process that embeds or trains on CPUs. A network's activations are blocks of tens of megabytes, which
# glibc takes fresh from the system each time, a page fault for each 4 KiB. Kept, and in huge pages, ResNet50 embeds and
# the released small network trains a twentieth faster. In one arena, as the others keep no large blocks. Other libcs
# ignore it.
KEPT_BLOCKS = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
    ":glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
}


def network_env(gpus: float) -> dict[str, dict[str, str]] | None:
    """Ray's `runtime_env` of a process that runs a network: on CPUs with `KEPT_BLOCKS`."""
    return None if gpus else {"env_vars": KEPT_BLOCKS}


# Of a container: version 2 of control groups, and version 1. One's own group is mounted as the root there.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes(limits: Sequence[str] = _LIMITS) -> int:
    """Of this machine, or of the container in which this process runs: a pod on a large node has its limit."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found)


def reservable_bytes(wanted_bytes: int, nodes: Iterable[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """As much of a task's memory as some node has that has its CPUs and GPUs too: one that fits on none waits for ever.

    Args:
        wanted_bytes: what it takes.
        nodes: Ray's resources of each.
        cpus, gpus: of the task.
    """
    able = (node.get("memory", 0.0) for node in nodes if node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus)
    return min(wanted_bytes, int(max(able, default=0.0)))


@dataclass(frozen=True, slots=True)
class ActorShare:
    """One stage of actors.

    Attributes:
        cpus, gpus: reserved for each actor.
        threads: what an actor may compute with. On a small machine an encoding actor gets more than it reserves,
            since reservations only have to leave room for the other stages. A projecting one doesn't: its parallel
            steps are so short that waiting for a thread whose core decodes costs more than the thread brings.
        most: actors to scale up to, never more than there are shards.
    """

    cpus: float
    gpus: float
    threads: int
    most: int


@dataclass(frozen=True, slots=True)
class Shares:
    """All stages.

    Attributes:
        task_cpus: for a task that decodes, and for one that commits.
        decode_tasks: at once; bounded, so that decoded shards don't pile up before a slower stage. On a cluster that
            grows the bound is Ray Data's own: each stage's share of the CPUs and of the object store there are.
        encode: None where no space has a network: codes are then views, made while decoding.
        project: None for a reference.
    """

    task_cpus: float
    decode_tasks: int
    encode: ActorShare | None
    project: ActorShare | None


def share(
    cpus: float,
    gpus: float,
    *,
    network: bool,
    project: int,
    shards: int,
    largest_node_cpus: float | None = None,
    most_actors: int | None = None,
    grows: bool = False,
    project_on_gpu: bool = True,
) -> Shares:
    """Shares a cluster.

    Actors hold their CPUs until the job ends, tasks only while they run. So one actor a stage holds at most a quarter
    of the cluster, and all that it scales up to at most 0.6: otherwise a small cluster, or two jobs on one, would wait
    forever for CPUs that their own actors hold. For the same reason an encoding actor takes more than half a GPU and a
    projecting one a tenth: the projections of several jobs fit beside one encoder.

    A cluster that grows is followed: a stage may have an actor a shard, each reserves what it computes with, and Ray
    Data starts as many as fit into the stage's share of what is there, asks the autoscaler for what the slowest stage
    lacks, ends those that have nothing to do, and halves its shares where a second job comes.

    Args:
        cpus, gpus: in the cluster.
        network: whether a space has a network.
        project: stages of projection: one, or one for each part of a reference; 0: none.
        shards: left to compute.
        largest_node_cpus: an actor fits on one node; None: all CPUs are on one.
        most_actors: actors a stage to scale up to; None: what the cluster has room for.
        grows: whether nodes may come and go.
        project_on_gpu: whether a projecting actor has work for one.
    """
    stages = network + project
    task_cpus = min(1.0, cpus / 4)
    by_cpu = min(cpus / 4 / stages, 4.0, largest_node_cpus or cpus) if stages else 0.0
    actor_cpus = float(int(by_cpu)) if by_cpu >= 1 else by_cpu
    if gpus:
        actor_cpus = min(actor_cpus, 1.0)  # the CPUs of a GPU node are for decoding
    spare = gpus or (cpus < 16 and not grows)
    threads = max(1, int(min(4, largest_node_cpus or cpus) if spare else actor_cpus))

    def actors(portion: float, gpus_each: float, threads: int) -> ActorShare:
        room = shards if grows else int(gpus) if gpus_each else int(cpus * portion / max(actor_cpus, threads))
        return ActorShare(round(actor_cpus, 3), gpus_each, threads, min(shards, most_actors or max(1, room)))

    encode = actors(0.4, 0.6 if gpus else 0.0, threads) if network else None
    alone = 1.0 if not network else 0.1
    own = max(1, int(actor_cpus))
    portion = (0.2 if network else 0.6) / max(1, project)
    projecting = actors(portion, alone / project if gpus and project_on_gpu else 0.0, own) if project else None
    decode_tasks = shards if grows else min(shards, max(2, int(cpus)))
    if decode_tasks in {actor.most for actor in (encode, projecting) if actor}:
        decode_tasks += 1  # Ray Data fuses tasks into actors of the same number, and decoding would wait for a GPU
    return Shares(round(task_cpus, 3), decode_tasks, encode, projecting)


@dataclass(frozen=True, slots=True)
class TrainingShares:
    """Workers that train together.

    Attributes:
        workers: of one process each.
        worker_cpus: reserved for each, for as long as training lasts.
        threads: that each computes with.
        task_cpus: for a task that reads.
        gpu: whether each has one.
    """

    workers: int
    worker_cpus: float
    threads: int
    task_cpus: float
    gpu: bool


def share_training(cpus: float, gpus: float, nodes: int, workers: int | None = None) -> TrainingShares:
    """Shares a cluster among training workers: one a GPU, or one a node, whose threads then do what workers could.

    Reading is left at least a quarter of a small cluster's CPUs, or one CPU: workers that hold all of them would wait
    for artifacts forever.

    Args:
        cpus, gpus, nodes: in the cluster.
        workers: asked for; None: as above.
    """
    count = workers or max(1, int(gpus) if gpus else nodes)
    task_cpus = min(1.0, cpus / 4)
    each = min((cpus - task_cpus) / count, 4.0 if gpus else cpus)
    worker_cpus = float(int(each)) if each >= 1 else round(each - 0.005, 2)
    threads = max(1, int(cpus / count))
    return TrainingShares(count, worker_cpus, threads, round(task_cpus, 3), count <= gpus)
