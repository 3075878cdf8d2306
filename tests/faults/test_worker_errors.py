"""What goes wrong in a worker reaches the user as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.cluster import job, must, ray_head
from tests.helpers.crashes import CRASH, KILL, crashing_decoder
from tests.helpers.images import encoded, picture, write_files


@pytest.fixture
def workplace(tmp_path: Path, cluster: dict[str, str]) -> Path:
    write_files(((f"real/{n:02d}.png", encoded(picture(seed=n), "PNG")) for n in range(20)), tmp_path / "reals")
    write_files(((f"gan/{n:02d}.png", encoded(picture(seed=50 + n), "PNG")) for n in range(40)), tmp_path / "queries")
    for name in ("reals", "queries"):
        must(job("index_images", "--input", tmp_path / name, "--output", tmp_path / f"{name}.parquet"))
    arguments = ("--manifest", tmp_path / "reals.parquet", "--output", tmp_path / "reference", "--spaces", "rgb")
    must(job("build_reference", *arguments, env=cluster))
    return tmp_path


def arguments(workplace: Path) -> tuple[object, ...]:
    common = ("--manifest", workplace / "queries.parquet", "--reference", workplace / "reference")
    return (*common, "--output", workplace / "run", "--shard-rows", 8)


def test_a_damaged_reference_is_a_configuration_error(workplace: Path, cluster: dict[str, str]) -> None:
    """Found by the projecting actor, not by the driver."""
    part = next((workplace / "reference").rglob("part-*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-20] + bytes(20))
    result = job("compute_artifacts", *arguments(workplace), env=cluster)
    assert result.returncode == 2, result.stderr
    assert "was changed after the bundle was finished. Build the reference again." in result.stderr
    assert "Traceback" not in result.stderr
    part.write_bytes(whole)
    must(job("compute_artifacts", *arguments(workplace), env=cluster))


def test_an_image_that_crashes_its_worker_is_rejected_and_no_memory_left_ends_the_job(workplace: Path) -> None:
    crash, kill = (workplace / "queries" / "gan" / f"{n}.png" for n in (20, 30))
    good = crash.read_bytes()
    crash.write_bytes(CRASH + good[len(CRASH) :])
    killed = kill.read_bytes()
    kill.write_bytes(KILL + killed[len(KILL) :])
    with ray_head(node_env={"PYTHONPATH": str(crashing_decoder(workplace / "site"))}) as env:
        result = job("compute_artifacts", *arguments(workplace), env=env)
        assert result.returncode == 1, result.stderr
        assert "error: A process that decodes ended 5 times at the same image (SIGKILL;" in result.stderr
        assert "Traceback" not in result.stderr
        kill.write_bytes(killed)
        must(job("compute_artifacts", *arguments(workplace), env=env))
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert summary["shards_committed"] == 5
    (rejected,) = pq.read_table(workplace / "run" / "rejected.parquet").to_pylist()
    assert (rejected["uri"], rejected["reason"]) == (str(crash), "crashed")
    assert rejected["detail"] == "the decoder ended by SIGSEGV"
