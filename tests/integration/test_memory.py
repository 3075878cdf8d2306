"""Ten times the images, the same memory.

In shards of 256, so that already with 5,000 images every worker has done each kind of work a few times: what a process
takes for its second shard and its first commit is no growth with the images.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.cluster import ROOT, job, must, ray_head
from tests.helpers.images import repeated, sample_files, write_files
from tests.helpers.memory import Peaks


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    write_files(sample_files("reference", {"real": 300}), tmp_path / "reals")
    write_files(sample_files("query"), tmp_path / "queries")
    for name in ("reals", "queries"):
        must(job("index_images", "--input", tmp_path / name, "--output", tmp_path / f"{name}.parquet"))
    peaks: dict[int, Peaks] = {}
    with ray_head() as env:
        must(
            job(
                "build_reference", "--manifest", tmp_path / "reals.parquet", "--output", tmp_path / "reference", env=env
            )
        )
    for images in (5_000, 50_000):
        repeated(tmp_path / "queries.parquet", images, tmp_path / f"{images}.parquet")
        with ray_head() as env:
            command = [
                sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--spaces", "rgb", "--shard-rows", "256",
                "--manifest", str(tmp_path / f"{images}.parquet"), "--reference", str(tmp_path / "reference"),
                "--output", str(tmp_path / f"run-{images}"),
            ]  # fmt: skip
            begin = time.monotonic()
            driver = subprocess.Popen(command, env={**os.environ, **env})
            peaks[images] = Peaks(driver, env)
            assert driver.wait(280) == 0
            peaks[images].finished()
            print(f"{images} images in {time.monotonic() - begin:.1f} s")
    for role, few in peaks[5_000].bytes.items():
        many = peaks[50_000].bytes[role]
        print(f"peak resident memory of the {role}: {few / 1e6:.0f} MB and {many / 1e6:.0f} MB ({many / few - 1:+.1%})")
    # Of all together: one process's peak varies by a few percent from run to run, with how its heap is cut up.
    few, many = (sum(peaks[images].bytes.values()) for images in (5_000, 50_000))
    print(f"together: {few / 1e6:.0f} MB and {many / 1e6:.0f} MB ({many / few - 1:+.1%})")
    assert many < 1.1 * few
