"""Finds images: a folder, S3 prefix, tar (WebDataset) or Parquet file with an image column becomes manifest rows.

Everything streams. Only names, sizes and label columns are read, never pixels: a million keys, a thousand list calls.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifpt.documents import check_rows, json_of
from manifpt.errors import ConfigError, ObjectUnreadable, RejectReason
from manifpt.fetch import image_column
from manifpt.manifest import COLUMNS, SHARD_COLUMNS
from manifpt.storage import Entry, is_of_storage, normalize, store_of

__all__ = ["BATCH_ROWS", "IndexOptions", "batch_of", "entries", "images_in", "index"]

_FORMATS = {
    "apng": "png", "bmp": "bmp", "gif": "gif", "jfif": "jpeg", "jpe": "jpeg", "jpeg": "jpeg", "jpg": "jpeg",
    "pbm": "ppm", "pgm": "ppm", "png": "png", "pnm": "ppm", "ppm": "ppm", "tif": "tiff", "tiff": "tiff", "webp": "webp",
}  # fmt: skip
_MOST_JSON_BYTES = 16 << 20  # of one sample
_MOST_LABEL_BYTES = 1 << 16
_MOST_ENDINGS = 100
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
BATCH_ROWS = 16_384

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Where the labels come from. A *field* is a column of a Parquet file, or of a WebDataset sample's `.json`.

    Attributes:
        source: one source for all images. Without it and `source_column`: the first folder level of an image's key.
        source_column: the field that names an image's source.
        split: one split for all images.
        split_column: the field that names an image's split.
        keep_columns: fields that travel on, to the manifest and to the shards.
        where: `(field, value)`: only images whose field, as text, has this value.
    """

    source: str | None = None
    source_column: str | None = None
    split: str | None = None
    split_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    where: tuple[str, str] | None = None

    def fields(self) -> list[str]:
        wanted = (self.source_column, self.split_column, *self.keep_columns, self.where[0] if self.where else None)
        return [name for name in dict.fromkeys(wanted) if name]


