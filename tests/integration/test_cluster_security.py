"""A head that is started as cluster/README.md says: what listens where, and what answers without its token."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from tests.helpers.cluster import RAY, ROOT, running
from tests.helpers.s3 import free_ports

README = (ROOT / "cluster" / "README.md").read_text()
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
GRPC = {  # of each port, a call that does something
    6379: "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    6380: "/ray.rpc.NodeManagerService/GetNodeStats",
    6381: "/ray.rpc.ObjectManagerService/Pull",
    6383: "/ray.rpc.ReporterService/GetTraceback",
    10001: "/ray.rpc.RayletDriver/KVList",
}


@dataclass(frozen=True)
class Head:
    """A head whose ports are others than the README's, since a test machine's may be taken."""

    process: psutil.Process
    environment: Mapping[str, str]  # of who has the token
    token: str
    port_of: Mapping[int, int]  # by that of the README
    workers: range

    def url(self, port: int, path: str) -> str:
        return f"http://127.0.0.1:{self.port_of[port]}{path}"

    def stranger(self, tmp_path: Path) -> dict[str, str]:
        """Another user's environment."""
        return {**self.environment, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}


def documented_ports() -> set[int]:
    """Of the README's table, but for the workers'."""
    cells = re.findall(r"^\| ([\d, ]+) \|", README, flags=re.MULTILINE)
    return {int(port) for cell in cells for port in cell.split(",")}


def documented_lines() -> tuple[dict[str, str], str, list[str]]:
    """The exports, the line that makes a token, and the `ray start` of "One machine"."""
    block = README.split("## One machine")[1].split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    lines = {line.split()[0]: line for line in block.splitlines()}
    exports = dict(word.split("=", 1) for word in shlex.split(lines["export"], comments=True)[1:])
    start = next(line for line in block.splitlines() if line.startswith("ray start"))
    return exports, lines["(umask"], shlex.split(start)[1:]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    exports, make_token, arguments = documented_lines()
    port_of = dict(zip(sorted(documented_ports()), free_ports(len(documented_ports())), strict=True))
    first = 21000 + os.getpid() % 100 * 100
    workers = range(first, first + 100)
    renamed = {str(port): str(free) for port, free in port_of.items()} | {"20000": str(first), "20999": str(first + 99)}
    arguments = [re.sub(r"=(\d+)$", lambda found: f"={renamed[found[1]]}", one) for one in arguments]
    folder = Path(tempfile.mkdtemp(prefix="mf-"))  # short: the paths of sockets have a limit
    outer = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = {
        **outer, **exports, "HOME": str(folder), "PATH": f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}",
        "AUTOSCALER_METRIC_PORT": renamed["44217"], "DASHBOARD_METRIC_PORT": renamed["44227"],
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{renamed['8265']}",
    }  # fmt: skip
    subprocess.run(make_token, shell=True, env=environment, check=True)
    token = (folder / ".ray" / "auth_token").read_text().strip()
    here = ["--block", "--num-cpus=2", f"--temp-dir={folder}/t", "--object-store-memory=200000000"]
    try:
        with running([RAY, *arguments, *here], environment, folder) as process:
            yield Head(process, environment, token, port_of, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submitted(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", *arguments]
    return subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=120, check=False)


def answer(url: str, token: str | None = None, data: bytes | None = None) -> int:
    """The status of an HTTP answer."""
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def grpc_answer(port: int, method: str, token: str | None) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=20, metadata=[("authorization", f"Bearer {token}")] if token else [])
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_the_token_is_readable_by_its_owner_alone(head: Head) -> None:
    path = Path(head.environment["HOME"]) / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(head.token) >= 32


def test_a_submission_without_a_token_is_refused(head: Head, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    body = json.dumps({"entrypoint": f"touch {mark}"}).encode()
    assert answer(head.url(8265, "/api/jobs/"), data=body) == 401
    assert answer(head.url(8265, "/api/jobs/"), "0" * len(head.token), body) in (401, 403)
    result = submitted(head.stranger(tmp_path), "--", "touch", str(mark))
    assert result.returncode != 0
    assert "no authentication token was found" in result.stdout + result.stderr
    assert not mark.exists()


def test_with_a_token_it_runs_and_only_documented_ports_listen_on_loopback(head: Head, tmp_path: Path) -> None:
    """While a job runs, with a worker: idle heads have fewer ports."""
    script = tmp_path / "job.py"
    script.write_text(
        "import pathlib, ray, time\n"
        "ray.init()\n"
        "@ray.remote\n"
        "def wait(folder):\n"
        "    pathlib.Path(folder, 'started').touch()\n"
        "    while not pathlib.Path(folder, 'go').exists():\n"
        "        time.sleep(0.1)\n"
        f"ray.get(wait.remote({str(tmp_path)!r}))\n"
    )
    accepted = _submitted_once_there_is_an_agent(head, "--no-wait", "--submission-id=seen", "--", "python", str(script))
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    deadline = time.monotonic() + 90
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.2)
    listening = _listening(head.process)
    workers = {port for _, port in listening} & set(head.workers)
    unasked = {grpc_answer(port, "/ray.rpc.CoreWorkerService/PushTask", None) for port in workers}
    (tmp_path / "go").touch()
    readme_port = {free: port for port, free in head.port_of.items()}
    assert {address for address, _ in listening} <= LOOPBACK
    assert {port for _, port in listening if port not in readme_port} <= set(head.workers)
    assert {readme_port[port] for _, port in listening if port in readme_port} == documented_ports()
    assert unasked == {grpc.StatusCode.UNAUTHENTICATED}  # and there was at least one worker to ask


def _submitted_once_there_is_an_agent(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A node takes a moment to register."""
    for _ in range(20):
        result = submitted(head.environment, *arguments)
        if "No available agent" not in result.stderr:
            break
        time.sleep(1)
    return result


def _listening(process: psutil.Process) -> set[tuple[str, int]]:
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            found |= {(c.laddr.ip, c.laddr.port) for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("port", sorted(GRPC))
def test_no_internal_service_obeys_without_the_token(head: Head, port: int) -> None:
    refused = grpc.StatusCode.UNAUTHENTICATED
    assert grpc_answer(head.port_of[port], GRPC[port], None) == refused
    assert grpc_answer(head.port_of[port], GRPC[port], "0" * len(head.token)) == refused
    assert grpc_answer(head.port_of[port], GRPC[port], head.token) != refused


def test_agents_say_that_they_are_alive_and_nothing_else(head: Head) -> None:
    assert answer(head.url(6382, "/api/local_raylet_healthz")) == 200
    assert answer(head.url(6382, "/api/job_agent/jobs/"), data=b"{}") == 401
    assert answer(head.url(6384, "/get_or_create_runtime_env"), data=b"") == 401


@pytest.mark.parametrize("port", [8080, 44217, 44227])
def test_metrics_answer_anybody_who_gets_there(head: Head, port: int) -> None:
    """As the README warns: Ray's metrics know no token."""
    assert answer(head.url(port, "/metrics")) == 200
