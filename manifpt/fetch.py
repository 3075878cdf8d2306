"""The bytes of manifest rows: whole objects, ranges of a tar, cells of a Parquet file."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.decode import MAX_BYTES
from manifpt.errors import BadImage, RejectReason, StorageError
from manifpt.storage import is_local, is_of_storage, store_of

__all__ = ["fetch", "image_column"]

_USUAL_COLUMNS = ("image", "img", "jpg", "png", "image_bytes")  # another binary column may hold a digest
_CELLS_BYTES = 256 << 20  # of cells in memory
_THREADS = 32  # requests in flight: small objects wait for latency, not for bandwidth
_LOCAL_THREADS = 4  # files: more would only wait for each other


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds images: a usual name where it can, else the first of binary or `struct<bytes, ...>`."""
    # By number, since a name may be there twice; such a column can't be asked for.
    found = [field.name for field in schema if _is_image(field.type) and schema.names.count(field.name) == 1]
    return min(found, key=lambda name: (name not in _USUAL_COLUMNS, found.index(name)), default=None)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(
            field.name == "bytes" and not pa.types.is_struct(field.type) and _is_image(field.type) for field in kind
        )
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def fetch(rows: list[dict[str, Any]], exact: bool = False) -> Iterator[bytes | BadImage]:
    """The bytes of each row, in order; an error that belongs to the image in place of its bytes.

    Args:
        rows: of a manifest, a shard or a reference: `uri`, `container`, `offset`, `size_bytes`; `etag` where known.
        exact: a file with another time stamp is another one, too: where it was indexed in this place, not copied since.

    Raises:
        StorageError: storage does not answer, which is no property of an image.
    """
    is_cell_n = [row["container"] == "parquet" and _is_placed(row) for row in rows]
    cells = _Cells([row for row, is_cell in zip(rows, is_cell_n, strict=True) if is_cell], exact)

    def one(row: dict[str, Any]) -> bytes | BadImage:
        if not _is_placed(row):
            return BadImage(RejectReason.CORRUPT, "its row in the manifest is damaged (offset or size): index again")
        data = _guarded(row)
        return _replaced() if exact and isinstance(data, bytes) and _is_replaced(row) else data

    threads = _LOCAL_THREADS if all(is_local(row["uri"]) for row in rows) else _THREADS
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Callable[[], bytes | BadImage]] = deque()  # bounded, so that large files don't pile up
        for row, is_cell in zip(rows, is_cell_n, strict=True):
            ahead.append(functools.partial(cells.take, row) if is_cell else pool.submit(one, row).result)
            if len(ahead) == 2 * threads:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()


def _is_placed(row: dict[str, Any]) -> bool:
    """Whether a row says where the bytes are, as far as its container needs that."""
    needed = {"tar": ("offset", "size_bytes"), "parquet": ("offset",)}.get(row["container"], ())
    return all(row[name] is not None for name in needed) and min(row["offset"] or 0, row["size_bytes"] or 0) >= 0


def _guarded(row: dict[str, Any]) -> bytes | BadImage:
    size_bytes = row["size_bytes"]
    if size_bytes is not None and size_bytes > MAX_BYTES:
        return BadImage(RejectReason.TOO_LARGE, f"{size_bytes} bytes; the limit is {MAX_BYTES}")
    uri = row["uri"]
    try:
        if row["container"] == "tar" and is_local(uri) and _is_changed(row):
            return _other_container()
        data = store_of(uri).read(
            uri,
            row["offset"],
            size_bytes if row["container"] == "tar" else None,
            # On a file system the time stamp in it changes with every copy; there the length must do.
            None if is_local(uri) else row.get("etag"),
        )
    except (OSError, BadImage) as error:
        return _as_bad(error)
    if size_bytes is not None and len(data) != size_bytes:
        return BadImage(RejectReason.CHANGED, f"{len(data)} bytes; {size_bytes} when it was indexed")
    return data


def _as_bad(error: Exception) -> BadImage:
    if isinstance(error, FileNotFoundError):
        return BadImage(RejectReason.MISSING, str(error))
    if isinstance(error, PermissionError):
        return BadImage(RejectReason.FORBIDDEN, str(error))
    if isinstance(error, BlockingIOError):
        return BadImage(RejectReason.CHANGED, str(error))
    if isinstance(error, BadImage):
        return error
    raise StorageError(str(error)) from error


def _is_changed(row: dict[str, Any]) -> bool:
    """Whether a file that holds images is of another length than the one that was indexed (its time stamp changes with
    every copy). Its rows or members may have moved then, and would be read as other images than those of their ids."""
    etag = row.get("etag")
    entry = store_of(row["uri"]).stat(row["uri"]) if etag is not None else None
    if etag is None or entry is None:
        return False  # reading tells better
    return entry.etag.rpartition("-")[2] != etag.rpartition("-")[2]


