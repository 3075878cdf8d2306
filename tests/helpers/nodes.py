"""Several Ray nodes on this machine (`ray.cluster_utils`), in two pools as a cluster has them, which come and go.

They are started by a process of their own, since Ray reads its settings once a process: `python -m tests.helpers.nodes`
takes `look`, `add POOL...` and `remove POOL NUMBER` a line, and answers with the address and the raylets' ids. A
raylet that has died (as it does when its agents are killed) is gone from the next answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.cluster import ROOT

__all__ = ["POOLS", "Nodes", "ray_nodes"]

_LOOPBACK: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 200 << 20}
POOLS: dict[str, dict[str, Any]] = {
    "cpu_node": {"num_cpus": 2, "resources": {"cpu_node": 1}},
    "gpu_node": {"num_cpus": 1, "num_gpus": 1, "resources": {"gpu_node": 1}},  # Ray believes what it is told
}


class Nodes:
    """A head that runs no tasks, and workers.

    Attributes:
        env: what joins them.
        raylets: processes that are the workers, by pool, the oldest first.
    """

    def __init__(self, server: subprocess.Popen[str], log: Path, env: dict[str, str]) -> None:
        self._server, self._log = server, log
        self.env = env
        self.raylets: dict[str, list[int]] = {}

    def look(self) -> None:
        """Which workers are alive now."""
        self._ask("look")

    def add(self, *pools: str) -> None:
        """Starts workers, all at once, and waits for them."""
        self._ask("add", *pools)

    def remove(self, pool: str, number: int = 0) -> None:
        """Ends a worker as a power cut does."""
        self._ask("remove", pool, number)

    def stages(self, pool: str, number: int = 0) -> list[psutil.Process]:
        """Processes of a worker that run a stage now."""
        found = []
        for one in psutil.Process(self.raylets[pool][number]).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::Map" in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def _ask(self, *words: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(*words, file=self._server.stdin, flush=True)
        line = self._server.stdout.readline()
        assert line, f"{words}: {self._log.read_text()[-3000:]}"
        answer = json.loads(line)
        self.env["RAY_ADDRESS"], self.raylets = answer["address"], answer["raylets"]


@contextlib.contextmanager
def ray_nodes(*pools: str, node_env: Mapping[str, str] | None = None) -> Iterator[Nodes]:
    """Starts a head, and a worker for each pool that is named."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))  # short: the paths of sockets have a limit
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: on loopback alone
        "RAY_TMPDIR": str(folder),  # also of the file that tells other jobs of this machine which cluster to join
    }
    outer = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with open(folder / "nodes.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.nodes"], cwd=ROOT, env={**outer, **env, **(node_env or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        nodes = Nodes(server, folder / "nodes.log", env)
        nodes.add(*pools)
        yield nodes
    finally:
        descendants = psutil.Process(server.pid).children(recursive=True)
        server.communicate(timeout=60)
        for left in descendants:
            with contextlib.suppress(psutil.Error):
                left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _serve() -> None:
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **_LOOPBACK})
    alive: dict[str, list[Any]] = {pool: [] for pool in POOLS}

    def bury() -> None:
        """Ray's helper goes on counting those that died by themselves."""
        for nodes in alive.values():
            for node in [one for one in nodes if _raylet(one).poll() is not None]:
                nodes.remove(node)
                cluster.remove_node(node, allow_graceful=False)

    for line in sys.stdin:
        verb, *words = line.split()
        bury()
        if verb == "add":
            for pool in words:
                alive[pool].append(cluster.add_node(wait=False, **_LOOPBACK, **POOLS[pool]))
            for _ in range(10):  # starts are slow where a job has the cores
                with contextlib.suppress(TimeoutError):
                    cluster.wait_for_nodes(timeout=30)
                    break
                bury()
            else:
                raise TimeoutError(f"{words} did not join in 300 s")
        elif verb == "remove":
            cluster.remove_node(alive[words[0]].pop(int(words[1])), allow_graceful=False)
        raylets = {pool: [_raylet(one).pid for one in alive[pool]] for pool in POOLS}
        print(json.dumps({"address": cluster.address, "raylets": raylets}), file=answers, flush=True)
    cluster.shutdown()


def _raylet(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return process


if __name__ == "__main__":
    _serve()
