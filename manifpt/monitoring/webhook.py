"""Alerts to a webhook: https only, a bounded time, and never a word of where to.

The URL is the secret (Slack's, Teams'), so the config only names the environment variable or the file that holds it,
and no log line or error says more of a failure than its kind.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.monitoring.alerts import Alert

__all__ = ["Webhook", "webhook_of"]

_TIMEOUT_S = (5.0, 10.0)  # to connect, and between two bytes of the answer
_DEADLINE_S = 60.0  # for everything: an endpoint can send a byte now and then, forever
_RETRIES = 4
_BACKOFF_S = 1.0  # doubled with each retry, and up to as much again at random


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where alerts go; made by `webhook_of`."""

    url: str = field(repr=False)

    def deliver(self, alerts: Sequence[Alert]) -> bool:
        """Posts a window's alerts as one JSON object: `text`, a line an alert, as chats show it, and `alerts`.

        Tries again after a connection error, 429 and 5xx; follows no redirect. Never raises: what fails is an event.

        Returns:
            Whether the endpoint took them.
        """
        if not alerts:
            return True
        outcome = ["no_answer_in_time"]
        document = {
            "text": "\n".join(f"[{alert.severity}] {alert.window}: {alert.sentence}" for alert in alerts),
            "alerts": [{name: getattr(alert, name) for name in Alert.__slots__} for alert in alerts],
        }
        thread = threading.Thread(target=lambda: outcome.append(_outcome(self.url, document)), daemon=True)
        thread.start()
        thread.join(_DEADLINE_S)
        if outcome[-1] != "delivered":
            event("webhook_failed", alerts=len(alerts), why=outcome[-1], hint="they are in alerts.jsonl")
        return outcome[-1] == "delivered"


def webhook_of(section: Any) -> Webhook | None:
    """From the config's `{url_env: NAME}` or `{url_file: PATH}`; None: no webhook.

    Raises:
        ConfigError: neither, both, nothing there, or a URL that isn't https.
    """
    if section is None:
        return None
    if not isinstance(section, dict) or len(section) != 1 or not set(section) <= {"url_env", "url_file"}:
        raise ConfigError(
            "alerts: webhook is {url_env: NAME} or {url_file: PATH}, which hold the URL; the config must not."
        )
    ((kind, name),) = section.items()
    url = _read(kind, str(name))
    where = f"the {'environment variable' if kind == 'url_env' else 'file'} {name}"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        is_good = False
    if not is_good or " " in url:
        raise ConfigError(f"alerts: what {where} holds is no https:// URL; alerts are sent over https alone.")
    return Webhook(url)


def _read(kind: str, name: str) -> str:
    if "://" in name:  # which nobody else may read, and a log would show
        raise ConfigError(f"alerts: webhook's {kind} names where the URL is, and must not be the URL itself.")
    if kind == "url_env":
        if not os.environ.get(name):
            raise ConfigError(f"alerts: the environment variable {name} of the webhook isn't set; set it to the URL.")
        return os.environ[name].strip()
    try:
        return Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"alerts: can't read the webhook's url_file {name} ({type(error).__name__}).") from error


class _OtherThreads(logging.Filter):
    """Drops this thread's records: urllib3 logs the path of what it tries again as a warning."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


def _outcome(url: str, document: dict[str, Any]) -> str:
    """`delivered`, or why not, without what the answer or an error says: both can hold the URL."""
    retry = Retry(
        _RETRIES, redirect=0, backoff_factor=_BACKOFF_S, backoff_jitter=_BACKOFF_S, allowed_methods={"POST"},
        status_forcelist=[429, *range(500, 600)], respect_retry_after_header=False, raise_on_status=False,
    )  # fmt: skip
    quiet = _OtherThreads()
    loggers = [
        logging.getLogger(name) for name in ("urllib3.connectionpool", "urllib3.util.retry", "urllib3.connection")
    ]
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        with requests.Session() as session:
            session.mount("https://", HTTPAdapter(max_retries=retry))
            # requests asks REQUESTS_CA_BUNDLE first; everything else here trusts what OpenSSL's variable names.
            session.verify = os.environ.get("SSL_CERT_FILE") or True
            answer = session.post(url, json=document, timeout=_TIMEOUT_S, allow_redirects=False, stream=True)
        if 300 <= answer.status_code < 400:
            return "redirected"
        return "delivered" if answer.ok else f"status_{answer.status_code}"
    except Exception as error:  # whatever it is, the scan goes on
        return type(error).__name__
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)
