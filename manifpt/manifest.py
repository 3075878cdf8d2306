"""The manifest: one row an image, sorted by `image_id`, written by streaming and read by row group."""

from __future__ import annotations

import bisect
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.documents import check_columns, check_rows, parquet_errors
from manifpt.errors import ConfigError
from manifpt.sorting import sorted_tables
from manifpt.storage import is_of_storage, sha256_of, store_of

__all__ = ["COLUMNS", "REAL", "SHARD_COLUMNS", "Manifest", "records", "write_manifest"]

REAL = "real"  # the source of images that no generator made

COLUMNS = pa.schema(
    [
        pa.field(
            "image_id", pa.string(), nullable=False
        ),  # the key relative to the indexed root; `#row` inside Parquet
        pa.field("uri", pa.string(), nullable=False),  # the object that holds the bytes
        pa.field("container", pa.string()),  # null, or "tar" or "parquet": the object holds many images
        pa.field("offset", pa.int64()),  # of the member's first byte in a tar; the row in a Parquet file
        pa.field("source", pa.string(), nullable=False),  # the generator, or "real"
        pa.field("split", pa.string()),
        pa.field("size_bytes", pa.int64()),  # null inside Parquet, where only reading tells
        pa.field("etag", pa.string()),
        pa.field("format", pa.string()),  # what the name or a column says; the decoder looks itself
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
    ]
)

# Names that artifact shards add.
SHARD_COLUMNS = ("content_hash", "neighbor_id", "distance", "twin", "artifact")

_ROW_GROUP_ROWS = 16_384  # a shard reads the one or two groups that it lies in


def write_manifest(batches: Iterable[pa.RecordBatch], uri: str) -> int:
    """Sorts rows by `image_id` and writes them as one Parquet object.

    Memory doesn't grow with the number of rows: see `manifpt.sorting`.

    Args:
        batches: rows in any order, all of one schema that starts with `COLUMNS`.
        uri: where the manifest goes; replaced whole.

    Returns:
        The number of rows.

    Raises:
        ConfigError: no rows at all, or an image id that occurs twice.
    """
    rows, last_id = 0, None
    with tempfile.TemporaryDirectory(prefix="manifpt-index-") as folder:
        merged = Path(folder) / "manifest.parquet"
        writer: pq.ParquetWriter | None = None
        try:
            for table in _in_row_groups(sorted_tables(batches, "image_id")):
                writer = writer or pq.ParquetWriter(merged, table.schema, compression="zstd")
                ids = table["image_id"].combine_chunks()
                _refuse_duplicates(ids, last_id)
                last_id = ids[-1].as_py()
                writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
                rows += len(table)
        finally:
            if writer is not None:
                writer.close()
        if not rows:
            raise ConfigError("Nothing to index: no image was found under the input.")
        store_of(uri).upload(merged, uri)
    return rows


def _in_row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Cuts at fixed row numbers, and not where runs met: the order of the input must not show in the file's digest."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        whole = len(rest) // _ROW_GROUP_ROWS * _ROW_GROUP_ROWS
        for start in range(0, whole, _ROW_GROUP_ROWS):
            yield rest.slice(start, _ROW_GROUP_ROWS).combine_chunks()
        rest = rest.slice(whole)
    if rest is not None and len(rest):
        yield rest.combine_chunks()


def _refuse_duplicates(ids: pa.StringArray, last_id: str | None) -> None:
    same = pc.equal(ids[1:], ids[:-1])
    twice = ids[pc.index(same, True).as_py()].as_py() if pc.any(same).as_py() else None
    if last_id is not None and ids[0].as_py() == last_id:
        twice = last_id
    if twice is not None:
        raise ConfigError(
            f"The image id {twice!r} is there twice: of two inputs, index the common parent folder instead; a tar that "
            f"holds the name twice, write again."
        )


def records(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of a manifest or shard as Python objects, without columns of users: those may hold what Python can't, such
    as a time after the year 9999, and would end a job."""
    own = {*COLUMNS.names, *SHARD_COLUMNS} - {"artifact"}
    found: list[dict[str, Any]] = table.select([name for name in table.column_names if name in own]).to_pylist()
    return found


class Manifest:
    """A manifest in storage, read by row ranges."""

    def __init__(self, uri: str) -> None:
        """Opens it.

        Raises:
            ConfigError: it isn't there, or is no manifest.
        """
        self.uri = uri
        try:
            self._file = pq.ParquetFile(store_of(uri).open(uri))
        except FileNotFoundError as error:
            raise ConfigError(f"There is no manifest {uri}; make one with jobs/index_images.py.") from error
        except PermissionError as error:
            raise ConfigError(f"No permission to read the manifest {uri}.") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_of_storage(error):
                raise
            raise ConfigError(f"{uri} is no Parquet file; make a manifest with jobs/index_images.py.") from error
        with parquet_errors(uri):
            self._open()

    def _open(self) -> None:
        uri = self.uri
        self.schema: pa.Schema = self._file.schema_arrow
        missing = [name for name in COLUMNS.names if name not in self.schema.names]
        if missing:
            raise ConfigError(f"{uri} is no manifest: it has no column {missing[0]!r}; use jobs/index_images.py.")
        check_columns(self.schema, f"The manifest {uri}", {field.name: field.type for field in COLUMNS})
        self.rows: int = self._file.metadata.num_rows
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(counts))
        entry = store_of(uri).stat(uri)
        self.etag = entry.etag if entry else ""
        check_rows(self._file.metadata, entry.size_bytes if entry else 0, f"The manifest {uri}")

    @property
    def kept_columns(self) -> list[str]:
        """Columns of the user's own, which travel to the shards."""
        return [name for name in self.schema.names if name not in COLUMNS.names]

    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_of(self.uri)

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows `start` to `stop`, in the order of the file.

        Raises:
            ConfigError: the file is damaged there.
        """
        stop = min(stop, self.rows)
        first = bisect.bisect_right(self._ends, start)
        last = bisect.bisect_left(self._ends, stop)
        with parquet_errors(self.uri):
            table = self._file.read_row_groups(list(range(first, last + 1)), columns=columns, use_threads=False)
            table = table.slice(start - (self._ends[first - 1] if first else 0), stop - start)
            table.validate(full=True)  # Parquet promises UTF-8, and Arrow believes it
        lacking = [
            f.name for f in COLUMNS if not f.nullable and f.name in table.column_names and table[f.name].null_count
        ]
        if lacking or len(table) != max(0, stop - start):
            raise ConfigError(f"{self.uri} is damaged (rows without {', '.join(lacking) or 'columns'}): index again.")
        return table

    def close(self) -> None:
        self._file.close(force=True)  # the stream is ours
