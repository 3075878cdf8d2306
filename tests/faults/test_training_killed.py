"""A training of which a worker or the driver is killed goes on from its newest checkpoint, and loses no epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from manifpt.attributor.bundle import Attributor
from manifpt.storage import join, store_of
from tests.helpers.cluster import ROOT, job, must, workers_of
from tests.helpers.runs import artifacts_of, make_run, rows_of

EPOCHS = 12


def slow(rows: pa.Table) -> object:
    """Artifacts so large that an epoch takes a while."""
    return artifacts_of(rows, (3, 32, 32))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "r", rows_of({"gan": 300, "vae": 300}), 100, artifacts=slow)


def start(run: Path, output: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "train_attributor.py"), *arguments(run, output)]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)


def arguments(run: Path, output: str) -> list[str]:
    return ["--artifacts", str(run), "--space", "rgb", "--network", "small", "--epochs", str(EPOCHS), "--workers", "2",
            "--output", output]  # fmt: skip


def epochs_of(output: str) -> list[int]:
    try:
        lines = store_of(output).read(join(output, "metrics.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["epoch"] for line in lines]


def wait_for(output: str, epochs: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(epochs_of(output)) < epochs and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"


def test_a_worker_is_killed(run: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    output = str(tmp_path / "t")
    process = start(run, output, cluster)
    wait_for(output, 4, process)
    victims = workers_of(cluster, ("RayTrainWorker", "TrainWorker"))
    assert len(victims) == 2
    victims[-1].kill()
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert epochs_of(output) == list(range(1, EPOCHS + 1))
    shown = [line.split("epoch=")[1].split("/")[0] for line in told.splitlines() if " epoch=" in line]
    assert shown == [str(epoch) for epoch in range(1, EPOCHS + 1)], "each is told once"
    assert Attributor.load(output).labels == ("gan", "vae")


@pytest.mark.parametrize("where", ["s3"])
def test_the_driver_is_killed(
    run: Path, cluster: dict[str, str], s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """With everything on S3; the same command goes on."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    output = "s3://images/attributor"
    process = start(run, output, {**cluster, **s3})
    wait_for(output, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = epochs_of(output)
    assert 4 <= len(done) < EPOCHS
    again = job("train_attributor", *arguments(run, output), env={**cluster, **s3})
    must(again)
    assert epochs_of(output) == list(range(1, EPOCHS + 1))
    shown = [int(line.split("epoch=")[1].split("/")[0]) for line in again.stderr.splitlines() if " epoch=" in line]
    assert shown and shown[0] > 1, "it didn't begin anew"
    assert shown == list(range(shown[0], EPOCHS + 1))
    assert Attributor.load(output).labels == ("gan", "vae")
