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

import pytest

from manifpt.attributor.bundle import Attributor
from manifpt.storage import join, store_of
from tests.helpers.cluster import ROOT, workers_of
from tests.helpers.runs import artifacts_of, make_run, rows_of

EPOCHS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = rows_of({"gan": 150, "vae": 150})
    return make_run(tmp_path_factory.mktemp("run") / "r", rows, 60, artifacts=lambda of: artifacts_of(of, (3, 16, 16)))


def start(run: Path, output: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "train_attributor.py"), *arguments(run, output)]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)


def arguments(run: Path, output: str) -> list[str]:
    return ["--artifacts", str(run), "--space", "rgb", "--network", "head", "--epochs", str(EPOCHS), "--workers", "2",
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
    assert len(epochs_of(output)) >= epochs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_driver_is_killed_and_then_a_worker(
    run: Path, cluster: dict[str, str], s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything on S3. The same command goes on after the first; after the second, the job does by itself."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    output = "s3://images/attributor"
    with start(run, output, {**cluster, **s3}) as process:
        try:
            wait_for(output, 3, process)
        finally:
            process.send_signal(signal.SIGKILL)
    before = len(epochs_of(output))
    assert 3 <= before < EPOCHS - 3
    with start(run, output, {**cluster, **s3}) as process:
        try:
            wait_for(output, before + 2, process)
            victims = workers_of(cluster, ("RayTrainWorker",))
            assert len(victims) == 2
            victims[-1].kill()
            _, told = process.communicate(timeout=150)
        finally:
            process.kill()
    assert process.returncode == 0, told
    assert epochs_of(output) == list(range(1, EPOCHS + 1))
    shown = [int(line.split("epoch=")[1].split("/")[0]) for line in told.splitlines() if " epoch=" in line]
    assert shown and shown[0] >= before, "it didn't begin anew"
    assert shown == list(range(shown[0], EPOCHS + 1)), "each is told once"
    assert Attributor.load(output).labels == ("gan", "vae")
