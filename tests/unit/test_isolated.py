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
from tests.helpers.crashes import CRASH, KILL, crashing_decoder
from tests.helpers.images import encoded, picture

GOOD = encoded(picture(seed=1), "PNG")


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
def test_what_kills_from_outside_is_not_the_images() -> None:
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match=r"ended 3 times .*\(SIGKILL\)"):
        isolated_decode(KILL + GOOD)


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_PAUSE_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    large = bytes(1 << 20)  # more than a pipe holds: it breaks while it is written
    with IsolatedDecoder() as isolated_decode, pytest.raises(WorkerError, match="exit code 1"):
        isolated_decode(large)
