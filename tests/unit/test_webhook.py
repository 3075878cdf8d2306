"""The webhook against a real TLS server on loopback: what is sent, what is tried again, and what is never said."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifpt.errors import ConfigError
from manifpt.monitoring import webhook
from manifpt.monitoring.alerts import Alert
from manifpt.monitoring.webhook import Webhook, webhook_of

# pragma: allowlist nextline secret  # made up: what must never reach a log
SECRET = "T0SECRET"
ALERT = Alert("2026-01-31T12:00:00Z", "00017", "unknown-rose", "warning", {"share": 0.4}, "Unknown images rose.")


class _Handler(http.server.BaseHTTPRequestHandler):
    script: list[Any]
    seen: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body))
        step = self.script[min(len(self.seen), len(self.script)) - 1]
        if step == "drop":
            self.connection.close()
            return
        if step == "hang":
            time.sleep(3)
        status, headers = step if isinstance(step, tuple) else (200 if step == "hang" else step, {})
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this run alone: key and certificate in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "certificate.pem"]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem"


@contextlib.contextmanager
def served(script: list[Any], certificate: Path | None) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    seen: list[tuple[str, bytes]] = []
    handler = type("Handler", (_Handler,), {"script": script, "seen": seen})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_name("key.pem"))
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        scheme = "http" if certificate is None else "https"
        yield f"{scheme}://localhost:{server.server_address[1]}/hooks/{SECRET}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def trusted(certificate: Path, swift: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_BACKOFF_S", 0.02)
    monkeypatch.setenv("NO_PROXY", "localhost")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """All that was logged, at any level, or printed. Whatever a test does, none of it holds the secret."""
    caplog.set_level(logging.DEBUG)
    printed: list[str] = []

    def all_of_it() -> str:
        printed.extend(capfd.readouterr())
        return caplog.text + "".join(printed)

    yield all_of_it
    assert SECRET not in all_of_it()
    assert "localhost" not in all_of_it()


@pytest.mark.usefixtures("trusted")
def test_a_windows_alerts_are_one_post(certificate: Path) -> None:
    with served([200], certificate) as (url, seen):
        assert Webhook(url).deliver([ALERT, ALERT])
    ((path, body),) = seen
    assert path == f"/hooks/{SECRET}"
    sent = json.loads(body)
    assert sent["text"] == "\n".join(["[warning] 00017: Unknown images rose."] * 2)
    assert sent["alerts"][0] == json.loads(ALERT.line())


@pytest.mark.usefixtures("trusted")
def test_the_usual_variable_of_openssl_names_the_authority_too(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with served([200], certificate) as (url, _):
        assert Webhook(url).deliver([ALERT])


def test_a_server_that_nobody_vouches_for_gets_nothing(certificate: Path, said: Callable[[], str]) -> None:
    with served([200], certificate) as (url, seen):
        assert not Webhook(url).deliver([ALERT])
        assert not seen
    assert "webhook_failed alerts=1 why=SSLError" in said()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("bad", [500, 503, 429, "drop"])
def test_what_passes_is_tried_again(certificate: Path, bad: Any) -> None:
    with served([bad, bad, 200], certificate) as (url, seen):
        assert Webhook(url).deliver([ALERT])
    assert len(seen) == 3
    assert len({body for _, body in seen}) == 1


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(("bad", "why"), [(503, "status_503"), ("drop", "ConnectionError")])
def test_tries_are_bounded_and_a_failure_is_an_event(
    certificate: Path, bad: Any, why: str, said: Callable[[], str]
) -> None:
    with served([bad], certificate) as (url, seen):
        assert not Webhook(url).deliver([ALERT])
    assert len(seen) == 5
    assert f"webhook_failed alerts=1 why={why}" in said()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_not_tried_again(certificate: Path, status: int, said: Callable[[], str]) -> None:
    with served([status], certificate) as (url, seen):
        assert not Webhook(url).deliver([ALERT])
    assert len(seen) == 1
    assert f"why=status_{status}" in said()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("with_tls", [True, False])
def test_no_redirect_is_followed_to_another_host_or_without_tls(
    certificate: Path, status: int, with_tls: bool, said: Callable[[], str]
) -> None:
    with (
        served([200], certificate if with_tls else None) as (other, others),
        served([(status, {"Location": other})], certificate) as (url, seen),
    ):
        assert not Webhook(url).deliver([ALERT])
    assert len(seen) == 1
    assert not others
    assert "why=redirected" in said()


@pytest.mark.usefixtures("trusted")
def test_a_server_that_does_not_answer_is_given_up(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    monkeypatch.setattr(webhook, "_DEADLINE_S", 0.5)
    begin = time.monotonic()
    with served(["hang"], certificate) as (url, _):
        assert not Webhook(url).deliver([ALERT])
        assert time.monotonic() - begin < 2.5
    assert "why=no_answer_in_time" in said()


def test_nobody_there_is_no_error_of_the_scan(said: Callable[[], str]) -> None:
    assert not Webhook(f"https://localhost:1/{SECRET}").deliver([ALERT])
    assert "why=ConnectionError" in said()


def test_without_alerts_nothing_is_sent() -> None:
    assert Webhook(f"https://localhost:1/{SECRET}").deliver([])


def test_the_url_is_read_from_where_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://example.org/{SECRET}"
    monkeypatch.setenv("ALERT_URL", f" {url}\n")
    (tmp_path / "url").write_text(url + "\n")
    assert webhook_of(None) is None
    for section in ({"url_env": "ALERT_URL"}, {"url_file": str(tmp_path / "url")}):
        found = webhook_of(section)
        assert found == Webhook(url)
        assert SECRET not in repr(found)


@pytest.mark.parametrize(
    "url",
    [f"http://example.org/{SECRET}", f"ftp://example.org/{SECRET}", f"https:///{SECRET}", f"example.org/{SECRET}",
     f"https://[::1/{SECRET}", f"https://example.org:99999/{SECRET}", f"https://example.org/{SECRET} x",
     f"https://example.org/\x00{SECRET}"],
)  # fmt: skip
def test_what_is_no_https_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(url)
    with pytest.raises(ConfigError, match="https alone") as caught:
        webhook_of({"url_file": str(tmp_path / "url")})
    assert SECRET not in str(caught.value)
    assert "example.org" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("https://localhost/T0", "the config must not"),
        ({"url": "https://localhost/T0"}, "the config must not"),
        ({"url_env": "A", "url_file": "B"}, "the config must not"),
        ({}, "the config must not"),
        ({"url_env": "NO_SUCH_VARIABLE"}, "isn't set"),
        ({"url_file": "/no/such/file"}, "can't read"),
    ],
)
def test_a_webhook_that_is_none_is_refused(section: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        webhook_of(section)
