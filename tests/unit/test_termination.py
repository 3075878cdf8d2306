from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from manifpt import termination
from manifpt.config import run_command
from manifpt.log import Progress
from manifpt.termination import grace


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Every test leaves the handlers that it found."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def test_sigterm_ends_a_command_with_143_and_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command() -> None:
        try:
            terminate()
        finally:
            cleaned.append(True)

    assert run_command(command) == 143
    assert cleaned
    assert 'terminated hint="the same command goes on from here"' in capsys.readouterr().err


def test_what_runs_has_its_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "_GRACE_S", 0.3)
    done = []

    def work() -> None:
        with grace():
            terminate()
            while len(done) < 500:
                time.sleep(0.01)
                done.append(True)

    begin = time.monotonic()
    assert run_command(work) == 143
    assert 0.25 < time.monotonic() - begin < 2
    assert 5 < len(done) < 500


def test_work_that_ends_within_its_grace_is_not_followed_by_more() -> None:
    def work() -> None:
        with grace():
            terminate()
        pytest.fail("it went on")

    begin = time.monotonic()
    assert run_command(work) == 143
    assert time.monotonic() - begin < 1


def test_after_its_grace_sigterm_is_immediate_again() -> None:
    def work() -> None:
        with grace():
            pass
        terminate()
        pytest.fail("it went on")

    assert run_command(work) == 143


def test_a_callers_own_handler_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with grace():
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen


@pytest.mark.parametrize(("done", "lines"), [(3, 1), (10, 0)])
def test_progress_that_is_broken_off_says_where_it_stands(
    done: int, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(10, 0, 0)
    progress.add(done, 1)
    capsys.readouterr()
    progress.close()
    told = capsys.readouterr().err
    assert told.count(f" progress images={done} total=10 ") == lines
