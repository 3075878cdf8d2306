"""What a scan has seen: an anti-join of what storage lists now with what was scanned before, without holding either.

    inventory/base-00016.parquet   every object seen up to window 16
    inventory/00017.parquet        what window 17 changed: `uri`, `etag`, `present`, and `again` of what could not be
                                   read and may be tomorrow

Rows are sorted by `uri`. A window adds a small file; when there are many, they are merged into a new base.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.indexing import entries
from manifpt.sorting import aligned, sorted_tables
from manifpt.storage import join, store_of

__all__ = ["LISTED", "Changes", "changes", "known", "listing", "merge_inventory", "write_inventory"]

LISTED = pa.schema([("uri", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])
_SEEN = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("present", pa.bool_()), ("again", pa.bool_())])
_KNOWN = pa.schema([_SEEN.field(name) for name in ("uri", "etag", "again")])
_ROWS = 16_384
_MOST_FILES = 16  # beside the base


def listing(inputs: Sequence[str], skipped: Counter[str]) -> Iterator[pa.Table]:
    """Every object under some prefixes once, sorted by URI: tables of `LISTED`.

    Raises:
        ConfigError: a prefix that can't be listed.
    """
    last = None
    for table in sorted_tables(_batches(inputs, skipped), "uri"):
        uri = table["uri"].combine_chunks()
        is_first = np.ones(len(uri), bool)  # of objects that two overlapping prefixes list
        is_first[1:] = ~pc.equal(uri[1:], uri[:-1]).to_numpy(zero_copy_only=False)
        is_first[0] = uri[0].as_py() != last
        last = uri[-1].as_py()
        yield table.filter(pa.array(is_first))


def _batches(inputs: Sequence[str], skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    held: list[tuple[str, int, str]] = []
    for given in inputs:
        for entry in entries(given, skipped, may_be_empty=True):
            held.append((entry.uri, entry.size_bytes, entry.etag))
            if len(held) == _ROWS:
                yield _batch(held)
                held.clear()
    if held:
        yield _batch(held)


def _batch(rows: Sequence[tuple[str, int, str]]) -> pa.RecordBatch:
    return pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=LISTED)


@dataclass(frozen=True, slots=True)
class Changes:
    """One key range of a comparison.

    Attributes:
        new: objects never seen, or that could not be read and have another etag now, of `LISTED`.
        changed: other objects with another etag than before, of `LISTED`.
        gone: `uri` and `etag` of objects that were seen, and are listed no more.
        waiting: objects that could not be read, and are as they were, of `LISTED`.
    """

    new: pa.Table
    changed: pa.Table
    gone: pa.Table
    waiting: pa.Table


def changes(listed: Iterator[pa.Table], seen: Iterator[pa.Table]) -> Iterator[Changes]:
    """Compares a listing with what is known, both sorted by URI, range by range."""
    for now, before in aligned([listed, seen], "uri"):
        now = now if now is not None else LISTED.empty_table()
        before = before if before is not None else _KNOWN.empty_table()
        uri, before_uri = now["uri"].combine_chunks(), before["uri"].combine_chunks()
        place = pc.index_in(uri, value_set=before_uri)
        is_unseen = pc.is_null(place)
        is_other = pc.not_equal(before["etag"].combine_chunks().take(place), now["etag"].combine_chunks())
        is_other = pc.fill_null(is_other, False)
        was_unread = pc.fill_null(before["again"].combine_chunks().take(place), False)
        is_gone = pc.invert(pc.or_(pc.is_in(before_uri, value_set=uri), before["again"].combine_chunks()))
        yield Changes(
            now.filter(pc.or_(is_unseen, pc.and_(is_other, was_unread))),
            now.filter(pc.and_not(is_other, was_unread)),
            before.select(["uri", "etag"]).filter(is_gone),
            now.filter(pc.and_not(was_unread, is_other)),
        )


def known(output: str) -> Iterator[pa.Table]:
    """`uri`, `etag` and `again` of every object that was seen and not found gone since, sorted by URI."""
    base, deltas = _files(output)
    numbers = ([base] if base is not None else []) + deltas
    streams = [_stream(_uri(output, number, number == base)) for number in numbers]
    for step in aligned(streams, "uri"):
        # The last word on an object is that of the newest file.
        tables = [
            table.append_column("age", pa.array(np.full(len(table), -place), pa.int32()))
            for place, table in enumerate(step)
            if table is not None
        ]
        table = pa.concat_tables(tables).sort_by([("uri", "ascending"), ("age", "ascending")]).combine_chunks()
        uri = table["uri"].combine_chunks()
        is_last_word = np.ones(len(uri), bool)
        is_last_word[1:] = ~pc.equal(uri[1:], uri[:-1]).to_numpy(zero_copy_only=False)
        table = table.filter(pa.array(is_last_word))
        yield table.filter(table["present"]).select(_KNOWN.names)


def write_inventory(output: str, window: int, tables: Iterable[pa.Table]) -> None:
    """What a window changed: tables of `uri`, `etag`, `present` and, if any, `again`, sorted by URI. Called again, it
    replaces them."""
    _write(_uri(output, window, False), tables)


def merge_inventory(output: str) -> None:
    """Merges all files into a new base, where there are many beside the old one."""
    base, deltas = _files(output)
    if len(deltas) < _MOST_FILES:
        return
    present = (table.append_column("present", pa.array(np.ones(len(table), bool))) for table in known(output))
    _write(_uri(output, deltas[-1], True), present)
    for number in deltas:
        store_of(output).remove(_uri(output, number, False))
    if base is not None:
        store_of(output).remove(_uri(output, base, True))


def _files(output: str) -> tuple[int | None, list[int]]:
    """The newest base, and the windows since."""
    folder = join(output, "inventory")
    try:
        names = [entry.key.removesuffix(".parquet") for entry in store_of(output).list(folder)]
    except FileNotFoundError:
        return None, []
    base = max((int(name[5:]) for name in names if name.startswith("base-")), default=None)
    return base, sorted(int(name) for name in names if name.isdigit() and int(name) > (base or 0))


def _uri(output: str, window: int, is_base: bool) -> str:
    return join(output, "inventory", f"{'base-' if is_base else ''}{window:05d}.parquet")


def _stream(uri: str) -> Iterator[pa.Table]:
    with store_of(uri).open(uri) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(_ROWS, use_threads=False):
            yield _whole(pa.table(batch))


def _whole(table: pa.Table) -> pa.Table:
    """With all columns: nothing had to be read again in inventories before there was one for it."""
    if "again" in table.column_names:
        return table
    return table.append_column("again", pa.array(np.zeros(len(table), bool)))


def _write(uri: str, tables: Iterable[pa.Table]) -> None:
    with tempfile.TemporaryDirectory(prefix="manifpt-inventory-") as folder:
        path = Path(folder) / "inventory.parquet"
        with pq.ParquetWriter(path, _SEEN, compression="zstd") as writer:
            for table in tables:
                writer.write_table(_whole(table).select(_SEEN.names).cast(_SEEN), row_group_size=_ROWS)
        store_of(uri).upload(path, uri)
