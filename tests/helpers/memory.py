"""Peak memory, as the kernel keeps it."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.helpers.cluster import workers_of


def peak_rss_bytes(pid: int) -> int:
    """`VmHWM` of a process: short peaks count too. OSError or StopIteration where it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


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
            self.bytes[role] = max(self.bytes[role], peak_rss_bytes(pid))

    def finished(self) -> None:
        self._thread.join()
