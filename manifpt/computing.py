"""Computing what is missing of a plan, with all that a driver says while it happens: progress, metrics, a last word.

What runs, scans and references share; what becomes of the shards is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from manifpt.errors import ConfigError, NodesLost
from manifpt.log import Progress, event
from manifpt.plan import Plan
from manifpt.storage import is_local
from manifpt.telemetry import Telemetry
from manifpt.termination import grace

__all__ = ["Computing", "check_actors"]


_MOST_IN_VAIN = 3  # attempts one after the other in which no shard was committed


def check_actors(most_actors: int | None) -> None:
    """Raises:
    ConfigError: a number of actors with which nothing could be done.
    """
    if most_actors is not None and most_actors < 1:
        raise ConfigError(f"--max-actors must be at least 1, not {most_actors}.")


@dataclass(slots=True)
class Computing:
    """Shards of a plan that have no commit.

    Attributes:
        plan, output: what, and where.
        pending: numbers of the shards; at least one.
        images, rejected: that are done before.
        most_actors, gpu: as of `pipeline.run`.
        images_per_s, running_s: once it has ended.
    """

    plan: Plan
    output: str
    pending: Sequence[int]
    images: int = 0
    rejected: int = 0
    most_actors: int | None = None
    gpu: bool = False
    images_per_s: float = field(init=False, default=0.0)
    running_s: float = field(init=False, default=0.0)

    def commits(self) -> Generator[dict[str, Any]]:
        """As of `pipeline.run`, while progress is told. Whoever leaves early closes it."""
        from manifpt import cluster, pipeline  # Ray costs a second, and what is finished doesn't need it

        cluster.connect()
        if not cluster.on_one_node() and is_local(self.output):
            event("shared_storage_needed", path=self.output, hint="every node must see this path; else use s3://")
        progress = Progress(self.plan.rows, self.images, self.rejected)
        try:
            with grace(), Telemetry() as telemetry:
                telemetry.pending(len(self.pending))
                for left, commit in self._computed(pipeline.run):
                    progress.add(len(self.plan.rows_of(commit["shard"])), commit["rejected_images"])
                    telemetry.shard(commit["tally"], left)
                    self.images_per_s, self.running_s = round(progress.images_per_s, 1), round(progress.running_s, 2)
                    yield commit
        finally:
            progress.close()

    def _computed(self, run: Callable[..., Iterator[dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each commit, with how many shards are left; those that lost nodes had are computed anew."""
        left, in_vain = list(self.pending), 0
        while left:
            in_vain += 1
            try:
                for commit in run(self.plan, self.output, list(left), self.most_actors, self.gpu):
                    in_vain = 0
                    left.remove(commit["shard"])
                    yield len(left), commit
                return
            except NodesLost as lost:
                if in_vain == _MOST_IN_VAIN:
                    raise
                event("nodes_lost", shards_left=len(left), why=lost, hint="computing what is left anew")
