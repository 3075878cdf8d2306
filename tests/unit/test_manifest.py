from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt import manifest, sorting
from manifpt.errors import ConfigError
from manifpt.manifest import COLUMNS, Manifest, write_manifest

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=120, unique=True)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Runs, samples and row groups so small that few rows go through every step of a merge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "_RUN_ROWS", 16)
        patch.setattr(sorting, "_SAMPLE_EVERY", 4)
        patch.setattr(manifest, "_ROW_GROUP_ROWS", 8)
        yield


def batch(ids: list[str], **kept: Any) -> pa.RecordBatch:
    known = {"image_id": ids, "uri": [f"/{i}" for i in ids], "source": ["g"] * len(ids), "size_bytes": range(len(ids))}
    columns = {f.name: pa.array(known.get(f.name, [None] * len(ids)), f.type) for f in COLUMNS}
    return pa.RecordBatch.from_pydict({**columns, **{name: pa.array(values) for name, values in kept.items()}})


def pieces(ids: list[str], seed: int) -> Iterator[pa.RecordBatch]:
    """Batches of random sizes, empty ones too; the uri of each row tells its id."""
    dice, start = random.Random(seed), 0
    while start < len(ids):
        size = dice.choice([0, 1, 3, 15, 16, 17, 40])
        yield batch(ids[start : start + size])
        start += size


def write(path: Path, *batches: pa.RecordBatch) -> Manifest:
    write_manifest(batches, str(path))
    return Manifest(str(path))


class TestOrder:
    @settings(max_examples=80, deadline=None)
    @given(IDS, st.integers(0, 99))
    def test_sorted_whatever_the_input_order(self, ids: list[str], seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            uri = f"{folder}/m.parquet"
            assert write_manifest(pieces(ids, seed), uri) == len(ids)
            table = pq.read_table(uri)
            assert table["image_id"].to_pylist() == sorted(ids)
            assert table["uri"].to_pylist() == [f"/{i}" for i in sorted(ids)]  # rows stay whole
            first = Path(uri).read_bytes()
            random.Random(seed).shuffle(ids)
            write_manifest(pieces(ids, seed + 1), uri)
            # The rows' own numbers, which `batch` gives by place, differ; nothing else may.
            assert pq.read_table(uri).drop(["size_bytes"]).equals(table.drop(["size_bytes"]))
            assert pq.ParquetFile(uri).num_row_groups == pq.ParquetFile(pa.BufferReader(first)).num_row_groups

    @pytest.mark.parametrize("rows", [1, 8, 16, 17, 100, 1000])
    def test_same_rows_same_bytes(self, tmp_path: Path, rows: int) -> None:
        """Storage lists in any order, and a plan names the digest of its manifest."""
        found = set()
        for seed in range(5):
            ids = [f"g/{n:06}.png" for n in range(rows)]
            random.Random(seed).shuffle(ids)
            parts = []
            for part in pieces(ids, seed):
                sizes = pa.array([int(i[2:8]) for i in part["image_id"].to_pylist()], pa.int64())
                notes = pa.array([f"note {size}" for size in sizes.to_pylist()])
                columns = {name: part[name] for name in part.schema.names} | {"size_bytes": sizes, "note": notes}
                parts.append(pa.RecordBatch.from_pydict(columns))
            found.add(write(tmp_path / f"{seed}.parquet", *parts).digest())
        assert len(found) == 1

    def test_row_groups_are_of_one_size(self, tmp_path: Path) -> None:
        write(tmp_path / "m", *pieces([f"{n:05}" for n in range(100)], 3))
        meta = pq.ParquetFile(tmp_path / "m").metadata
        assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [8] * 12 + [4]

    def test_order_is_that_of_code_points(self, tmp_path: Path) -> None:
        ids = ["z", "Z", "ä", "\U0001f600", "\uffff", "a/b", "a.b", "a", "", "#9", "#10"] * 1
        assert write(tmp_path / "m", batch(ids)).read(0, 99)["image_id"].to_pylist() == sorted(ids)


class TestRead:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 110), st.integers(0, 110)), min_size=1, max_size=20))
    def test_ranges_are_those_of_a_list(self, rows: int, ranges: list[tuple[int, int]]) -> None:
        ids = [f"{n:05}" for n in range(rows)]
        with tempfile.TemporaryDirectory() as folder:
            found = write(Path(folder) / "m", *pieces(ids, rows))
            assert found.rows == rows
            for start, stop in ranges:
                if start <= stop:
                    assert found.read(start, stop)["image_id"].to_pylist() == ids[start:stop]
            assert found.read(0, rows, columns=["image_id"]).column_names == ["image_id"]
            found.close()

    def test_kept_columns(self, tmp_path: Path) -> None:
        found = write(tmp_path / "m", batch(["a"], group=[1], note=["x"]))
        assert found.kept_columns == ["group", "note"]
        assert found.schema.names[: len(COLUMNS)] == COLUMNS.names


