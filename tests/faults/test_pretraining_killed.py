"""A pretraining whose worker is killed ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manifpt.config import IndexConfig
from manifpt.runs import index_images
from tests.helpers.cluster import ROOT, job, must, workers_of
from tests.helpers.images import sample_files, write_files

EPOCHS = 6


def losses_of(output: Path) -> list[tuple[int, float]]:
    path = output / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["epoch"], line["loss"]) for line in lines if "step" not in line and line["epoch"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_changes_no_loss(cluster: dict[str, str], tmp_path: Path) -> None:
    write_files(sample_files("reference", {"real": 96}), tmp_path / "reals")
    index_images(IndexConfig(input=(str(tmp_path / "reals"),), output=str(tmp_path / "reals.parquet")))
    arguments = ["--manifest", tmp_path / "reals.parquet", "--size-px", 16, "--epochs", EPOCHS, "--batch-size", 16,
                 "--workers", 1]  # fmt: skip
    must(job("pretrain_encoder", *arguments, "--output", tmp_path / "whole", env=cluster))
    command = [sys.executable, str(ROOT / "jobs" / "pretrain_encoder.py"), *map(str, arguments)]
    command += ["--output", str(tmp_path / "killed")]
    with subprocess.Popen(command, env={**os.environ, **cluster}, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while len(losses_of(tmp_path / "killed")) < 2 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert 2 <= len(losses_of(tmp_path / "killed")) < EPOCHS, "it can be killed in the middle"
            (victim,) = workers_of(cluster, ("RayTrainWorker",))
            victim.kill()
            _, told = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, told
    whole, killed = losses_of(tmp_path / "whole"), losses_of(tmp_path / "killed")
    assert [epoch for epoch, _ in killed] == list(range(1, EPOCHS + 1))
    # Threads may add in another order.
    assert [loss for _, loss in killed] == pytest.approx([loss for _, loss in whole], rel=1e-3)
