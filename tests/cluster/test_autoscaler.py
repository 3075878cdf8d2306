"""From no worker at all: Ray's autoscaler brings nodes when the job waits for them, and takes them away at its end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping

from tests.cluster.conftest import Workplace
from tests.helpers.cluster import RAY, first_commits, must, ray_head, started

POOLS = {
    "cpu_node": {"resources": {"CPU": 2, "object_store_memory": 200 << 20}, "max_workers": 2},
    "gpu_node": {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 200 << 20}, "max_workers": 2},
}


def workers(env: Mapping[str, str]) -> dict[str, int]:
    """Nodes by pool, as the autoscaler itself reports them."""
    command = [RAY, "status", "--address", env["RAY_ADDRESS"]]
    told = must(subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60))
    active = told.partition("Active:")[2].partition("Pending:")[0]
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+_node)", active)}


def test_nodes_come_when_the_job_starts_and_are_gone_at_its_end(workplace: Workplace) -> None:
    log = workplace.folder / "autoscaled.log"
    with ray_head(num_cpus=0, pools=POOLS) as env:
        assert not workers(env)
        arguments = (*workplace.arguments("autoscaled"), "--gpu")
        with started("compute_artifacts", *arguments, env=env, log=log) as process:
            first_commits(workplace.folder / "autoscaled", workplace.shards // 4, process, timeout_s=180)
            assert process.poll() is None, log.read_text()
            assert workers(env).keys() == {"cpu_node", "gpu_node"}
            assert process.wait(120) == 0, log.read_text()
        deadline = time.monotonic() + 60
        while (left := workers(env)) and time.monotonic() < deadline:
            time.sleep(1)
        assert not left
    assert "waiting_for_nodes" in log.read_text()
    workplace.check_same("autoscaled")
