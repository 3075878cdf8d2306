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

import pyarrow.parquet as pq
import pytest

from tests.helpers.cluster import ROOT, commits, first_commits, job, must, workers_of
from tests.helpers.images import repeated, sample_files, tree_bytes, write_files

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


def check_same(folder: Path, output: str) -> None:
    undisturbed, run = folder / "undisturbed", folder / output
    assert (run / "_SUCCESS").exists()
    assert tree_bytes(run) == tree_bytes(undisturbed)
    assert (run / "rejected.parquet").read_bytes() == (undisturbed / "rejected.parquet").read_bytes()
    assert not list(run.rglob("*.tmp")), "a temporary file was left behind"
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, undisturbed)]
    assert summaries[0]["spaces"] == summaries[1]["spaces"]


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


@pytest.mark.slow
def test_workers_are_killed(workplace: Path, cluster: dict[str, str]) -> None:
    """Four times, every worker process that runs a stage at that moment; Ray brings them back."""
    repeated(workplace / "queries.parquet", 9_000, workplace / "many.parquet")
    common = ("--manifest", workplace / "many.parquet", "--reference", workplace / "reference", "--shard-rows", 32)
    must(job("compute_artifacts", *common, "--output", workplace / "calm", "--max-rejected", 10, env=cluster))
    run = workplace / "worker"
    command = [sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), *map(str, common), "--output", str(run)]
    process = subprocess.Popen([*command, "--max-rejected", "10"], env={**os.environ, **cluster})
    killed = []
    for count in (2, 40, 90, 150):
        first_commits(run, count, process)
        if process.poll() is None:
            killed.append(len([worker.kill() for worker in workers_of(cluster)]))
    assert process.wait(200) == 0
    assert sum(killed) >= 4, f"{killed} workers were killed: too few to show anything"
    assert tree_bytes(run) == tree_bytes(workplace / "calm")
    assert not list(run.rglob("*.tmp")), "a temporary file was left behind"


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
    spaces = [spec["name"] for spec in json.loads((run / "plan.json").read_text())["spaces"]]
    shards = len(commits(workplace / "undisturbed"))
    names = {f"{space}/part-{shard:05d}.parquet" for space in spaces for shard in range(shards)}
    assert set(tree_bytes(run)) == names, "parts of the other plan are there"
    for name in names:
        mine, undisturbed = (pq.read_table(folder / "artifacts" / name) for folder in (run, workplace / "undisturbed"))
        assert mine.equals(undisturbed)
    assert (run / "_SUCCESS").exists()
