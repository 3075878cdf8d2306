"""A network that fails: a worker is cut off for a minute, then another for good, while a run writes to S3."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.conftest import Workplace
from tests.helpers.cluster import RAY, ROOT, must, running
from tests.helpers.hosts import Hosts, hosts, needs_namespaces
from tests.helpers.s3 import BUCKET, environment, s3_server

CUT_S = 60
GCS = 6379  # on a host of its own, no port is taken


@contextlib.contextmanager
def ray_on(place: Hosts, name: str, env: Mapping[str, str], cpus: int, folder: Path, head: str = "") -> Iterator[None]:
    """A node of a host: the head, or a worker of one."""
    join = [f"--address={place.address(head)}:{GCS}"] if head else ["--head", f"--port={GCS}"]
    local = [] if head else [f"--temp-dir={place.folder}", "--include-dashboard=false", "--disable-usage-stats"]
    command = [
        RAY, "start", "--block", *join, *local, f"--node-ip-address={place.address(name)}", f"--num-cpus={cpus}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    folder.mkdir()
    outer = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with running(place.on(name, *command), {**outer, **env}, folder):
        yield


def on(place: Hosts, name: str, env: Mapping[str, str], code: str, *arguments: object) -> str:
    """What a line of Python prints on a host."""
    command = place.on(name, sys.executable, "-c", code, *map(str, arguments))
    return must(subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120))


UP = "import s3fs, sys; s3fs.S3FileSystem().put(sys.argv[1], sys.argv[2], recursive=True)"
DOWN = "import s3fs, sys; s3fs.S3FileSystem().get(sys.argv[1], sys.argv[2], recursive=True)"
COUNT = "import s3fs, sys; print(len(s3fs.S3FileSystem().glob(sys.argv[1])))"


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_is_cut_off_for_a_minute_and_another_for_good(workplace: Workplace, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(hosts("head", "one", "two", "s3"))
        endpoint = stack.enter_context(s3_server(tmp_path / "s3", address=place.address("s3"), within=place.on("s3")))
        env = {**environment(endpoint), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        on(place, "head", env, UP, workplace.folder / "reference", f"{BUCKET}/reference")
        stack.enter_context(ray_on(place, "head", env, 1, tmp_path / "head"))
        workers = stack.enter_context(contextlib.ExitStack())
        for name in ("one", "two"):
            workers.enter_context(ray_on(place, name, env, 2, tmp_path / name, head="head"))

        arguments = ("--manifest", workplace.folder / "many.parquet", "--reference", f"s3://{BUCKET}/reference",
                     "--shard-rows", workplace.shard_rows, "--output", f"s3://{BUCKET}/run")  # fmt: skip
        command = place.on("head", sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), *map(str, arguments))
        address = {"RAY_ADDRESS": f"{place.address('head')}:{GCS}"}
        with log.open("wb") as file:
            job = subprocess.Popen(command, env={**os.environ, **env, **address}, stdout=file, stderr=file)
        stack.callback(job.kill)

        def done() -> int:
            return int(on(place, "head", env, COUNT, f"{BUCKET}/run/commits/*.json"))

        def wait_for(shards: int) -> int:
            deadline = time.monotonic() + 120
            while (found := done()) < shards and job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
            return found

        wait_for(workplace.shards // 8)
        place.cut("one")
        before, begin = done(), time.monotonic()
        time.sleep(CUT_S)
        place.join("one")
        workers.enter_context(ray_on(place, "one", env, 2, tmp_path / "one-again", head="head"))  # as operators do
        assert job.poll() is None and done() < workplace.shards, f"too short to show it: {log.read_text()}"
        print(f"{done() - before} shards in the {time.monotonic() - begin:.0f} s without it")
        place.cut("two")
        assert job.wait(600) == 0, log.read_text()
        on(place, "head", env, DOWN, f"{BUCKET}/run", workplace.folder / "hosts")
        assert "node" in log.read_text()
    workplace.check_same("hosts")
