from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt import fetch as module
from manifpt.errors import BadImage, RejectReason, StorageError
from manifpt.fetch import fetch, image_column
from manifpt.storage import store_of


def row(
    uri: object, container: str | None = None, offset: int | None = None, size: int | None = None
) -> dict[str, Any]:
    return {"uri": str(uri), "container": container, "offset": offset, "size_bytes": size}


def reasons(*rows: dict[str, Any]) -> list[RejectReason | bytes]:
    return [found.reason if isinstance(found, BadImage) else found for found in fetch(list(rows))]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    cells = [None if n == 33 else b"" if n == 34 else b"image %d" % n for n in range(100)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "set.parquet", row_group_size=30)
    return tmp_path / "set.parquet"


class TestFiles:
    def test_in_order(self, tmp_path: Path) -> None:
        """Also where there are more of them than requests in flight."""
        for n in range(300):
            (tmp_path / f"{n}").write_bytes(b"%d" % n)
        order = random.Random(0).sample(range(300), 300)
        assert list(fetch([row(tmp_path / f"{n}", size=len(str(n))) for n in order])) == [b"%d" % n for n in order]

    def test_nothing(self) -> None:
        assert list(fetch([])) == []

    def test_gone_or_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"12345")
        (tmp_path / "f").mkdir()
        a = tmp_path / "a"
        assert reasons(row(a, size=5), row(a, size=4), row(a)) == [b"12345", RejectReason.CHANGED, b"12345"]
        gone = (tmp_path / "none", tmp_path / "f", a / "b")
        assert reasons(*[row(path, size=5) for path in gone]) == [RejectReason.MISSING] * 3

    def test_a_copy_has_another_time_stamp(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"12345")
        assert reasons({**row(tmp_path / "a", size=5), "etag": "0-5"}) == [b"12345"]

    def test_too_large_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_BYTES", 10)
        assert reasons(row(tmp_path / "not even there", size=11)) == [RejectReason.TOO_LARGE]

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (PermissionError(13, "Permission denied"), RejectReason.FORBIDDEN),
            (BlockingIOError("changed"), RejectReason.CHANGED),
        ],
    )
    def test_errors_of_one_image(self, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: RejectReason) -> None:
        def read(*_: object) -> bytes:
            raise error

        monkeypatch.setattr(store_of("/"), "read", read, raising=False)
        assert reasons(row("/a", size=1)) == [reason]

    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StorageError("slow down")])
    def test_errors_of_storage(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def read(*_: object) -> bytes:
            raise error

        monkeypatch.setattr(store_of("/"), "read", read, raising=False)
        with pytest.raises(StorageError):
            list(fetch([row("/a", size=1)]))

    def test_a_reader_that_stops_early(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1")
        found = fetch([row(tmp_path / "a", size=1)] * 500)
        assert next(found) == b"1"
        found.close()  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("container", "offset", "size"),
        [("tar", -5, 3), ("tar", 0, -3), ("tar", None, 3), ("tar", 0, None), ("parquet", None, None),
         ("parquet", -1, None), (None, None, -1)],
    )  # fmt: skip
    def test_a_row_that_says_no_place_is_one_bad_image(
        self, tmp_path: Path, container: str | None, offset: int | None, size: int | None
    ) -> None:
        (tmp_path / "a").write_bytes(b"12345678")
        found = list(fetch([row(tmp_path / "a", size=8), row(tmp_path / "a", container, offset, size)]))
        assert found[0] == b"12345678"
        assert isinstance(found[1], BadImage) and found[1].reason is RejectReason.CORRUPT


class TestTar:
    @pytest.fixture
    def packed(self, tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
        path = tmp_path / "set.tar"
        with tarfile.open(path, "w") as tar:
            for n in range(20):
                info = tarfile.TarInfo(f"{n}.png")
                info.size = n * 100
                tar.addfile(info, io.BytesIO(bytes([n]) * info.size))
        with tarfile.open(path) as tar:
            return path, [row(path, "tar", m.offset_data, m.size) for m in tar]

    def test_ranges(self, packed: tuple[Path, list[dict[str, Any]]]) -> None:
        _, rows = packed
        assert list(fetch(rows)) == [bytes([n]) * (n * 100) for n in range(20)]

    def test_cut_since(self, packed: tuple[Path, list[dict[str, Any]]]) -> None:
        path, rows = packed
        os.truncate(path, rows[-1]["offset"] + 10)
        assert reasons(rows[-1], rows[5]) == [RejectReason.CHANGED, bytes([5]) * 500]

    def test_another_file_since(self, packed: tuple[Path, list[dict[str, Any]]]) -> None:
        path, rows = packed
        entry = store_of(str(path)).stat(str(path))
        assert entry is not None
        known = {**rows[5], "etag": entry.etag}
        path.write_bytes(bytes(1000) + path.read_bytes())
        assert reasons(known) == [RejectReason.CHANGED]
        path.unlink()
        assert reasons(known) == [RejectReason.MISSING]


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


class TestParquet:
    def test_cells_in_any_order(self, parquet: Path) -> None:
        order = [99, 0, 30, 29, 59, 0, 60, 1]
        found = list(fetch([row(parquet, "parquet", n) for n in order]))
        assert found == [b"image %d" % n for n in order]

    def test_every_row(self, parquet: Path) -> None:
        found = list(fetch([row(parquet, "parquet", n) for n in range(100)]))
        assert found == [b"" if n in {33, 34} else b"image %d" % n for n in range(100)]

    def test_more_rows_than_a_batch(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"%d" % n for n in range(5000)]}), tmp_path / "p", row_group_size=3000)
        for order in ([4999, 1023, 1024, 2999, 3000, 0], [1024], [4999], [1023, 3000]):
            assert list(fetch([row(tmp_path / "p", "parquet", n) for n in order])) == [b"%d" % n for n in order]

    def test_struct(self, tmp_path: Path) -> None:
        cells = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"x": [1, 2, 3], "image": pa.array(cells, kind)}), tmp_path / "p")
        assert list(fetch([row(tmp_path / "p", "parquet", n) for n in range(3)])) == [b"a", b"", b""]

    def test_mixed_with_files(self, parquet: Path, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"file")
        rows = [row(tmp_path / "a", size=4), row(parquet, "parquet", 7), row(tmp_path / "a", size=4)]
        assert list(fetch(rows)) == [b"file", b"image 7", b"file"]

    def test_gone(self, parquet: Path, tmp_path: Path) -> None:
        pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "no images")
        assert (
            reasons(
                row(parquet, "parquet", 100),
                row(tmp_path / "none", "parquet", 0),
                row(tmp_path / "no images", "parquet", 0),
            )
            == [RejectReason.MISSING] * 3
        )

    def test_another_file_since(self, parquet: Path) -> None:
        """Its rows have moved, perhaps: row 3 may now be another image."""
        entry = store_of(str(parquet)).stat(str(parquet))
        assert entry is not None
        known = {**row(parquet, "parquet", 3), "etag": entry.etag}
        copied = {**known, "etag": "0-" + entry.etag.rpartition("-")[2]}
        assert reasons(known, copied) == [b"image 3"] * 2
        pq.write_table(pa.table({"image": [b"other %d" % n for n in range(50)]}), parquet)
        assert reasons(known, known) == [RejectReason.CHANGED] * 2

    @pytest.mark.parametrize("exact", [True, False])
    def test_replaced_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
        """By a file of the same length, after it was looked at: as soon as that can be told, cells are of nobody."""
        path = tmp_path / "p.parquet"

        def written(word: str) -> None:
            pq.write_table(pa.table({"image": [f"{word} {n}".encode() for n in range(6)]}), path, row_group_size=2)

        written("old")
        entry = store_of(str(path)).stat(str(path))
        assert entry is not None
        opened = store_of("/").open

        def replacing(uri: str, etag: str | None = None) -> Any:
            os.utime(path, ns=(1, 1))
            written("new")
            return opened(uri, etag)

        monkeypatch.setattr(store_of("/"), "open", replacing, raising=False)
        rows = [{**row(path, "parquet", n), "etag": entry.etag} for n in range(6)]
        found = [one.reason if isinstance(one, BadImage) else one for one in fetch(rows, exact)]
        assert found == ([RejectReason.CHANGED] * 6 if exact else [b"new %d" % n for n in range(6)])

    def test_of_many_files_one_is_open_at_a_time(self, tmp_path: Path) -> None:
        for n in range(50):
            pq.write_table(pa.table({"image": [b"%d" % n]}), tmp_path / f"{n}.parquet")
        most = 0
        for n, data in enumerate(fetch([row(tmp_path / f"{n}.parquet", "parquet", 0) for n in range(50)])):
            assert data == b"%d" % n
            most = max(most, sum(str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()))
        assert most <= 1

    def test_cells_are_let_go_of_when_they_were_asked_for(self, tmp_path: Path) -> None:
        """In the order of their rows no more than one is held."""
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table({"image": [bytes([n]) * 100_000 for n in range(200)]}), path, row_group_size=5)
        cells = module._Cells([row(path, "parquet", n) for n in (*range(200), 3)], False)
        for n in range(200):
            assert cells.take(row(path, "parquet", n)) == bytes([n]) * 100_000
            assert len(cells._held) <= 1, "but one that is asked for again"
        assert cells.take(row(path, "parquet", 3)) == bytes([3]) * 100_000 and not cells._held

    def test_any_damage_is_of_its_images(self, parquet: Path) -> None:
        data, dice = parquet.read_bytes(), random.Random(0)
        rows = [row(parquet, "parquet", n) for n in (0, 31, 99)]
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(dice.choice([1, 3, 20])):
                changed[dice.randrange(len(data))] = dice.randrange(256)
            parquet.write_bytes(changed[: dice.choice([len(data), dice.randrange(len(data))])])
            assert len(list(fetch(rows))) == 3

    def test_what_was_read_before_the_damage_stays(self, parquet: Path) -> None:
        data = bytearray(parquet.read_bytes())
        start = pq.ParquetFile(parquet).metadata.row_group(3).column(0)
        place = start.dictionary_page_offset or start.data_page_offset
        data[place : place + 20] = b"\xff" * 20
        parquet.write_bytes(data)
        assert reasons(row(parquet, "parquet", 5), row(parquet, "parquet", 95)) == [b"image 5", RejectReason.CORRUPT]

    def test_storage_that_fails_below_parquet(self, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Failing(io.BytesIO):
            def read(self, *_: object) -> bytes:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(store_of("/"), "open", lambda *_: Failing(parquet.read_bytes()), raising=False)
        with pytest.raises(StorageError):
            list(fetch([row(parquet, "parquet", 0)]))


class TestImageColumn:
    BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ([("image", pa.binary())], "image"),
            ([("image", BYTES)], "image"),
            ([("picture", pa.large_binary())], "picture"),
            ([("picture", pa.binary_view())], "picture"),
            ([("md5", pa.binary()), ("image", pa.binary())], "image"),
            ([("image", pa.string()), ("data", pa.binary())], "data"),
            ([("a", pa.string()), ("img", BYTES), ("raw", pa.binary())], "img"),
            ([("a", pa.string()), ("b", pa.list_(pa.binary()))], None),
            ([("image", pa.struct([("path", pa.string())]))], None),
            ([("image", pa.struct([("bytes", BYTES)]))], None),
        ],
    )
    def test_which(self, fields: list[tuple[str, pa.DataType]], expected: str | None) -> None:
        assert image_column(pa.schema(fields)) == expected
