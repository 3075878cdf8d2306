from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from manifpt.monitoring import lease
from manifpt.monitoring.lease import Taken, held

BEAT_S, DEAD_AFTER_S = 0.05, 0.4


def test_of_two_scans_one_works_and_the_other_says_so(tmp_path: Path) -> None:
    again = held(str(tmp_path), BEAT_S, DEAD_AFTER_S)
    with held(str(tmp_path), BEAT_S, DEAD_AFTER_S), pytest.raises(Taken, match="Another scan works"), again:
        pass


def test_a_lease_that_was_let_go_is_free_at_once(tmp_path: Path) -> None:
    with held(str(tmp_path), BEAT_S, 30):
        pass
    begin = time.monotonic()
    with held(str(tmp_path), BEAT_S, 30) as second:
        assert second.number == 2
    assert time.monotonic() - begin < 5


def test_a_holder_that_beats_no_more_is_followed_by_another_and_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(str(tmp_path), 60, 60) as first:  # its first beat never comes
        assert first.is_newest()
        with held(str(tmp_path), BEAT_S, DEAD_AFTER_S) as second:
            assert second.is_newest()
            assert not first.is_newest()
    with held(str(tmp_path), BEAT_S, DEAD_AFTER_S) as third:  # what the first leaves at its end is not in the way
        assert third.number == 3


def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with held(str(tmp_path), BEAT_S, DEAD_AFTER_S), pytest.raises(Taken), held(str(tmp_path), BEAT_S, DEAD_AFTER_S):
        pass
    with held(str(tmp_path), BEAT_S, DEAD_AFTER_S):
        pass


def test_of_many_that_start_together_exactly_one_works(tmp_path: Path) -> None:
    working, taken, together = [], [], threading.Barrier(8)

    def one() -> None:
        together.wait()
        try:
            with held(str(tmp_path), BEAT_S, 5) as mine:
                working.append(mine.number)
                time.sleep(0.5)
        except Taken:
            taken.append(1)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(working), len(taken)) == (1, 7)


def test_a_damaged_lease_is_free(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000007.json").write_bytes(b'{"be')
    with held(str(tmp_path), BEAT_S, DEAD_AFTER_S) as next_one:
        assert next_one.number == 8
        document = json.loads((tmp_path / "lease" / "00000008.json").read_bytes())
        assert document["free"] is False
    assert lease.BEAT_S * 3 < lease.DEAD_AFTER_S, "a beat or two may be lost"
