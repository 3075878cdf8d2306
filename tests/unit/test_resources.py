from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from manifpt.resources import memory_bytes, reservable_bytes, share, share_training

MANY = 10_000  # shards


@given(
    cpus=st.floats(0.5, 512),
    gpus=st.integers(0, 64),
    network=st.booleans(),
    project=st.integers(0, 4),
    jobs=st.integers(1, 3),
    shards=st.integers(1, 500),
    grows=st.booleans(),
)
def test_some_jobs_on_one_cluster_always_have_a_cpu_left_for_a_task(
    cpus: float, gpus: int, network: bool, project: int, jobs: int, shards: int, grows: bool
) -> None:
    """Otherwise they wait forever for CPUs that their own actors hold."""
    found = share(cpus, gpus, network=network, project=project, shards=shards, grows=grows)
    actors = [found.encode] * network + [found.project] * project
    assert None not in actors
    actors = [actor for actor in actors if actor is not None]
    held = sum(actor.cpus for actor in actors)
    assert jobs * held + found.task_cpus <= cpus * 1.01
    assert sum(actor.gpus for actor in actors) <= gpus
    for actor in actors:
        assert actor.threads >= 1
        assert 1 <= actor.most <= shards


@given(cpus=st.floats(2, 512), network=st.booleans())
def test_scaled_up_it_leaves_room_for_tasks_and_another_job(cpus: float, network: bool) -> None:
    found = share(cpus, 0, network=network, project=1, shards=MANY)
    held = sum(actor.cpus * actor.most for actor in (found.encode, found.project) if actor is not None)
    if cpus >= 8:  # a second job's first actors and one task fit beside it
        assert held + cpus / 4 + found.task_cpus <= cpus * 1.01


@given(
    cpus=st.floats(0.5, 512),
    gpus=st.integers(0, 64),
    network=st.booleans(),
    most=st.none() | st.integers(1, 99),
    shards=st.integers(1, 99),
    grows=st.booleans(),
)
def test_decoding_is_never_fused_into_actors(
    cpus: float, gpus: int, network: bool, most: int | None, shards: int, grows: bool
) -> None:
    found = share(cpus, gpus, network=network, project=1, shards=shards, most_actors=most, grows=grows)
    assert found.decode_tasks not in {actor.most for actor in (found.encode, found.project) if actor is not None}


def test_a_small_machine_shares_its_cores() -> None:
    found = share(2, 0, network=True, project=1, shards=MANY)
    assert found.task_cpus == 0.5
    assert found.encode is not None
    assert (found.encode.cpus, found.encode.threads, found.encode.most) == (0.25, 2, 1)


def test_a_gpu_node_has_an_actor_a_gpu() -> None:
    found = share(64, 8, network=True, project=1, shards=MANY)
    assert found.encode is not None
    assert found.project is not None
    assert found.encode.gpus > 0.5, "two encoders on one GPU would each wait for the other's projection"
    assert found.encode.gpus + 4 * found.project.gpus <= 1
    assert (found.encode.most, found.project.most) == (8, 8)
    assert (found.encode.cpus, found.encode.threads) == (1, 4)
    pixels = share(64, 8, network=False, project=1, shards=MANY)
    assert pixels.project is not None
    assert (pixels.project.gpus, pixels.project.most) == (1.0, 8)
    control = share(64, 8, network=False, project=1, shards=MANY, project_on_gpu=False)
    assert control.project is not None
    assert (control.project.gpus, control.project.most > 8) == (0.0, True), "what searches nothing takes no GPU"


def test_a_cpu_cluster_scales_by_cpus() -> None:
    found = share(64, 0, network=True, project=1, shards=MANY)
    assert found.encode is not None
    assert (found.encode.cpus, found.encode.threads, found.encode.most) == (4, 4, 6)
    small_nodes = share(64, 0, network=True, project=1, shards=MANY, largest_node_cpus=2)
    assert small_nodes.encode is not None
    assert small_nodes.encode.cpus == 2, "more than a node has would wait forever"
    limited = share(64, 0, network=True, project=1, shards=MANY, most_actors=3)
    assert limited.encode is not None
    assert limited.encode.most == 3


