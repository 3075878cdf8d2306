from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifpt import cluster
from manifpt.errors import ConfigError, WorkerError


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` writes the address of its cluster."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@pytest.fixture
def listening() -> Iterator[str]:
    """An address that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address that does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_ended_without_notice_is_not_waited_for(
    recorded: Path, closed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray itself would ask a killed head's address for minutes, without a word."""
    recorded.write_text(closed)
    assert cluster._address() == "local"
    assert "ray_cluster_gone" in capsys.readouterr().err


def test_a_cluster_that_answers_is_joined(recorded: Path, listening: str) -> None:
    recorded.write_text(listening)
    assert cluster._address() is None


def test_no_cluster_was_ever_started(recorded: Path) -> None:
    assert not recorded.exists()
    assert cluster._address() is None


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1"])
def test_other_kinds_of_addresses_are_left_to_ray(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster._address() is None


def test_an_address_at_which_nobody_answers(recorded: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(ConfigError, match="No Ray cluster answers"):
        cluster._address()
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="No Ray cluster answers"):
        cluster._address()


def test_whether_there_is_a_cluster_to_join(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, listening: str, closed: str
) -> None:
    """A scan of nothing new tells its watermark there, and starts none for it."""
    assert not cluster.is_there()
    recorded.write_text(closed)
    assert not cluster.is_there()
    recorded.write_text(listening)
    assert cluster.is_there()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not cluster.is_there()
    monkeypatch.setenv("RAY_ADDRESS", closed)
    assert cluster.is_there(), "and whoever connects is told that nobody answers"


def test_a_machine_too_slow_for_ray_is_told_in_a_sentence(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(WorkerError, match="within the 30 s"):
        cluster.connect()


def test_weights_that_all_nodes_can_reach_are_named_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANIFPT_WEIGHTS", "/weights/of/this/machine")
    assert "MANIFPT_WEIGHTS" not in cluster.environment()
    monkeypatch.setenv("MANIFPT_WEIGHTS", "s3://bucket/weights")
    assert cluster.environment()["MANIFPT_WEIGHTS"] == "s3://bucket/weights"