def _is_replaced(row: dict[str, Any]) -> bool:
    """Of a file, whether it is another one than was indexed in this place; after reading it, so that what was replaced
    before now is seen."""
    if not is_local(row["uri"]):
        return False
    entry = store_of(row["uri"]).stat(row["uri"])
    return entry is None or entry.etag != row["etag"]


def _replaced() -> BadImage:
    return BadImage(RejectReason.CHANGED, "replaced since it was indexed")


def _other_container() -> BadImage:
    return BadImage(RejectReason.CHANGED, "the file that holds it is another one than when it was indexed")


class _Cells:
    """Cells of Parquet files, each file read once, in the order of its rows, and as far as is asked for; what is passed
    on the way is held until it is asked for."""

    def __init__(self, rows: list[dict[str, Any]], exact: bool) -> None:
        self._asked: Counter[tuple[str, int]] = Counter((row["uri"], row["offset"]) for row in rows)
        numbers: dict[str, set[int]] = defaultdict(set)
        for row in rows:
            numbers[row["uri"]].add(row["offset"])
        first = {row["uri"]: row for row in reversed(rows)}
        self._files = {uri: _cells_of(row, sorted(numbers[uri]), exact) for uri, row in first.items()}
        self._left = {uri: len(of_file) for uri, of_file in numbers.items()}
        self._held: dict[tuple[str, int], bytes | BadImage] = {}

    def take(self, row: dict[str, Any]) -> bytes | BadImage:
        key = row["uri"], row["offset"]
        while key not in self._held:
            number, cell = next(self._files[row["uri"]])
            self._held[row["uri"], number] = cell
            self._left[row["uri"]] -= 1
            if not self._left[row["uri"]]:
                self._files.pop(row["uri"]).close()  # the file, too
        self._asked[key] -= 1
        return self._held[key] if self._asked[key] else self._held.pop(key)


def _cells_of(
    first: dict[str, Any], numbers: list[int], exact: bool
) -> Generator[tuple[int, bytes | BadImage], None, None]:
    """Of one file, a cell for every number; `first` is a row of it."""
    uri, left = first["uri"], dict.fromkeys(numbers)
    try:
        if is_local(uri) and _is_changed(first):
            bad = _other_container()
        else:
            with store_of(uri).open(uri, first.get("etag")) as stream:
                for number, cell in _read_cells(pq.ParquetFile(stream), numbers):
                    del left[number]
                    yield number, _replaced() if exact and _is_replaced(first) else cell
            return
    except BlockingIOError:
        bad = _other_container()
    except (FileNotFoundError, PermissionError) as error:
        bad = _as_bad(error)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if is_of_storage(error):
            raise StorageError(str(error)) from error
        bad = BadImage(RejectReason.CORRUPT, f"Parquet: {error}")
    for number in left:
        yield number, bad


def _read_cells(file: pq.ParquetFile, numbers: list[int]) -> Iterator[tuple[int, bytes | BadImage]]:
    column = image_column(file.schema_arrow)
    remaining = sorted(numbers)
    if column is None:
        yield from (
            (number, BadImage(RejectReason.MISSING, "no image column in the Parquet file")) for number in numbers
        )
        return
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        here = [number for number in remaining if start <= number < stop]
        if here:
            is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
            # Of all columns, before compression: no value is longer. To ask for one column (`row_group(g).column(n)`)
            # ends the process where the file's statistics are damaged.
            size_bytes = file.metadata.row_group(group).total_byte_size
            if size_bytes > MAX_BYTES * (stop - start):
                bad = BadImage(RejectReason.TOO_LARGE, f"Parquet: {size_bytes} bytes in {stop - start} rows")
                yield from ((number, bad) for number in here)
                remaining, start = remaining[len(here) :], stop
                continue
            # Batches keep the memory to a few cells where one group holds a whole data set. A dictionary's value may
            # stand in every row, so that a file of a kilobyte holds a terabyte: that many rows at once none can fill.
            position, most = start, max(1, min(1024, _CELLS_BYTES // max(1, size_bytes)))
            for batch in file.iter_batches(most, row_groups=[group], columns=[column], use_threads=False):
                for number in [n for n in here if position <= n < position + len(batch)]:
                    cell = batch.column(0)[number - position]
                    value = cell.get("bytes") if is_struct and cell.is_valid else cell
                    yield number, value.as_py() if value is not None and value.is_valid else b""
                position += len(batch)
                if position > here[-1]:
                    break
            for number in [n for n in here if n >= position]:
                yield number, BadImage(RejectReason.CORRUPT, f"Parquet: row group {group} ends before row {number}")
        remaining = remaining[len(here) :]
        start = stop
    for number in remaining:
        yield number, BadImage(RejectReason.MISSING, f"no row {number} in the Parquet file")
