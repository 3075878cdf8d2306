from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt import sorting
from manifpt.monitoring import inventory
from manifpt.monitoring.inventory import LISTED, changes, known, listing, merge_inventory, write_inventory

# What a bucket holds at the times of its scans: version by key.
BUCKETS = st.lists(st.dictionaries(st.text("abc/", min_size=1, max_size=3), st.integers(0, 2)), max_size=7)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Tables, runs and numbers of files so small that few objects go through every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_RUN_ROWS", 8)
        patch.setattr(sorting, "_SAMPLE_EVERY", 2)
        patch.setattr(inventory, "_ROWS", 4)
        patch.setattr(inventory, "_MOST_FILES", 3)
        yield


def listed(bucket: dict[str, int]) -> Iterator[pa.Table]:
    rows = sorted(bucket.items())
    for start in range(0, len(rows), 5):
        part = rows[start : start + 5]
        columns = [[key for key, _ in part], [1] * len(part), [str(version) for _, version in part]]
        yield pa.table(columns, schema=LISTED)


@settings(max_examples=60, deadline=None)
@given(BUCKETS)
def test_every_scan_finds_what_is_new_changed_and_gone_and_nothing_else(buckets: list[dict[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as output:
        before: dict[str, int] = {}
        for number, bucket in enumerate(buckets, start=1):
            steps = list(changes(listed(bucket), known(output)))
            new = [uri for step in steps for uri in step.new["uri"].to_pylist()]
            changed = [uri for step in steps for uri in step.changed["uri"].to_pylist()]
            gone = [uri for step in steps for uri in step.gone["uri"].to_pylist()]
            assert new == sorted(set(bucket) - set(before))
            assert changed == sorted(key for key in set(bucket) & set(before) if bucket[key] != before[key])
            assert gone == sorted(set(before) - set(bucket))
            rows = sorted([(key, True) for key in new + changed] + [(key, False) for key in gone])
            table = pa.table(
                {
                    "uri": pa.array([key for key, _ in rows], pa.string()),
                    "etag": pa.array([str(bucket.get(key, 0)) for key, _ in rows], pa.string()),
                    "present": pa.array([present for _, present in rows], pa.bool_()),
                }
            )
            write_inventory(output, number, [table])
            merge_inventory(output)
            before = bucket
            seen = [row for step in known(output) for row in step.to_pylist()]
            rows = [{"uri": key, "etag": str(version), "again": False} for key, version in sorted(bucket.items())]
            assert seen == rows
        names = {path.name for path in Path(output, "inventory").glob("*")}
        assert len(names) <= 3, "deltas are merged into a base, and then taken away"


def test_an_object_that_two_prefixes_list_is_seen_once(tmp_path: Path) -> None:
    for name in ("a/b/1.png", "a/2.png", "c/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = listing([str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path)], Counter())
    uris = [uri for table in found for uri in table["uri"].to_pylist()]
    assert uris == sorted(str(tmp_path / name) for name in ("a/b/1.png", "a/2.png", "c/3.png"))


def test_an_empty_prefix_lists_nothing_and_is_no_error(tmp_path: Path) -> None:
    assert list(listing([str(tmp_path / "not-yet")], Counter())) == []


def test_what_could_not_be_read_waits_until_it_can_or_is_another_object(tmp_path: Path) -> None:
    output = str(tmp_path)
    keys = pa.array(["a", "b", "c"])
    columns = {"uri": keys, "etag": ["1", "1", "1"], "present": [True] * 3, "again": [False, True, True]}
    write_inventory(output, 1, [pa.table(columns)])
    for bucket, expected in (
        ({"a": 1, "b": 1, "c": 1}, ([], [], [], ["b", "c"])),
        ({"a": 2, "b": 2}, (["b"], ["a"], [], [])),
        ({"b": 1, "d": 1}, (["d"], [], ["a"], ["b"])),
    ):
        steps = list(changes(listed(bucket), known(output)))
        for name, keys_of in zip(("new", "changed", "gone", "waiting"), expected, strict=True):
            assert [uri for step in steps for uri in getattr(step, name)["uri"].to_pylist()] == keys_of
    path = tmp_path / "inventory" / "00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["again"]), path)
    assert [row["again"] for table in known(output) for row in table.to_pylist()] == [False] * 3, "an older inventory"
