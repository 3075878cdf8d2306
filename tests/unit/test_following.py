from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from manifpt import following
from manifpt.following import followed, json_lines, write_json_lines


def test_lines_that_a_resumed_training_writes_again_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies in a pass leaves steps that the next one drops: the file shrinks, and grows again."""
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    uri, told = str(tmp_path / "metrics.jsonl"), list[dict[str, Any]]()
    first = [{"epoch": 0}, {"epoch": 1, "step": 10}, {"epoch": 1}, {"epoch": 2, "step": 10}, {"epoch": 2, "step": 20}]
    again = [*first[:3], {"epoch": 2, "step": 15}, {"epoch": 2, "step": 25}, {"epoch": 2}]
    write_json_lines(uri, first[:2])
    with followed(uri, lambda line, _: told.append(line)):
        for lines in (first, first[:3], again[:4], again):
            write_json_lines(uri, lines)
            time.sleep(0.1)
    assert told == [*first[2:], {"epoch": 2, "step": 25}, {"epoch": 2}], "and what was there before is not told"
    assert json_lines(uri) == again
    assert json_lines(str(tmp_path / "none.jsonl")) == []


def test_steps_without_epochs_are_told_too(tmp_path: Path) -> None:
    uri, told = str(tmp_path / "metrics.jsonl"), list[int]()
    with followed(uri, lambda line, all_lines: told.append(line["step"] * 10 + len(all_lines))):
        write_json_lines(uri, [{"step": 1}, {"step": 2}])
    assert told == [12, 22]