def index(inputs: Iterable[str], options: IndexOptions, skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Manifest rows of all inputs, in the order in which storage lists them.

    Args:
        inputs: URIs of folders, prefixes, tar files, Parquet files or single images.
        options: where source, split and kept columns come from.
        skipped: counts, by ending, what was listed and is no image.

    Raises:
        ConfigError: an input that isn't there, an image without a source, a field that isn't there.
    """
    clash = set(options.keep_columns) & {*COLUMNS.names, *SHARD_COLUMNS}
    if clash:
        raise ConfigError(f"--keep-columns {min(clash)}: manifests and shards have a column of this name already.")
    held: list[Row] = []
    for given in inputs:
        for entry in entries(given, skipped):
            for found in images_in(entry, options, skipped):
                if isinstance(found, pa.RecordBatch):
                    yield found
                    continue
                held.append(found)
                if len(held) == BATCH_ROWS:
                    yield batch_of(held, options)
                    held.clear()
    if held:
        yield batch_of(held, options)


def entries(given: str, skipped: Counter[str], may_be_empty: bool = False) -> Iterator[Entry]:
    """The object of exactly this name, or else all below it but what is hidden.

    Raises:
        ConfigError: it can't be listed; or nothing is there, unless that may be.
    """
    root = normalize(given)
    store = store_of(root)
    empty, refused = True, None
    try:
        try:
            single = store.stat(root)
        except PermissionError as error:  # who may list a prefix need not be allowed to ask for an object of its name
            single, refused = None, error
        for entry in [single] if single else store.list(root):
            empty = False
            if _is_hidden(entry.key):
                skipped["hidden"] += 1
            else:
                yield entry
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        raise ConfigError(f"No permission to list {given}: {error}.") from error
    if empty and not may_be_empty and refused is not None:
        raise ConfigError(f"No permission to read {given}, and there is nothing below it: {refused}.")
    if empty and not may_be_empty:
        raise ConfigError(f"There is nothing at {given}; check the path, or the bucket and the prefix.")


def _is_hidden(key: str) -> bool:
    """What programs keep beside images, and is no data: `.DS_Store`, `._a.png`, `.thumbnails/a.png`."""
    return any(part.startswith(".") and part != "." for part in key.split("/"))


def images_in(entry: Entry, options: IndexOptions, skipped: Counter[str]) -> Iterator[Row | pa.RecordBatch]:
    """The images of one stored object: itself, the members of a tar, or the rows of a Parquet file.

    Raises:
        ConfigError: an object that is damaged, or lacks what the options name.
    """
    name = entry.key.rpartition("/")[2].lower()
    ending = name.rpartition(".")[2] if "." in name else ""
    if ending == "parquet":
        yield from _parquet_batches(entry, options, skipped)
    elif ending == "tar":
        yield from _tar_rows(entry, options, skipped)
    elif name.endswith(_COMPRESSED_TARS):
        raise ConfigError(f"{entry.uri} is compressed, so no image can be read by itself; store it as a plain .tar.")
    elif ending in _FORMATS or not (
        ending or options.fields()
    ):  # content-addressed buckets have keys without an ending
        if options.fields():
            raise ConfigError(f"{entry.uri} is an image file and has no columns; name columns for Parquet or tar only.")
        yield {
            "image_id": entry.key,
            "uri": entry.uri,
            "source": _source(options, None, entry.key, entry.uri),
            "split": options.split,
            "size_bytes": entry.size_bytes,
            "etag": entry.etag,
            "format": _FORMATS.get(ending),
        }
    else:
        _skip(skipped, ending or "no ending")


def _skip(skipped: Counter[str], ending: str) -> None:
    """Counts what is no image; of buckets where every name has an ending of its own, not each."""
    skipped[ending if ending in skipped or len(skipped) < _MOST_ENDINGS else "other endings"] += 1


def _source(options: IndexOptions, named: str | None, key: str, uri: str) -> str:
    """Flag, then field, then the first folder level."""
    if options.source is not None:
        return options.source
    if options.source_column is not None:
        if not named:
            raise ConfigError(f"{uri}: {key} has no value in {options.source_column!r}; correct it or pass --source.")
        return named
    folder, slash, _ = key.partition("/")
    if not slash:
        raise ConfigError(f"{uri} lies in no folder that names its source; pass --source NAME or --source-column.")
    return folder


def batch_of(rows: list[Row], options: IndexOptions) -> pa.RecordBatch:
    """Rows as a batch of a manifest."""
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in COLUMNS}
    for name in options.keep_columns:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (ValueError, TypeError, OverflowError) as error:  # Arrow's own errors are among these
            raise ConfigError(f"--keep-columns {name}: the values have no common type ({error}).") from error
    return pa.RecordBatch.from_pydict(columns)


def _tar_rows(entry: Entry, options: IndexOptions, skipped: Counter[str]) -> Iterator[Row]:
    """Image members, by sample as WebDataset groups them: neighbours whose names agree up to the first dot."""
    with _opened(entry) as stream, _open_tar(stream, entry.uri) as tar:
        sample, images, fields = "", [], {}  # type: str, list[tarfile.TarInfo], dict[str, Any]
        last_offset = -1
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                # A negative size leads back to an earlier header, and so on for ever.
                if member.size < 0 or member.offset <= last_offset:
                    raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}")
                last_offset = member.offset
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not member.isreg() or member.issparse():
                    skipped["link or special file in a tar"] += 1
                    continue
                if _is_hidden(member.name):
                    skipped["hidden"] += 1
                    continue
                if f"{folder}/{stem}" != sample:
                    yield from _sample_rows(entry, images, fields, options)
                    sample, images, fields = f"{folder}/{stem}", [], {}
                last = ending.rpartition(".")[2].lower()
                if last in _FORMATS or not last:
                    images.append(member)
                elif last == "json" and options.fields():
                    fields = _json_fields(tar, member, entry.uri)
                elif last != "json":
                    _skip(skipped, last)
            stream.seek(tar.offset)
            for _ in range(_MOST_TAIL_BLOCKS):  # tarfile stops at a damaged or empty header as if it were the end
                block = stream.read(_TAIL_BLOCK_BYTES)
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"a damaged header, or several tars joined, from byte {tar.offset} on")
                if not block:
                    break
        except _OF_TARS as error:
            raise ConfigError(f"{entry.uri} is damaged ({error}); write it again, or leave it out.") from error
        yield from _sample_rows(entry, images, fields, options)


_TAIL_BLOCK_BYTES, _MOST_TAIL_BLOCKS = 1 << 20, 64  # behind a tar's end, where writers pad with zeros
# Headers that say what can't be make tarfile raise anything: numbers that are none, sizes that no file has.
_OF_TARS = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, LookupError)


class _Bounded:
    """A tar as `tarfile` may see it: a header can't ask for more bytes at once, nor lead out of the file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._size_bytes = stream.seek(0, io.SEEK_END)
        stream.seek(0)

    def read(self, size_bytes: int = -1) -> bytes:
        if not 0 <= size_bytes <= _MOST_JSON_BYTES:
            raise tarfile.ReadError(f"a header of {size_bytes} bytes")
        return self._stream.read(size_bytes)

    def seek(self, place: int) -> int:
        if not 0 <= place <= self._size_bytes:
            raise tarfile.ReadError(f"a member that ends at byte {place} of {self._size_bytes}")
        return self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()


@contextmanager
def _opened(entry: Entry) -> Iterator[IO[bytes]]:
    """A stream that may refuse at its first byte, as that of an archived object does, or at a later one.

    Raises:
        ObjectUnreadable: it is gone, or not for us, or not any more what was listed.
    """
    uri = entry.uri
    try:
        with store_of(uri).open(uri, entry.etag) as stream:
            yield stream
    except FileNotFoundError as error:
        raise ObjectUnreadable(f"{uri} is gone since it was listed; index again.", RejectReason.MISSING) from error
    except PermissionError as error:
        raise ObjectUnreadable(f"No permission to read {uri}.", RejectReason.FORBIDDEN) from error
    except BlockingIOError as error:
        raise ObjectUnreadable(
            f"{uri} is another one since it was listed; index again.", RejectReason.CHANGED
        ) from error


def _open_tar(stream: IO[bytes], uri: str) -> tarfile.TarFile:
    bounded: Any = _Bounded(stream)  # it has all that tarfile asks for
    try:
        return tarfile.open(fileobj=bounded, mode="r:")
    except _OF_TARS as error:
        raise ConfigError(f"{uri} is no plain tar ({error}); write it again, or leave it out.") from error


def _json_fields(tar: tarfile.TarFile, member: tarfile.TarInfo, uri: str) -> dict[str, Any]:
    if member.size > _MOST_JSON_BYTES:
        raise ConfigError(f"{uri}: {member.name!r} has {member.size} bytes of JSON; {_MOST_JSON_BYTES} are allowed.")
    stream = tar.extractfile(member)
    loaded = json_of(stream.read(), f"{uri}: {member.name}") if stream else None
    return loaded if isinstance(loaded, dict) else {}


def _text(value: Any) -> str | None:
    """A JSON value as the same column of a Parquet file would be written."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _sample_rows(
    entry: Entry, images: list[tarfile.TarInfo], fields: dict[str, Any], options: IndexOptions
) -> Iterator[Row]:
    for member in images:
        if options.where and _text(fields.get(options.where[0])) != options.where[1]:
            continue
        # As keys of a file system: bytes that are no UTF-8 as escapes.
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        key = entry.key if "/" in entry.key else name.removeprefix("./")
        yield {
            "image_id": f"{entry.key}#{name}",
            "uri": entry.uri,
            "container": "tar",
            "offset": member.offset_data,
            "source": _source(options, _text(fields.get(options.source_column or "")), key, entry.uri),
            "split": _text(fields.get(options.split_column)) if options.split_column else options.split,
            "size_bytes": member.size,
            "etag": entry.etag,
            "format": _FORMATS.get(member.name.rpartition(".")[2].lower()),
            **{name: fields.get(name) for name in options.keep_columns},
        }


def _parquet_batches(entry: Entry, options: IndexOptions, skipped: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Rows of a Parquet file with an image column; one without (metadata beside a tar, say) is skipped."""
    with _opened(entry) as stream:
        try:
            file = pq.ParquetFile(stream)
            schema = file.schema_arrow
            # One long text in a dictionary may stand in every row: it is looked at before it is written out.
            texts = [f.name for f in schema if f.name in options.fields() and f.type in (pa.string(), pa.binary())]
            if texts and len(set(schema.names)) == len(schema):
                file = pq.ParquetFile(stream, metadata=file.metadata, read_dictionary=texts)
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_of_storage(error):
                raise
            raise ConfigError(f"{entry.uri} is no Parquet file ({error}); write it again, or leave it out.") from error
        check_rows(file.metadata, entry.size_bytes, entry.uri)
        if image_column(schema) is None:
            skipped["parquet without an image column"] += 1
            return
        for name in options.fields():
            if name not in schema.names:
                raise ConfigError(f"{entry.uri} has no column {name!r}; it has {', '.join(schema.names)}.")
            if schema.names.count(name) > 1:
                raise ConfigError(f"{entry.uri} has several columns {name!r}; write it again with one.")
        known = [name for name in ("format", "width", "height") if schema.names.count(name) == 1]
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            try:
                table = file.read_row_group(group, columns=list(dict.fromkeys([*options.fields(), *known])))
            except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                if is_of_storage(error):
                    raise
                raise ConfigError(f"{entry.uri} is damaged ({error}); write it again, or leave it out.") from error
            if table.num_columns and len(table) != rows:
                raise ConfigError(f"{entry.uri} is damaged (rows of group {group} are missing); write it again.")
            for start in range(0, rows, BATCH_ROWS):
                part = table.slice(start, BATCH_ROWS)
                count = min(BATCH_ROWS, rows - start)
                yield _parquet_batch(entry, part, range(row + start, row + start + count), options)
            row += rows


def _parquet_batch(entry: Entry, table: pa.Table, rows: range, options: IndexOptions) -> pa.RecordBatch:
    numbers = pa.array(rows, pa.int64())
    if options.where:
        wanted = pc.equal(_column(table, options.where[0], pa.string(), entry.uri), options.where[1])
        table, numbers = table.filter(wanted), numbers.filter(wanted)
    count = len(numbers)

    def asked(name: str) -> pa.Array:
        return _column(table, name, pa.string(), entry.uri)

    def known(name: str, kind: pa.DataType) -> pa.Array:
        """Of a column that may be the user's own, and mean something else."""
        try:
            return _column(table, name, kind, entry.uri) if name in table.column_names else pa.nulls(count, kind)
        except ConfigError:
            return pa.nulls(count, kind)

    if options.source is None and options.source_column:
        source = asked(options.source_column)
        if source.null_count or pc.any(pc.equal(source, "")).as_py():
            _source(options, None, f"a row among {rows.start} to {rows.stop - 1}", entry.uri)
    else:
        source = pa.repeat(pa.scalar(_source(options, None, entry.key, entry.uri), pa.string()), count)
    columns = {
        "image_id": pa.array([f"{entry.key}#{row}" for row in numbers.to_pylist()], pa.string()),
        "uri": pa.repeat(pa.scalar(entry.uri), count),
        "container": pa.repeat(pa.scalar("parquet"), count),
        "offset": numbers,
        "source": source,
        "split": asked(options.split_column)
        if options.split_column
        else pa.repeat(pa.scalar(options.split, pa.string()), count),
        "size_bytes": pa.nulls(count, pa.int64()),
        "etag": pa.repeat(pa.scalar(entry.etag), count),
        "format": pc.utf8_lower(known("format", pa.string())),
        "width_px": known("width", pa.int32()),
        "height_px": known("height", pa.int32()),
        **{name: _column(table, name, None, entry.uri) for name in options.keep_columns},
    }
    return pa.RecordBatch.from_pydict(columns)


def _column(table: pa.Table, name: str, kind: pa.DataType | None, uri: str) -> pa.Array:
    """One column, as `kind` or as the type it has; a dictionary's values, since another file may have another one."""
    kind_there = table.schema.field(name).type
    if kind is None:
        kind = kind_there.value_type if pa.types.is_dictionary(kind_there) else kind_there
    try:
        found = table[name].combine_chunks()
        found.validate(full=True)  # a dictionary's numbers too
        _refuse_long(found, name, uri)
        found = found.cast(kind)
        found.validate(full=True)  # Parquet promises UTF-8, and Arrow believes it
        return found
    except pa.ArrowException as error:
        raise ConfigError(f"{uri}: column {name!r} can't be read as {kind} ({error}).") from error


def _refuse_long(column: pa.Array, name: str, uri: str) -> None:
    """Raises:
    ConfigError: a dictionary has a text that no label is as long as.
    """
    if not (pa.types.is_dictionary(column.type) and column.type.value_type in (pa.string(), pa.binary())):
        return
    longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    if longest > _MOST_LABEL_BYTES:
        raise ConfigError(f"{uri}: column {name!r} has a text of {longest} bytes; {_MOST_LABEL_BYTES} are allowed.")
