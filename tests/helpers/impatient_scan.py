"""jobs/scan.py, but a lease whose holder is dead is free after a second: a test can't wait half a minute each time."""

from __future__ import annotations

import runpy
import sys

from manifpt.monitoring import lease
from tests.helpers.cluster import ROOT

lease.held.__wrapped__.__defaults__ = (0.2, 1.0)  # type: ignore[attr-defined]
sys.argv[0] = str(ROOT / "jobs" / "scan.py")
runpy.run_path(sys.argv[0], run_name="__main__")
