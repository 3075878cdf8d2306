"""The driver: planning and starting from 10 million rows, and resuming a finished job of 10,000 shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.config import ArtifactsConfig
from manifpt.manifest import COLUMNS
from manifpt.plan import publish_plan
from manifpt.planning import plan_artifacts
from manifpt.shards import committed_shards
from tests.helpers.cluster import ROOT, job, must, ray_head
from tests.helpers.images import sample_files, write_files
from tests.helpers.memory import peak_rss_bytes

__all__ = ["run"]

_ROWS = 10_000_000
_SHARDS = 10_000


def run(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`plan_10m_s`: from the command to the first committed shard; `resume_10k_s`: from the command to its end."""
    write_files(sample_files("reference", {"real": 200}), folder / "reals")
    write_files(sample_files("query"), folder / "queries")
    must(job("index_images", "--input", folder / "reals", "--output", folder / "reals.parquet"))
    must(
        job(
            "build_reference",
            "--manifest",
            folder / "reals.parquet",
            "--spaces",
            "rgb",
            "--output",
            folder / "reference",
        )
    )
    images = sorted(str(path) for path in (folder / "queries").rglob("*.png"))
    planned = start(folder, images)
    resumed = resume(folder, images)
    say(
        f"driver 10 million rows: first shard committed after {planned['seconds']:.1f} s, driver's peak "
        f"{planned['peak_bytes'] / 2**20:.0f} MiB; finished job of 10,000 shards: done after "
        f"{resumed['seconds']:.1f} s, peak {resumed['peak_bytes'] / 2**20:.0f} MiB"
    )
    ratios = {"plan_10m_s": round(planned["seconds"], 2), "resume_10k_s": round(resumed["seconds"], 2)}
    return {"results": {"plan_10m": planned, "resume_10k": resumed}, "ratios": ratios}


def manifest(images: list[str], rows: int, path: Path) -> Path:
    """So many rows, in order, over a few files."""
    with pq.ParquetWriter(path, COLUMNS, compression="zstd") as writer:
        for start_row in range(0, rows, 16_384):
            numbers = np.arange(start_row, min(rows, start_row + 16_384))
            columns = {
                "image_id": pa.array([f"generator/image-{number:09d}.png" for number in numbers]),
                "uri": pa.array([images[number % len(images)] for number in numbers]),
                "source": pa.array(["generator"] * len(numbers)),
            }
            empty = {f.name: pa.nulls(len(numbers), f.type) for f in COLUMNS if f.name not in columns}
            both = columns | empty
            writer.write_table(pa.table([both[name] for name in COLUMNS.names], schema=COLUMNS))
    return path


def start(folder: Path, images: list[str]) -> dict[str, Any]:
    """Ends the job once it works."""
    path = manifest(images, _ROWS, folder / "10m.parquet")
    output = folder / "run-10m"
    command = [
        sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--manifest", str(path), "--reference",
        str(folder / "reference"), "--output", str(output),
    ]  # fmt: skip
    with ray_head(num_cpus=os.cpu_count() or 2) as env:
        begin = time.perf_counter()
        driver = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not committed_shards(str(output)):
                assert driver.poll() is None, "the job ended"
                assert time.perf_counter() - begin < 600
                time.sleep(0.05)
            seconds = time.perf_counter() - begin
            time.sleep(10)  # it has to go on in the same memory
            return {
                "rows": _ROWS,
                "manifest_bytes": path.stat().st_size,
                "seconds": seconds,
                "peak_bytes": peak_rss_bytes(driver.pid),
                "shards_after_10_s": len(committed_shards(str(output))),
            }
        finally:
            driver.kill()
            driver.wait()


def resume(folder: Path, images: list[str]) -> dict[str, Any]:
    """The commits are those of one real job of one shard, once for each of 10,000: a driver reads nothing else."""
    few = manifest(images, 1, folder / "one.parquet")
    fixed = ("--reference", folder / "reference", "--shard-rows", "1")
    must(job("compute_artifacts", "--manifest", few, *fixed, "--output", folder / "one"))
    real = json.loads((folder / "one" / "commits" / "00000.json").read_text())

    path, output = manifest(images, _SHARDS, folder / "10k.parquet"), folder / "run-10k"
    config = ArtifactsConfig(manifest=str(path), reference=str(folder / "reference"), output=str(output), shard_rows=1)
    publish_plan(plan_artifacts(config)[0], str(output))
    (output / "commits").mkdir()
    for shard in range(_SHARDS):
        (output / "commits" / f"{shard:05d}.json").write_text(json.dumps(real | {"shard": shard}))
    (output / "_SUCCESS").write_bytes(b"")
    (output / "preview.png").write_bytes(b"")
    command = [
        sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--manifest", str(path), *map(str, fixed),
        "--output", str(output),
    ]  # fmt: skip
    peak = 0
    begin = time.perf_counter()
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None:
        try:
            peak = max(peak, peak_rss_bytes(driver.pid))
        except (OSError, StopIteration):
            break
        time.sleep(0.02)
    assert driver.wait() == 0
    return {"shards": _SHARDS, "seconds": time.perf_counter() - begin, "peak_bytes": peak}
