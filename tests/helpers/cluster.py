"""A Ray head node of the test's own, on loopback, with token authentication; and jobs as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.s3 import free_ports

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@contextlib.contextmanager
def ray_head(
    num_cpus: int = 4,
    dashboard: bool = False,
    node_env: Mapping[str, str] | None = None,
    pools: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, str]]:
    """Starts a head node and yields the environment that joins it.

    `node_env` is the node's own, such as its S3 credentials: a job does not bring them. `pools` are node types of an
    autoscaler, which starts their nodes on this machine.
    """
    folder = tempfile.mkdtemp(prefix="mf-")  # short: the paths of sockets have a limit
    port, dashboard_port, client_port, metrics_port, agent_port, agent_grpc_port = free_ports(6)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # what activating the venv does
    }
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={num_cpus}",
        f"--temp-dir={folder}", f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}", "--disable-usage-stats",
        f"--metrics-export-port={metrics_port}", f"--dashboard-agent-listen-port={agent_port}",
        f"--dashboard-agent-grpc-port={agent_grpc_port}", "--object-store-memory=1000000000",
    ]  # fmt: skip
    if pools:
        config = Path(folder, "autoscaling.yaml")
        config.write_text(json.dumps(_autoscaling(environment["RAY_ADDRESS"], pools)))
        command.append(f"--autoscaling-config={config}")
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for: on loopback alone
        node_env = {**(node_env or {}), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    outer = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    inner = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    try:
        with running(command, {**outer, **inner, **(node_env or {})}, Path(folder)):
            yield {
                **environment,
                "TEST_DASHBOARD": f"http://127.0.0.1:{dashboard_port}",
                "TEST_METRICS": f"http://127.0.0.1:{metrics_port}/metrics",
                "TEST_FOLDER": folder,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _autoscaling(address: str, pools: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `ray up` reads, for Ray's provider of nodes that are processes here."""
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    return {
        "cluster_name": "test",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "disable_node_updaters": True,  # nobody logs in to set up what runs already
            "disable_launch_config_check": True,
            "worker_liveness_check": False,
            "use_node_id_as_ip": True,  # all have this machine's
        },
        "available_node_types": head | {name: {"node_config": {}, "min_workers": 0, **pools[name]} for name in pools},
        "head_node_type": "ray.head.default",
        "max_workers": sum(pool["max_workers"] for pool in pools.values()),
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "worker_setup_commands": [],
        "worker_start_ray_commands": [],
    }


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Iterator[psutil.Process]:
    """A `ray start --block`, from when it is up; then ended with all that it started.

    Ray gives its own processes 30 s, whatever one asks for. Two slow cores need 15, and more while files are read for
    the first time: what did not come up is started again.
    """
    log = folder / "head.log"
    process = None
    try:
        for left in (2, 1, 0):
            log.unlink(missing_ok=True)
            with log.open("wb") as file:
                process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file, cwd=folder)
            if _is_up(process, log):
                break
            print(said := f"Ray did not come up.\n{_logs(folder)}", file=sys.stderr)
            _end(process)
            if not left:
                raise RuntimeError(said)
        assert process is not None
        yield psutil.Process(process.pid)
    finally:
        if process is not None:
            _end(process)


def _is_up(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits until it is, or has ended."""
    for _ in range(480):  # two minutes, for a machine that is busy
        if process.poll() is not None:
            return False
        if "Ray runtime started" in log.read_text(errors="replace"):
            return True
        time.sleep(0.25)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    process.kill()
    for left in descendants:  # by id: some of them name neither the folder nor their head
        with contextlib.suppress(psutil.Error):
            left.kill()
    process.wait(10)


def _logs(folder: Path) -> str:
    """Of the node's start, and of the processes that it waits for."""
    names = ("raylet.out", "raylet.err", "gcs_server.out", "dashboard_agent.log", "runtime_env_agent.log")
    own = [one for name in names for one in sorted(folder.rglob(f"session_latest/logs/{name}"))]
    return "\n".join(f"{one.name}: {one.read_text(errors='replace')[-2000:]}" for one in (folder / "head.log", *own))


def workers_of(env: Mapping[str, str], titles: tuple[str, ...] = ("MapBatches", "MapWorker")) -> list[psutil.Process]:
    """This head's processes that run a stage now; Ray writes the stage into the title of the process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and any(part in title for part in titles):
                parent = process.parent()
                if parent is not None and any(env["TEST_FOLDER"] in part for part in parent.cmdline()):
                    found.append(process)
    return found


def job(
    name: str, *arguments: object, env: Mapping[str, str] | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs jobs/NAME.py to its end."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@contextlib.contextmanager
def started(
    name: str, *arguments: object, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """jobs/NAME.py while it runs; killed if it still does at the end."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
    with open(log or os.devnull, "ab") as file:
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def commits(run: Path) -> dict[str, bytes]:
    """Of a local run, by name."""
    folder = run / "commits"
    return {path.name: path.read_bytes() for path in folder.glob("*.json")} if folder.exists() else {}


def first_commits(run: Path, count: int, process: subprocess.Popen[bytes], timeout_s: float = 90) -> None:
    """Waits until some shards are done."""
    deadline = time.monotonic() + timeout_s
    while len(commits(run)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def must(result: subprocess.CompletedProcess[str]) -> str:
    """The standard output of a job that had to succeed."""
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout
