from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from manifpt.resources import share


@given(
    cpus=st.floats(0.5, 512),
    gpus=st.integers(0, 64),
    network=st.booleans(),
    project=st.booleans(),
    most=st.one_of(st.none(), st.integers(1, 100)),
)
def test_one_of_everything_always_fits(cpus: float, gpus: int, network: bool, project: bool, most: int | None) -> None:
    """Otherwise a job waits forever for a CPU that its own actors hold."""
    found = share(cpus, gpus, network=network, project=project, most_actors=most)
    actors = [actor for actor in (found.encode, found.project) if actor is not None]
    assert len(actors) == network + project
    assert 2 * found.task_cpus + sum(actor.cpus for actor in actors) <= cpus + 0.01
    assert sum(actor.gpus for actor in actors) <= max(gpus, 0)
    for actor in actors:
        assert actor.threads >= 1
        assert actor.most >= 1
        assert most is None or actor.most == most


def test_a_small_machine_shares_its_cores() -> None:
    found = share(2, 0, network=True, project=True)
    assert found.task_cpus == 0.5
    assert found.encode is not None
    assert (found.encode.cpus, found.encode.threads, found.encode.most) == (0.5, 2, 1)


def test_a_gpu_node_has_an_actor_a_gpu() -> None:
    found = share(64, 8, network=True, project=True)
    assert found.encode is not None
    assert found.project is not None
    assert (found.encode.gpus, found.project.gpus) == (0.5, 0.5)
    assert (found.encode.most, found.project.most) == (8, 8)
    pixels = share(64, 8, network=False, project=True)
    assert pixels.project is not None
    assert (pixels.project.gpus, pixels.project.most) == (1.0, 8)


def test_a_cpu_cluster_scales_by_cpus() -> None:
    found = share(32, 0, network=True, project=True)
    assert found.encode is not None
    assert (found.encode.cpus, found.encode.most) == (4, 3)
