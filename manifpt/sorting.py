"""Sorting more rows than memory holds, and walking several sorted streams side by side.

Legend: a *run* is a sorted chunk of rows on local disk, from which the whole order is merged. Text is ordered by its
UTF-8 bytes, which is how Arrow, S3 listings and Python's `str` order it.
"""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from manifpt.errors import ConfigError

__all__ = ["aligned", "sorted_tables"]

_RUN_ROWS = 131_072
_SAMPLE_EVERY = 1_024


def sorted_tables(batches: Iterable[pa.RecordBatch], key: str) -> Iterator[pa.Table]:
    """All rows in the order of a column, as tables of about `_RUN_ROWS` rows; nothing for no rows.

    Memory holds `_RUN_ROWS` rows and what a merge step needs, however many rows come. Equal keys stay together.

    Args:
        batches: rows in any order, of schemas that can be unified.
        key: a column of text without nulls.

    Raises:
        ConfigError: columns that have no common type.
    """
    with tempfile.TemporaryDirectory(prefix="manifpt-sort-") as folder:
        runs = [pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0) for path in _spill(batches, key, Path(folder))]
        if runs:
            yield from _merge(runs, key)


def _spill(batches: Iterable[pa.RecordBatch], key: str, folder: Path) -> Iterator[Path]:
    held: list[pa.RecordBatch] = []
    rows, count = 0, 0

    def flush() -> Path:
        nonlocal rows, count
        schema = _unified([batch.schema for batch in held])
        table = pa.concat_tables([_cast(pa.table(batch), schema) for batch in held]).sort_by(key).combine_chunks()
        if len(table.to_batches()) != 1:  # combine_chunks keeps chunks that one array can't hold
            raise ConfigError("The kept columns hold more than 2 GiB in few rows; keep less with --keep-columns.")
        path = folder / f"run-{count}.arrow"
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_batch(table.to_batches()[0])
        held.clear()
        rows = 0
        count += 1
        return path

    for batch in batches:
        for start in range(0, len(batch), _RUN_ROWS):
            part = batch.slice(start, _RUN_ROWS)
            held.append(part)
            rows += len(part)
            if rows >= _RUN_ROWS:
                yield flush()
    if held:
        yield flush()


def _merge(runs: list[pa.RecordBatch], key: str) -> Iterator[pa.Table]:
    """The key range is cut at samples, and each part sorted by itself."""
    schema = _unified([run.schema for run in runs])
    keys = [run[key] for run in runs]
    samples = sorted(column[row].as_py() for column in keys for row in range(0, len(column), _SAMPLE_EVERY))
    cuts = samples[_RUN_ROWS // _SAMPLE_EVERY :: _RUN_ROWS // _SAMPLE_EVERY]
    starts = [0] * len(runs)
    for cut in [*cuts, None]:
        ends = [
            len(column) if cut is None else _place(column, cut, start)
            for column, start in zip(keys, starts, strict=True)
        ]
        parts = [pa.table(run.slice(a, b - a)) for run, a, b in zip(runs, starts, ends, strict=True) if b > a]
        if parts:
            yield pa.concat_tables([_cast(part, schema) for part in parts]).sort_by(key)
        starts = ends


def _place(column: pa.Array, value: str, start: int = 0, after: bool = False) -> int:
    """Where a value belongs in a sorted column: before its equals, or after them."""
    find = bisect.bisect_right if after else bisect.bisect_left
    return find(range(len(column)), value, lo=start, key=lambda row: column[row].as_py())


def _unified(schemas: list[pa.Schema]) -> pa.Schema:
    """One schema for inputs that differ in which kept columns they have a type for."""
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(f"The inputs give a kept column two types ({error}); index them apart.") from error


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    try:
        return table.cast(schema)
    except pa.ArrowInvalid as error:  # whole numbers over 2^53 beside fractions
        raise ConfigError(
            f"The inputs give a kept column values that no one type has ({error}); index them apart."
        ) from error


def aligned(streams: Sequence[Iterator[pa.Table]], key: str) -> Iterator[tuple[pa.Table | None, ...]]:
    """Walks sorted streams together: of each the rows of one key range after the other, None where it has none.

    All rows with one key come in one step. Memory holds a table or two of each stream.

    Args:
        streams: tables in the order of `key`, in each stream and across its tables.
        key: a column of text that all of them have.
    """
    held: list[pa.Table | None] = [None] * len(streams)
    is_over = [False] * len(streams)
    while True:
        for n, stream in enumerate(streams):
            while held[n] is None and not is_over[n]:
                table = next(stream, None)
                is_over[n] = table is None
                held[n] = table.combine_chunks() if table is not None and len(table) else None
        # Up to the smallest of the last keys that are held, no stream can bring anything more, but that key itself.
        ends = [
            table[key][-1].as_py() for table, over in zip(held, is_over, strict=True) if table is not None and not over
        ]
        if not any(table is not None for table in held):
            return
        bound = min(ends) if ends else None
        step: list[pa.Table | None] = []
        for n, table in enumerate(held):
            count = 0 if table is None else len(table) if bound is None else _place(_column(table, key), bound)
            step.append(table.slice(0, count) if table is not None and count else None)
            held[n] = table.slice(count) if table is not None and count < len(table) else None
        if any(table is not None for table in step):
            yield tuple(step)
        elif bound is not None:  # all that is held begins with the bound: more of it may follow
            for n, stream in enumerate(streams):
                table = held[n]
                if table is not None and not is_over[n] and table[key][-1].as_py() == bound:
                    more = next(stream, None)
                    is_over[n] = more is None
                    held[n] = pa.concat_tables([table, more]).combine_chunks() if more is not None else table


def _column(table: pa.Table, key: str) -> pa.Array:
    return table[key].combine_chunks()
