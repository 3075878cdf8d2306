"""Cost as the work grows: time per image and peak memory over images and over references."""

from __future__ import annotations

import itertools
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

from tests.benchmarks.data import SHARED, files, sample_views, views
from tests.helpers.cluster import ROOT, job, must, ray_head
from tests.helpers.images import repeated, write_files
from tests.helpers.memory import Peaks

__all__ = ["run"]

_IMAGES = (1_000, 4_000, 16_000, 64_000, 256_000)
_REFERENCES = (5_000, 20_000, 80_000)


def run(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """rgb: images over the smallest reference, then references under 4,000 images.

    The time of one more image comes from differences between sizes, in which the start of the actors cancels out:
    `growth_time_an_image` is that from 16k to 64k over that from 4k to 16k, and `growth_time_an_image_later` that from
    64k to 256k over that from 16k to 64k. The first says little: below 16k the seconds in which processes start, and
    the shards that are decoded meanwhile, outweigh what an image costs.
    """
    write_files(files(16_000), folder / "images")
    must(job("index_images", "--input", folder / "images", "--output", folder / "few.parquet"))
    for images in _IMAGES:
        repeated(folder / "few.parquet", images, folder / f"{images}.parquet")
    cases = [(images, _REFERENCES[0]) for images in _IMAGES] + [(4_000, count) for count in _REFERENCES[1:]]
    for count in _REFERENCES:
        reference(folder, count)
    results = []
    for images, count in cases:
        result = one(folder, images, count)
        results.append(result)
        say(
            f"growth {images:6} images, {count:6} references: {1e6 * result['running_s'] / images:7.0f} us an image,"
            f" in its quarters {', '.join(f'{us:.0f}' for us in result['quarters_us'])},"
            f" joining Ray {result['start_s']:.1f} s, peak MB "
            + ", ".join(f"{role} {size / 1e6:.0f}" for role, size in sorted(result["peak_bytes"].items()))
        )
    seconds = {r["images"]: r["running_s"] for r in results if r["references"] == _REFERENCES[0]}
    marginal = {
        f"{few}_to_{many}": (seconds[many] - seconds[few]) / (many - few)
        for few, many in itertools.pairwise(_IMAGES[1:])
    }
    say("growth marginal us an image: " + ", ".join(f"{name} {1e6 * value:.0f}" for name, value in marginal.items()))
    few, many, most = marginal.values()
    peaks = {r["images"]: sum(r["peak_bytes"].values()) for r in results if r["references"] == _REFERENCES[0]}
    ratios = {
        "growth_time_an_image": round(many / few, 3),
        "growth_time_an_image_later": round(most / many, 3),
        "growth_peak_memory": round(peaks[64_000] / peaks[4_000], 3),
        "growth_peak_memory_later": round(peaks[256_000] / peaks[64_000], 3),
    }
    return {"results": {"cases": results, "marginal_s": marginal}, "ratios": ratios}


def reference(folder: Path, count: int) -> None:
    """Real images, shifted and mirrored where the set has fewer, as a Parquet set; and a reference of them."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    cifar = SHARED / "gm_cifar10" / "real_cifar10_jpeg.parquet"
    images_bchw = views(cifar, 32) if cifar.exists() else sample_views("reference")
    rows = []
    for number in range(count):
        turn, place = divmod(number, len(images_bchw))
        image_hwc = np.roll(images_bchw[place].transpose(1, 2, 0), turn, axis=1)
        sink = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image_hwc[:, ::-1] if turn % 2 else image_hwc)).save(sink, "PNG")
        rows.append({"image": {"bytes": sink.getvalue(), "path": f"{number:06d}.png"}})
    path = folder / f"reals-{count}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1_024)
    must(
        job("index_images", "--input", path, "--source", "real", "--output", folder / f"reals-{count}-manifest.parquet")
    )
    must(job("build_reference", "--manifest", folder / f"reals-{count}-manifest.parquet", "--spaces", "rgb", "--output",
             folder / f"reference-{count}", timeout_s=900))  # fmt: skip


def one(folder: Path, images: int, references: int) -> dict[str, Any]:
    """One job on a Ray of its own, watched."""
    output = folder / f"run-{images}-{references}"
    command = [
        sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--manifest", str(folder / f"{images}.parquet"),
        "--reference", str(folder / f"reference-{references}"), "--spaces", "rgb", "--shard-rows", "512",
        "--output", str(output),
    ]  # fmt: skip
    with ray_head(num_cpus=os.cpu_count() or 2) as env:
        begin = time.perf_counter()
        driver = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        peaks = Peaks(driver, env)
        assert driver.wait(1_800) == 0
        seconds = time.perf_counter() - begin
        peaks.finished()
    summary = json.loads((output / "summary.json").read_text())
    times = np.sort([path.stat().st_mtime for path in (output / "commits").glob("*.json")])
    cuts = np.linspace(0, len(times) - 1, 5).astype(int)
    quarters = np.diff(times[cuts]) / np.maximum(1, np.diff(cuts)) / (images / len(times))
    return {
        "images": images,
        "references": references,
        "seconds": seconds,
        "running_s": summary["running_s"],
        "start_s": seconds - summary["running_s"],
        "quarters_us": [round(1e6 * float(seconds), 1) for seconds in quarters],  # an image, from commit to commit
        "peak_bytes": dict(peaks.bytes),
    }
