"""The Ray that a job starts for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.cluster import ROOT

# More workers than two cores keep, idle for longer than Ray lets them be; prints who worked, and who is still there.
_WORKED_AND_LEFT = """
import json, os, sys, time
from pathlib import Path
import ray
from manifpt import cluster

cluster.connect()

@ray.remote(num_cpus=0)
def work(folder):
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < 6 and time.monotonic() < end:  # else a slow machine starts fewer
        time.sleep(0.1)
    return os.getpid()

def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

found = sorted(set(ray.get([work.remote(sys.argv[1]) for _ in range(6)])))
time.sleep(6)
print(json.dumps([found, [pid for pid in found if is_there(pid)]]))
"""


def test_idle_workers_live_on_between_shards(tmp_path: Path) -> None:
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _WORKED_AND_LEFT, tmp_path], capture_output=True, text=True, env=env, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    worked, left = json.loads(done.stdout.splitlines()[-1])
    assert len(worked) == 6
    assert left == worked
