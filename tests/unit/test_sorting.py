from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt import sorting
from manifpt.errors import ConfigError
from manifpt.sorting import aligned, sorted_tables

KEYS = st.lists(st.text("ab/é\U0001f600", max_size=3), max_size=40)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Runs so small that few rows go through every step of a merge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_RUN_ROWS", 8)
        patch.setattr(sorting, "_SAMPLE_EVERY", 2)
        yield


def batches(keys: list[str], size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        yield pa.record_batch({"key": part, "place": list(range(start, start + len(part)))})


@settings(deadline=None)
@given(KEYS, st.integers(1, 9))
def test_every_row_comes_once_and_in_the_order_of_its_utf_8_bytes(keys: list[str], size: int) -> None:
    rows = [row for table in sorted_tables(batches(keys, size), "key") for row in table.to_pylist()]
    assert sorted(row["place"] for row in rows) == list(range(len(keys)))
    assert [row["key"] for row in rows] == sorted(keys, key=lambda key: key.encode())


def test_values_that_no_one_type_has_are_told() -> None:
    parts = [pa.record_batch({"key": ["a"], "kept": [2**53 + 1]}), pa.record_batch({"key": ["b"], "kept": [0.5]})]
    with pytest.raises(ConfigError, match="no one type"):
        list(sorted_tables(parts, "key"))


def stream(keys: list[str], size: int) -> Iterator[pa.Table]:
    for start in range(0, len(keys), size):
        yield pa.table({"key": pa.array(keys[start : start + size], pa.string())})


@settings(deadline=None)
@given(st.lists(st.tuples(KEYS, st.integers(1, 7)), min_size=1, max_size=4))
def test_streams_walk_together_and_a_key_is_never_split_over_steps(inputs: list[tuple[list[str], int]]) -> None:
    ordered = [sorted(keys) for keys, _ in inputs]
    seen: list[list[str]] = [[] for _ in inputs]
    last = None
    for step in aligned([stream(keys, size) for keys, (_, size) in zip(ordered, inputs, strict=True)], "key"):
        found = [[] if table is None else table["key"].to_pylist() for table in step]
        keys = [key for of_stream in found for key in of_stream]
        assert keys, "a step without rows"
        assert last is None or min(keys) > last, "a key came in two steps"
        last = max(keys)
        for of_stream, some in zip(seen, found, strict=True):
            of_stream.extend(some)
    assert seen == ordered
