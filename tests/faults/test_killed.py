"""Killed at any moment and started again with the same command: the same bytes, and nothing computed twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.cluster import ROOT, job, must, workers_of
from tests.helpers.images import sample_files, tree_bytes, write_files

KILLS = 10
SHARD_ROWS = 24


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, str]) -> Path:
    """Images of the sample as files, a reference, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("killed")
    write_files(sample_files("reference", {"real": 400}), folder / "reals")
    write_files(sample_files("query"), folder / "queries")
    (folder / "queries" / "gan" / "broken.png").write_bytes(b"no image")
    for name in ("reals", "queries"):
        must(job("index_images", "--input", folder / name, "--output", folder / f"{name}.parquet"))
    must(job("build_reference", "--manifest", folder / "reals.parquet", "--output", folder / "reference", env=cluster))
    must(job("compute_artifacts", *arguments(folder, "undisturbed"), env=cluster))
    return folder


def arguments(folder: Path, output: str) -> tuple[object, ...]:
    common = ("--manifest", folder / "queries.parquet", "--reference", folder / "reference")
    return (*common, "--shard-rows", SHARD_ROWS, "--output", folder / output)


def start(folder: Path, output: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), *map(str, arguments(folder, output))]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def commits(run: Path) -> dict[str, bytes]:
    folder = run / "commits"
    return {path.name: path.read_bytes() for path in folder.glob("*.json")} if folder.exists() else {}


def check_same(folder: Path, output: str) -> None:
    undisturbed, run = folder / "undisturbed", folder / output
    assert (run / "_SUCCESS").exists()
    assert tree_bytes(run) == tree_bytes(undisturbed)
    assert (run / "rejected.parquet").read_bytes() == (undisturbed / "rejected.parquet").read_bytes()
    assert not list(run.rglob("*.tmp")), "a temporary file was left behind"
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, undisturbed)]
    assert summaries[0]["spaces"] == summaries[1]["spaces"]


def first_commits(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until some shards are done."""
    deadline = time.monotonic() + 90
    while len(commits(run)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_driver_is_killed_ten_times(workplace: Path, cluster: dict[str, str]) -> None:
    """Each time after a random share of the shards that were left, or of the start-up before the first."""
    rng = random.Random(0)
    run = workplace / "driver"
    shards = len(commits(workplace / "undisturbed"))
    done: dict[str, bytes] = {}
    kills = 0
    for attempt in range(KILLS):
        process = start(workplace, "driver", cluster)
        if attempt % 3 == 0:
            time.sleep(rng.uniform(0.1, 6))  # before or while the first shards come
        else:
            first_commits(run, min(shards - 1, len(done) + rng.randint(1, max(1, shards // 8))), process)
            time.sleep(rng.uniform(0, 0.2))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = commits(run)
        assert done.items() <= now.items(), "a committed shard was computed again"
        done = now
    assert kills >= KILLS - 2, "most kills came too late to show anything"
    must(job("compute_artifacts", *arguments(workplace, "driver"), env=cluster))
    assert done.items() <= commits(run).items(), "a committed shard was computed again"
    check_same(workplace, "driver")


def test_workers_are_killed(workplace: Path, cluster: dict[str, str]) -> None:
    """Three times, one worker process of each kind that runs at that moment; Ray brings them back."""
    run = workplace / "worker"
    process = start(workplace, "worker", cluster)
    killed = 0
    for count in (2, 12, 30):
        first_commits(run, count, process)
        for worker in workers_of(cluster):
            worker.kill()
            killed += 1
    assert process.wait(200) == 0
    assert killed >= 3
    check_same(workplace, "worker")


def test_two_jobs_on_one_folder(workplace: Path, cluster: dict[str, str]) -> None:
    """Both end well, and the result is that of one."""
    processes = [start(workplace, "two", cluster) for _ in range(2)]
    assert [process.wait(200) for process in processes] == [0, 0]
    check_same(workplace, "two")


def test_two_jobs_with_different_plans_on_one_folder(workplace: Path, cluster: dict[str, str]) -> None:
    """One wins; the other ends with code 2 and leaves nothing."""
    one = start(workplace, "either", cluster)
    command = [sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), *map(str, arguments(workplace, "either"))]
    other = subprocess.Popen([*command, "--spaces", "rgb"], env={**os.environ, **cluster}, stderr=subprocess.DEVNULL)
    assert sorted([one.wait(200), other.wait(200)]) == [0, 2]
    run = workplace / "either"
    expected = tree_bytes(workplace / "undisturbed")
    assert tree_bytes(run).items() <= expected.items()
    assert (run / "_SUCCESS").exists()
