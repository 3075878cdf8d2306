"""Ten times the images, the same memory."""

from __future__ import annotations

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
    """The most memory that the driver and each stage's processes hold, sampled; in bytes.

    `private` leaves out pages that processes share: libraries and the object store, whose size is a setting.
    """

    def __init__(self, driver: subprocess.Popen[bytes], env: dict[str, str]) -> None:
        self.resident: dict[str, int] = defaultdict(int)
        self.private: dict[str, int] = defaultdict(int)
        self._driver, self._env = psutil.Process(driver.pid), env
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while self._driver.is_running() and self._driver.status() != psutil.STATUS_ZOMBIE:
            self._note("driver", self._driver)
            for worker in workers_of(self._env, ("ray::",)):
                self._note("worker", worker)
            time.sleep(0.2)

    def _note(self, role: str, process: psutil.Process) -> None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            return
        self.resident[role] = max(self.resident[role], memory.rss)
        self.private[role] = max(self.private[role], memory.rss - memory.shared)

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
                sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--spaces", "rgb",
                "--manifest", str(tmp_path / f"{images}.parquet"), "--reference", str(tmp_path / "reference"),
                "--output", str(tmp_path / f"run-{images}"),
            ]  # fmt: skip
            begin = time.monotonic()
            driver = subprocess.Popen(command, env={**os.environ, **env})
            peaks[images] = Peaks(driver, env)
            assert driver.wait(280) == 0
            peaks[images].finished()
            print(f"{images} images in {time.monotonic() - begin:.1f} s")
    for role in ("driver", "worker"):
        for kind in ("resident", "private"):
            few, many = (getattr(peaks[images], kind)[role] for images in (5_000, 50_000))
            print(f"peak {kind} memory of a {role}: {few / 1e6:.0f} MB and {many / 1e6:.0f} MB ({many / few - 1:+.1%})")
    for role in ("driver", "worker"):
        assert peaks[50_000].resident[role] < 1.1 * peaks[5_000].resident[role]
        assert peaks[50_000].private[role] < 1.1 * peaks[5_000].private[role]
