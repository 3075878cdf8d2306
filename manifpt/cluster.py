"""Joining a Ray cluster, and what it has."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator

import ray
import ray._private.utils

from manifpt.errors import ConfigError, WorkerError
from manifpt.log import event

__all__ = ["NODE_TO_COME_CPUS", "cluster", "connect", "environment", "is_there", "on_one_node"]

NODE_TO_COME_CPUS = 4.0  # of a node that an autoscaler has yet to bring

# Of a Ray that starts here, in ms. Its own second is less than a shard takes to embed on CPUs, so that each shard would
# pay for new processes to decode and commit it: 4 CPU seconds of imports, of the 27 s of ResNet50 on two cores 2.
_IDLE_WORKERS_LIVE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` or of this machine, or starts one here that ends with this process.

    Raises:
        ConfigError: nobody answers at `RAY_ADDRESS`.
        WorkerError: Ray's own processes did not start here in time.
    """
    if not ray.is_initialized():
        address = _address()
        os.environ.setdefault(*_IDLE_WORKERS_LIVE)
        with _held_stderr(), _kept_sigterm(), _told_slow():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)


def is_there() -> bool:
    """Whether `connect` would join a cluster that others started; asks nobody who doesn't answer at once."""
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked and asked != "auto":
        return asked != "local"
    recorded = ray._private.utils.read_ray_address()
    return bool(recorded) and _answers(recorded)


def _address() -> str | None:
    """What to join; None: what Ray finds. Asked here first, since Ray waits for a dead cluster for minutes."""
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked and asked not in ("auto", "local") and "://" not in asked:
        if not _answers(asked):
            raise ConfigError(
                f"No Ray cluster answers at RAY_ADDRESS={asked}; correct it, or unset it to start one here."
            )
        return None
    recorded = ray._private.utils.read_ray_address()  # of the last `ray start`, which a killed head leaves behind
    if not asked and recorded and not _answers(recorded):
        event(
            "ray_cluster_gone", address=recorded, hint="the last `ray start` of this machine has ended; starting anew"
        )
        return "local"
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray puts handlers of its own, that end the process at once."""
    if threading.current_thread() is not threading.main_thread():  # where Ray doesn't either
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _told_slow() -> Iterator[None]:
    """Ray gives its processes 30 s, and no setting changes that; what it raises has no type of its own."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise WorkerError(
            "Ray did not start here within the 30 s that it allows. Is the machine busy, or its memory or the disk of "
            "/tmp full? The same command can succeed now: its files have been read once."
        ) from error


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Keeps the C++ core's greeting lines back, and shows them only where joining fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def cluster() -> tuple[float, float, int]:
    """CPUs, GPUs and nodes there are now; those of one small node where an autoscaler has yet to bring the first."""
    resources = ray.cluster_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return resources.get("CPU") or NODE_TO_COME_CPUS, resources.get("GPU", 0), max(1, nodes)


def on_one_node() -> bool:
    """Whether all of the cluster is this machine, so that a plain path means the same everywhere."""
    return sum(1 for node in ray.nodes() if node["Alive"]) <= 1


# Where S3 is follows the driver to the workers. Who we are does not: secrets come from each node's own role or files.
_S3_PLACE = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_WEIGHTS = "MANIFPT_WEIGHTS"  # too, where it is a place that all nodes have


def environment() -> dict[str, str]:
    """Where S3 is, and the weights there, for workers."""
    weights = (_WEIGHTS,) if os.environ.get(_WEIGHTS, "").startswith("s3://") else ()
    return {name: os.environ[name] for name in (*_S3_PLACE, *weights) if name in os.environ}
