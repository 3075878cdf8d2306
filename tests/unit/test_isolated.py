"""Images that end the process that decodes them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from manifpt import isolated
from manifpt.decode import decode
from manifpt.errors import BadImage, RejectReason, WorkerError
from manifpt.isolated import IsolatedDecoder
from tests.helpers.crashes import CRASH, KILL, SPOIL, crashing_decoder
from tests.helpers.images import encoded, picture

GOOD = encoded(picture(seed=1), "PNG")
# Two parts of a large message: the first says how long it is.
HALF_AN_ANSWER = """
import os, signal
from multiprocessing.connection import Connection
send = Connection._send
def half(self, data, *arguments):
    if len(data) > 1 << 20:
        send(self, bytes(data[: 1 << 18]), *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, data, *arguments)
Connection._send = half
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(crashing_decoder(tmp_path / "site")))
    monkeypatch.setattr(isolated, "_PAUSE_S", 0.0)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_it_decodes_and_refuses_as_decode_does() -> None:
    before = children()
    with IsolatedDecoder() as isolated_decode:
        for data in (GOOD, encoded(picture(seed=2), "JPEG"), GOOD):
            image_hwc = isolated_decode(data)
            np.testing.assert_array_equal(image_hwc, decode(data), strict=True)
            assert image_hwc.flags.writeable
        for data in (b"", b"text", GOOD[: len(GOOD) // 2]):
            with pytest.raises(BadImage) as expected:
                decode(data)
            with pytest.raises(BadImage) as found:
                isolated_decode(data)
            assert found.value.args == expected.value.args
        assert len(children() - before) == 1
    assert children() == before


def test_without_an_image_no_process_starts() -> None:
    before = children()
    with IsolatedDecoder():
        assert children() == before


@pytest.mark.usefixtures("crashing")
def test_a_fault_is_the_images_and_the_next_one_is_decoded() -> None:
    before = children()
    with IsolatedDecoder() as isolated_decode:
        for _ in range(2):
            with pytest.raises(BadImage, match="the decoder ended by SIGSEGV") as found:
                isolated_decode(CRASH + GOOD)
            assert found.value.reason is RejectReason.CRASHED
            np.testing.assert_array_equal(isolated_decode(GOOD), decode(GOOD))
    assert children() == before


@pytest.mark.usefixtures("crashing")
def test_an_image_after_one_that_spoilt_the_process_is_decoded() -> None:
    with IsolatedDecoder() as isolated_decode:
        with pytest.raises(BadImage) as found:
            isolated_decode(SPOIL + GOOD)
        assert found.value.reason is RejectReason.NOT_AN_IMAGE
        np.testing.assert_array_equal(isolated_decode(GOOD), decode(GOOD))


@pytest.mark.usefixtures("crashing")
def test_what_kills_from_outside_is_not_the_images() -> None:
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match=r"ended 5 times .*\(SIGKILL;"):
        isolated_decode(KILL + GOOD)


@pytest.mark.parametrize("fault", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "import os; os._exit(7)"])
def test_what_ends_it_before_it_is_ready_is_not_the_images(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(fault)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(isolated, "_PAUSE_S", 0.0)
    before = children()
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match="SIGSEGV" if "SEGV" in fault else "7"):
        isolated_decode(GOOD)
    assert children() == before


def test_a_process_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/interpreter")
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match="No process that decodes"):
        isolated_decode(GOOD)


def test_death_within_an_answer_is_death(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of a process that is killed for its memory while it writes pixels."""
    monkeypatch.setattr(isolated, "_PAUSE_S", 0.0)
    (tmp_path / "sitecustomize.py").write_text(HALF_AN_ANSWER)
    monkeypatch.syspath_prepend(str(tmp_path))
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match="SIGKILL"):
        isolated_decode(encoded(picture(1024, seed=1), "PNG"))


def test_an_answer_that_nobody_waited_for_is_not_the_next_images(monkeypatch: pytest.MonkeyPatch) -> None:
    other = encoded(picture(seed=2), "PNG")
    before = children()
    with IsolatedDecoder() as isolated_decode:
        with monkeypatch.context() as patch:
            patch.setattr(isolated.json, "loads", interrupted)
            with pytest.raises(KeyboardInterrupt):
                isolated_decode(GOOD)
        assert children() == before
        np.testing.assert_array_equal(isolated_decode(other), decode(other))


def interrupted(text: bytes) -> None:
    raise KeyboardInterrupt
