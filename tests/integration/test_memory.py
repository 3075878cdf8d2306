"""Ten times the images, the same memory.

In shards of 256, so that already with 5,000 images every worker has done each kind of work a few times: what a process
takes for its second shard and its first commit is no growth with the images.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.helpers.cluster import ROOT, job, must, ray_head, workers_of
from tests.helpers.images import repeated, sample_files, write_files


class Peaks:
    """Peak resident memory in bytes by role, as the kernel keeps it (`VmHWM`): short peaks count too."""

    def __init__(self, driver: subprocess.Popen[bytes], env: dict[str, str]) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self._driver, self._env = psutil.Process(driver.pid), env
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while self._driver.is_running() and self._driver.status() != psutil.STATUS_ZOMBIE:
            self._note("driver", self._driver.pid)
            for worker in workers_of(self._env, ("ray::",)):
                with contextlib.suppress(psutil.Error):
                    self._note("projecting actor" if "_Project" in worker.cmdline()[0] else "other worker", worker.pid)
            time.sleep(0.1)

    def _note(self, role: str, pid: int) -> None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
            self.bytes[role] = max(self.bytes[role], 1024 * int(kilobytes))

    def finished(self) -> None:
        self._thread.join()


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
