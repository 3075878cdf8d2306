"""A real S3 server (SeaweedFS, from a package) on a loopback port, and a proxy before it that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

KEY, SECRET, BUCKET = "test-key", "test-secret", "images"
STALL_S = 2.0


# Below those that Linux gives to outgoing connections: one of these would take a port between its choice and its use.
_PORTS = range(31000, 32700)


def free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            break
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


@contextlib.contextmanager
def s3_server(
    folder: Path, bucket: str = BUCKET, address: str = "127.0.0.1", within: Sequence[str] = ()
) -> Iterator[str]:
    """Starts a server over a folder and yields its endpoint; `within` is what a command of another host begins with."""
    names = ["s3", "master", "volume", "filer", "admin"]
    ports = iter(free_ports(2 * len(names)))
    flags = [f"-{name}.port{kind}={next(ports)}" for name in names for kind in ("", ".grpc")]
    s3_port = int(flags[0].rpartition("=")[2])
    command = [
        *within, str(Path(sys.executable).parent / "weed"), "mini", f"-dir={folder}", f"-ip={address}",
        f"-ip.bind={address}",
        *flags, "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", f"-bucket={bucket}",
        "-volume.preStopSeconds=0",
    ]  # fmt: skip
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://{address}:{s3_port}"
    try:
        waiting = [*within, sys.executable, "-m", "tests.helpers.s3", endpoint]
        if subprocess.run(waiting, cwd=Path(__file__).parents[2], timeout=120).returncode or process.poll() is not None:
            raise RuntimeError(
                f"SeaweedFS did not come up: {(folder / 'weed.log').read_text(errors='replace')[-2000:]}"
            )
        yield endpoint
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(endpoint: str) -> bool:
    """Whether a server answers, and writes, within half a minute."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    for _ in range(300):
        with contextlib.suppress(Exception):
            urllib.request.urlopen(f"{endpoint}/healthz", timeout=1)
            client.put_object(Bucket=BUCKET, Key="up", Body=b"")
            client.delete_object(Bucket=BUCKET, Key="up")
            return True
        time.sleep(0.1)
    return False


def environment(endpoint: str) -> dict[str, str]:
    """What a job needs to reach the server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


class Proxy(NamedTuple):
    """Stands before a server.

    Attributes:
        endpoint: its own.
        refused: requests that it answered with 503, `VERB path`.
        stalled: requests that it let wait.
    """

    endpoint: str
    refused: list[str]
    stalled: list[str]


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, answers some with 503 as a throttled S3 prefix does, and some keys with 403."""

    protocol_version = "HTTP/1.1"
    target: str
    share: float
    stalls: float
    said: Proxy
    forbidden: str
    random: random.Random

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.random.random() < self.share:
            self.said.refused.append(f"{self.command} {self.path}")
            answer = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self._answer(503, {"Content-Type": "application/xml"}, answer)
            return
        if self.random.random() < self.stalls:
            self.said.stalled.append(f"{self.command} {self.path}")
            time.sleep(STALL_S)
        if self.forbidden and self.forbidden in self.path:
            self._answer(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        connection = http.client.HTTPConnection(self.target, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
            connection.request(self.command, self.path, body=body, headers=headers)  # Host as signed by the client
            response = connection.getresponse()
            data = response.read()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in {"transfer-encoding", "connection"}}
            self._answer(response.status, kept, data)
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        lengths = {k.lower() for k in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in lengths and status not in {204, 304}:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed leaves its connection broken, which is not worth a line."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextlib.contextmanager
def flaky_proxy(
    endpoint: str, share: float, forbidden: str = "", seed: int = 0, stalls: float = 0.0
) -> Iterator[Proxy]:
    """A proxy that refuses a share of all requests with 503, and with 403 all whose path contains `forbidden`.

    Another share, `stalls`, waits for two seconds.
    """
    server = _Server(("127.0.0.1", 0), _Proxy)
    said = Proxy(f"http://127.0.0.1:{server.server_address[1]}", [], [])
    settings = {
        "target": endpoint.removeprefix("http://"),
        "share": share,
        "stalls": stalls,
        "said": said,
        "forbidden": forbidden,
        "random": random.Random(seed),
    }
    server.RequestHandlerClass = type("Handler", (_Proxy,), settings)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def objects(prefix: str, env: Mapping[str, str]) -> dict[str, bytes]:
    """What lies under a prefix of the bucket, by the rest of its key."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
    )  # fmt: skip
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return {key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


if __name__ == "__main__":  # on another host, whose network this process has
    sys.exit(0 if is_up(sys.argv[1]) else 1)
