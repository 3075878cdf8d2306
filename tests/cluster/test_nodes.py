"""Nodes vanish and come while a run goes on: it costs the shards that they had, and nothing else."""

from __future__ import annotations

from tests.cluster.conftest import Workplace
from tests.helpers.cluster import commits, first_commits, started
from tests.helpers.nodes import ray_nodes


def test_a_node_is_lost_and_another_one_comes(workplace: Workplace) -> None:
    """The only node with a GPU, with all projecting actors, and later one of those that decode."""
    run, log = workplace.folder / "lost", workplace.folder / "lost.log"
    with (
        ray_nodes("cpu_node", "cpu_node", "gpu_node") as nodes,
        started("compute_artifacts", *workplace.arguments("lost"), env=nodes.env, log=log) as process,
    ):
        first_commits(run, workplace.shards // 6, process)
        assert any("_Project" in one.cmdline()[0] for one in nodes.stages("gpu_node")), "it had work"
        nodes.remove("gpu_node")
        nodes.add("gpu_node")
        before = len(commits(run))
        first_commits(run, before + workplace.shards // 6, process)
        nodes.remove("cpu_node")
        assert process.poll() is None and len(commits(run)) < workplace.shards, "it came too late to show anything"
        assert process.wait(120) == 0, log.read_text()
    assert before < workplace.shards // 2, "without a GPU nothing is projected"
    workplace.check_same("lost")