@given(cpus=st.floats(0.5, 512), gpus=st.integers(0, 64), network=st.booleans(), shards=st.integers(1, MANY))
def test_a_cluster_that_grows_is_followed_as_far_as_there_are_shards(
    cpus: float, gpus: int, network: bool, shards: int
) -> None:
    found = share(cpus, gpus, network=network, project=1, shards=shards, grows=True)
    for actor in (found.encode, found.project):
        assert actor is None or actor.most == shards
        assert actor is None or gpus or actor.threads <= max(1, actor.cpus), "nothing else bounds actors on a node"
    assert found.decode_tasks >= shards


def test_no_more_actors_than_shards_are_left_or_the_user_allows() -> None:
    left = share(64, 8, network=True, project=1, shards=3)
    limited = share(4, 0, network=True, project=1, shards=MANY, most_actors=5, grows=True)
    for found, most in ((left, 3), (limited, 5)):
        assert found.encode is not None
        assert found.project is not None
        assert (found.encode.most, found.project.most) == (most, most)
    assert left.decode_tasks in (3, 4)


@given(
    cpus=st.integers(1, 256),
    gpus=st.integers(0, 16),
    nodes=st.integers(1, 32),
    workers=st.none() | st.integers(1, 400),
)
def test_training_leaves_cpus_to_read_with(cpus: int, gpus: int, nodes: int, workers: int | None) -> None:
    """Otherwise workers wait for artifacts, and the tasks that read them for CPUs, forever."""
    found = share_training(cpus, gpus, nodes, workers)
    assert found.workers == (workers or gpus or nodes)
    assert found.worker_cpus >= 0, "Ray refuses less than nothing"
    assert found.workers * found.worker_cpus + found.task_cpus <= cpus * 1.0001
    assert found.task_cpus >= min(1.0, cpus / 4)
    assert found.threads >= 1
    assert found.gpu == (gpus > 0 and found.workers <= gpus)
    if found.worker_cpus >= 1:
        assert found.worker_cpus == int(found.worker_cpus), "Ray refuses one and a half"


def test_training_takes_a_gpu_each_or_a_node_each() -> None:
    one = share_training(2, 0, 1)
    assert (one.workers, one.worker_cpus, one.threads, one.task_cpus, one.gpu) == (1, 1, 2, 0.5, False)
    nodes = share_training(64, 0, 4)
    assert (nodes.workers, nodes.worker_cpus, nodes.threads) == (4, 15, 16)
    gpus = share_training(64, 8, 2)
    assert (gpus.workers, gpus.worker_cpus, gpus.gpu) == (8, 4, True)


def test_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    machine = memory_bytes([])
    for name, text in (("limit", f"{machine // 3}\n"), ("none", "max\n"), ("old", f"{1 << 62}\n")):
        (tmp_path / name).write_text(text)
    absent, none, old, limit = (str(tmp_path / name) for name in ("absent", "none", "old", "limit"))
    assert memory_bytes([absent]) == memory_bytes([none]) == memory_bytes([old]) == machine
    assert memory_bytes([none, limit]) == machine // 3


def test_a_task_reserves_no_more_than_a_node_has_that_can_run_it() -> None:
    nodes = [{"CPU": 64.0, "memory": 400e9}, {"CPU": 16.0, "GPU": 1.0, "memory": 40e9}, {"memory": 900e9}]
    assert reservable_bytes(int(50e9), nodes, 1, 0.25) == int(40e9)
    assert reservable_bytes(int(50e9), nodes, 1, 0) == int(50e9)
    assert reservable_bytes(int(500e9), nodes, 1, 0) == int(400e9), "the head runs no tasks"
    assert reservable_bytes(1, nodes, 1, 2) == reservable_bytes(1, [], 1, 0) == 0, "nodes are still to come"
