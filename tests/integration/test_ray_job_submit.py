"""`ray job submit` on a head node, as the README says it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.helpers.cluster import RAY, ROOT, ray_head


def test_the_sample_through_ray_job_submit(tmp_path: Path) -> None:
    """On a copy of the project that holds only what git would: the job can't lean on what lies beside it."""
    project = tmp_path / "project"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    output = tmp_path / "run"
    with ray_head(dashboard=True) as env:
        command = [
            RAY, "job", "submit", "--runtime-env", "runtime_env.yaml", "--working-dir", ".", "--",
            "python", "jobs/compute_artifacts.py", "--output", str(output),
        ]  # fmt: skip
        address = {"RAY_API_SERVER_ADDRESS": env["TEST_DASHBOARD"]}
        outer = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        inner = {k: v for k, v in env.items() if k != "RAY_ADDRESS"}
        for _ in range(20):
            result = subprocess.run(
                command,
                cwd=project,
                env={**outer, **inner, **address},
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            if "No available agent" not in result.stderr:  # a node takes a moment to register
                break
            time.sleep(1)
    log = result.stdout + result.stderr
    print(log)
    assert result.returncode == 0, log
    assert (output / "_SUCCESS").exists()
    assert (output / "preview.png").exists()
    assert "succeeded" in log
    assert "Projected 2,300 images" in log
    lines = [line for line in log.splitlines() if line.strip()]
    assert len(lines) < 60, "a log that nobody reads"
    assert not re.search(r"(?i)\bwarn|deprecat|traceback", log)
