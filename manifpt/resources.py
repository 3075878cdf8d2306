"""How a cluster's CPUs and GPUs are shared between the stages. Pure arithmetic, so that it can be tested."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ActorShare", "Shares", "share"]


@dataclass(frozen=True, slots=True)
class ActorShare:
    """One stage of actors.

    Attributes:
        cpus, gpus: reserved for each actor.
        threads: what an actor may compute with; on a small machine more than it reserves, since reservations only
            have to leave room for the other stages, and the system shares cores better than a table does.
        most: actors to scale up to.
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
        decode_tasks: at once; bounded, so that decoded shards don't pile up before a slower stage.
        encode: None where no space has a network: codes are then views, made while decoding.
        project: None for a reference.
    """

    task_cpus: float
    decode_tasks: int
    encode: ActorShare | None
    project: ActorShare | None


def share(cpus: float, gpus: float, *, network: bool, project: bool, most_actors: int | None = None) -> Shares:
    """Shares a cluster as it is now; more nodes may come, and actors then scale up to `most`.

    The least of every stage fits at once: one actor a stage, one decoding and one committing task. Otherwise a small
    cluster would wait forever for a CPU that its own actors hold.

    Args:
        cpus, gpus: in the cluster.
        network: whether a space has a network.
        project: whether there is a projection.
        most_actors: the user's limit a stage.
    """
    stages = 2 + network + project
    unit = min(1.0, cpus / stages)
    actor_stages = network + project
    # Room left by the two task stages, for one actor a stage; up to 4 CPUs each, which is where both stop to scale.
    spare = cpus - 2 * unit
    actor_cpus = max(unit, float(min(4, int(spare / actor_stages)))) if actor_stages else 0.0
    threads = max(1, int(actor_cpus if actor_cpus >= 1 else cpus))

    def actors(gpus_each: float) -> ActorShare:
        by_gpu = int(gpus / (gpus_each * actor_stages)) if gpus_each else 0
        by_cpu = int(spare / actor_stages / actor_cpus)
        most = most_actors or max(1, by_gpu or by_cpu)
        return ActorShare(round(actor_cpus, 3), gpus_each, threads, most)

    per_stage = 0.0 if not gpus else 1.0 if actor_stages == 1 else 0.5
    return Shares(
        task_cpus=round(unit, 3),
        decode_tasks=max(2, int(cpus)),
        encode=actors(per_stage) if network else None,
        project=actors(per_stage) if project else None,
    )
