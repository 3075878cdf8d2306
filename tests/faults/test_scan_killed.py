"""Scans as a schedule starts them: killed at any moment, started together, on files and on S3."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt.storage_s3 import S3Store
from tests.helpers.cluster import ROOT
from tests.helpers.images import put_objects, write_files
from tests.helpers.s3 import BUCKET
from tests.helpers.scans import attributions, make_attributor, new_files

KILLS = 10
WAVES = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    make_attributor(folder)
    return folder


def start(made: Path, source: object, output: object, env: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tests.helpers.impatient_scan", "--input", str(source), "--output", str(output),
        "--attributor", str(made / "attributor"), "--reference", str(made / "reference"),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, **env}, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_nothing_is_lost_and_nothing_twice(
    made: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    rng, bucket = random.Random(0), tmp_path / "bucket"
    output, calm = tmp_path / "killed", tmp_path / "calm"
    done, kills = 0, 0
    for wave in range(WAVES):
        write_files(new_files(40, start=40 * wave), bucket)
        assert start(made, bucket, calm, cluster).wait(120) == 0
        for attempt in range(KILLS // WAVES):
            process = start(made, bucket, output, cluster)
            if attempt % 2:
                wait_for_commits(output, done + 1, process)
            else:
                time.sleep(rng.uniform(0.5, 8))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            done = len(list((output / "commits").glob("*.json")))
        assert start(made, bucket, output, cluster).wait(120) == 0
        done = len(list((output / "commits").glob("*.json")))
    assert kills >= KILLS // 2, "most kills came too late to show anything"
    assert told(attributions(output)) == told(attributions(calm))
    assert not list(output.rglob("*.tmp"))
    assert json.loads((output / "scan.json").read_text())["status"] == "done"


def wait_for_commits(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if len(list((output / "commits").glob("*.json"))) >= count:
            return
        time.sleep(0.05)


def told(table: pa.Table) -> list[dict[str, Any]]:
    """Every row, in the order of ids; parts may divide windows otherwise."""
    rows: list[dict[str, Any]] = table.drop_columns(["feature"]).to_pylist()
    return sorted(rows, key=lambda row: str(row["image_id"]))


@pytest.mark.slow
def test_of_two_scans_that_start_together_on_s3_one_works(
    made: Path, s3: dict[str, str], cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    source, output = f"s3://{BUCKET}/scan/in", f"s3://{BUCKET}/scan/out"
    for wave in range(WAVES):
        put_objects(new_files(10, start=10 * wave), BUCKET, "scan/in", s3)
        both = [start(made, source, output, {**cluster, **s3}) for _ in range(2)]
        said = [process.communicate(timeout=180)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        # One may end before the other begins, and then leaves nothing to do.
        others = [text for text in said if "Another scan" in text or "none: nothing is new" in text]
        assert len(others) == 1, said
    store = S3Store()
    parts = sorted(entry.uri for entry in store.list(f"{output}/attributions"))
    rows = [row for uri in parts for row in pq.read_table(io.BytesIO(store.read(uri))).to_pylist()]
    wanted = sorted(entry.uri for entry in store.list(source))
    assert sorted(row["image_id"] for row in rows) == wanted, "each image once"
    state = json.loads(store.read(f"{output}/scan.json"))
    assert (state["window"], state["status"]) == (WAVES, "done")