class TestDuplicates:
    @pytest.mark.parametrize("apart", [1, 15, 16, 17, 40, 99])
    def test_found_wherever_they_are(self, tmp_path: Path, apart: int) -> None:
        ids = [f"{n:03}" for n in range(100)]
        ids.insert(apart, ids[0])
        with pytest.raises(ConfigError, match="'000'"):
            write(tmp_path / "m", *pieces(ids, 0))
        assert not (tmp_path / "m").exists()

    @pytest.mark.parametrize("which", range(0, 100, 7))
    def test_found_across_runs_and_parts(self, tmp_path: Path, which: int) -> None:
        ids = [f"{n:03}" for n in range(100)]
        with pytest.raises(ConfigError, match=f"'{which:03}'"):
            write(tmp_path / "m", *pieces(ids, 1), batch([f"{which:03}"]))

    def test_many_of_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="'a'"):
            write(tmp_path / "m", *[batch(["a"] * 16)] * 4)


class TestKeptColumns:
    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize(
        ("some", "more", "kind"),
        [
            ([None], [3], pa.int64()),
            ([None], ["x"], pa.string()),
            ([None], [True], pa.bool_()),
            ([None], [[1, 2]], pa.list_(pa.int64())),
            ([None], [{"a": 1}], pa.struct([("a", pa.int64())])),
            ([1], [0.5], pa.float64()),
        ],
    )
    def test_types_of_all_inputs_together(
        self, tmp_path: Path, some: list[Any], more: list[Any], kind: pa.DataType, order: int
    ) -> None:
        parts = [
            batch([f"a{n:02}" for n in range(20)], k=some * 20),
            batch([f"b{n:02}" for n in range(20)], k=more * 20),
        ]
        found = write(tmp_path / "m", *parts[::order])
        assert found.schema.field("k").type == kind
        assert found.read(0, 99)["k"].to_pylist() == some * 20 + more * 20

    def test_nothing_but_nulls(self, tmp_path: Path) -> None:
        assert write(tmp_path / "m", batch(["a"], k=[None])).read(0, 1)["k"].to_pylist() == [None]

    def test_two_types(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="two types"):
            write(tmp_path / "m", batch(["a"], k=[1]), batch(["b"], k=["x"]))

    def test_many_batches_of_one_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As from Parquet files of one row. Counting them must not take the square of their number."""
        monkeypatch.setattr(sorting, "_RUN_ROWS", 4096)
        parts = [batch([f"{n:05}"]) for n in range(4000)]
        calls = 0

        class Counted:
            def __init__(self, part: pa.RecordBatch) -> None:
                self.part = part

            def __len__(self) -> int:
                return len(self.part)

            def slice(self, *where: int) -> pa.RecordBatch:
                nonlocal calls
                calls += 1
                return self.part.slice(*where)

        assert write_manifest([Counted(part) for part in parts], str(tmp_path / "m")) == 4000  # type: ignore[misc]
        assert calls == 4000


class TestRefused:
    def test_no_rows(self, tmp_path: Path) -> None:
        for batches in ([], [batch([])]):
            with pytest.raises(ConfigError, match="Nothing to index"):
                write_manifest(batches, str(tmp_path / "m"))
        assert not (tmp_path / "m").exists()

    def test_a_failed_index_leaves_the_old_manifest(self, tmp_path: Path) -> None:
        before = write(tmp_path / "m", batch(["a"])).digest()
        with pytest.raises(ConfigError):
            write(tmp_path / "m", batch(["a", "a"]))
        assert Manifest(str(tmp_path / "m")).digest() == before

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"hello, world" * 9, b"PAR1" + bytes(40) + b"\x28\0\0\0PAR1"])
    def test_no_parquet_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(ConfigError, match="no Parquet file"):
            Manifest(str(tmp_path / "m"))

    def test_damaged_footer(self, tmp_path: Path) -> None:
        write(tmp_path / "m", *pieces([f"{n:03}" for n in range(50)], 0))
        data, dice = (tmp_path / "m").read_bytes(), np.random.default_rng(0)
        for _ in range(200):
            changed = bytearray(data)
            for place in dice.integers(len(data) - 2000, len(data), 3):
                changed[place] = dice.integers(256)
            (tmp_path / "m").write_bytes(changed)
            try:
                Manifest(str(tmp_path / "m"))
            except ConfigError:
                pass  # the only error there may be

    def test_another_table(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "m")
        with pytest.raises(ConfigError, match="'uri'"):
            Manifest(str(tmp_path / "m"))

    def test_not_there(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(ConfigError, match="There is no manifest"):
                Manifest(str(path))
