"""Damage: to bytes, to JSON, to Parquet files and to safetensors. All of it follows from the dice."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Document", "damaged_bytes", "damaged_json", "damaged_parquet", "damaged_safetensors"]

Document = Any

_NUMBERS = (0, 1, -1, 2, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 64)
_STRINGS = ("", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\n\r\x1b[31m", "\ud800", "x" * 5000, "<script>",
            "=cmd|' /C calc'!A0", "rgb", "nearest", "s3://", "NaN", "float16", "head", "./.", "é" * 100)  # fmt: skip
_VALUES: tuple[Document, ...] = (
    *_NUMBERS, *_STRINGS, None, True, False, 0.5, -0.0, 1e308, math.nan, math.inf, [], {}, [[]], [None], {"": None},
    ["x"] * 50, [0] * 50, [3, 32, 32], [-1], [3, -1, 7], {"name": "rgb"}, {"name": "rgb", "kind": "rgb"},
)  # fmt: skip


def damaged_bytes(data: bytes, dice: random.Random, most_bytes: int = 1 << 20) -> bytes:
    """One to four changes: bits, bytes, numbers, cuts, copies. Half of them near an end, where headers are."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place = _place(len(found), dice)
        length = dice.choice((1, 1, 2, 4, 8, 64))
        change = dice.randrange(7)
        if change == 0 and found:
            found[min(place, len(found) - 1)] ^= 1 << dice.randrange(8)
        elif change == 1:
            found[place : place + length] = dice.randbytes(length)
        elif change == 2:
            size = dice.choice((1, 2, 4, 8))
            number = dice.choice(_NUMBERS) + dice.choice((0, 0, -1, 1))
            found[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, dice.choice(("little", "big")))
        elif change == 3:
            del found[place : place + length]
        elif change == 4:
            found[place:place] = found[(other := _place(len(found), dice)) : other + length]
        elif change == 5:
            found[place:place] = dice.randbytes(length)
        else:
            del found[place:]
    return bytes(found[:most_bytes])


def _place(length: int, dice: random.Random) -> int:
    near = min(length, 64)
    return dice.choice((dice.randint(0, length), dice.randint(0, near), length - dice.randint(0, near)))


def damaged_json(data: bytes, dice: random.Random) -> bytes:
    """A document with one to three other values, or no document any more."""
    if dice.random() < 0.15:
        return damaged_bytes(data, dice)
    if dice.random() < 0.02:
        depth = dice.choice((500, 100_000))
        return b"[" * depth + dice.choice((b"", b"]" * depth))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return damaged_bytes(data, dice)
    for _ in range(dice.choice((1, 1, 2, 3))):
        document = _changed(document, dice)
    return json.dumps(document).encode()


def _changed(document: Document, dice: random.Random) -> Document:
    """With one node replaced, removed, renamed or doubled."""
    if not isinstance(document, dict | list) or not document or dice.random() < 0.1:
        return copy.deepcopy(dice.choice(_VALUES))
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = dice.choice(keys)
    found: Any = dict(document) if isinstance(document, dict) else list(document)
    change = dice.randrange(10)
    if change == 0:
        del found[key]
    elif change == 1 and isinstance(found, dict):
        found[dice.choice(_STRINGS)] = found.pop(key)
    elif change == 2 and isinstance(found, list):
        found *= dice.choice((2, 40))
    elif change == 3 and isinstance(found, dict):
        found[dice.choice(_STRINGS)] = copy.deepcopy(dice.choice(_VALUES))
    elif change < 6:
        found[key] = copy.deepcopy(dice.choice(_VALUES))
    else:
        found[key] = _changed(found[key], dice)
    return found


def damaged_parquet(data: bytes, dice: random.Random) -> bytes:
    """Damaged bytes, most of them in the footer, or a good file of another table."""
    if dice.random() < 0.6 and len(data) > 12:
        footer = min(struct.unpack("<I", data[-8:-4])[0], len(data) - 12)
        start = len(data) - 8 - footer
        part = dice.choice((data[start:-8], data[start:-8], data[4:start], data))
        damaged = damaged_bytes(part, dice)
        if part is data:
            return damaged
        pages, tail = (data[:start], damaged) if part == data[start:-8] else (b"PAR1" + damaged, data[start:-8])
        return pages + tail + struct.pack("<I", len(tail)) + b"PAR1"
    try:
        table = pq.read_table(io.BytesIO(data))
        return _as_parquet(_other_table(table, dice), dice)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, NotImplementedError, OverflowError):
        return damaged_bytes(data, dice)


def _as_parquet(table: pa.Table, dice: random.Random) -> bytes:
    sink = io.BytesIO()
    codec = dice.choice(("none", "snappy", "zstd"))
    pq.write_table(table, sink, compression=codec, row_group_size=dice.choice((1, 3, 1 << 20)))
    return sink.getvalue()


def _other_table(table: pa.Table, dice: random.Random) -> pa.Table:
    for _ in range(dice.choice((1, 1, 2))):
        table = dice.choice(_TABLE_CHANGES)(table, dice)
    return table


def _without_column(table: pa.Table, dice: random.Random) -> pa.Table:
    return table.drop_columns([dice.choice(table.column_names)]) if table.column_names else table


def _other_column(table: pa.Table, dice: random.Random) -> pa.Table:
    """One column with values of any kind."""
    name, rows = dice.choice(table.column_names or ["x"]), len(table)
    kind = dice.choice(_KINDS)
    columns = {other: table[other] for other in table.column_names}
    columns[name] = kind(rows, dice)
    return pa.table(columns).replace_schema_metadata(table.schema.metadata)


def _cast(table: pa.Table, dice: random.Random) -> pa.Table:
    number = dice.randrange(max(1, table.num_columns))
    kind = dice.choice((pa.large_string(), pa.binary(), pa.int8(), pa.int32(), pa.float64(), pa.string()))
    column = table.column(number).cast(kind, safe=False)
    if dice.random() < 0.3:
        column = column.dictionary_encode()
    return table.set_column(number, table.field(number).name, column)


def _rows(table: pa.Table, dice: random.Random) -> pa.Table:
    count = dice.choice((0, 1, len(table) * 2))
    return pa.concat_tables([table, table]).slice(0, count)


def _metadata(table: pa.Table, dice: random.Random) -> pa.Table:
    found = dict(table.schema.metadata or {b"manifpt.space": b"rgb"})
    key = dice.choice(list(found))
    found[key] = damaged_json(found[key], dice) if dice.random() < 0.7 else dice.randbytes(8)
    return table.replace_schema_metadata(found)


def _doubled(table: pa.Table, dice: random.Random) -> pa.Table:
    number = dice.randrange(max(1, table.num_columns))
    return table.append_column(table.field(number), table.column(number))


_TABLE_CHANGES: tuple[Callable[[pa.Table, random.Random], pa.Table], ...] = (
    _without_column, _other_column, _other_column, _cast, _rows, _metadata, _metadata, _doubled,
)  # fmt: skip


def _texts(rows: int, dice: random.Random) -> pa.Array:
    texts = [text for text in _STRINGS if text.isprintable() or text.isascii()]
    return pa.array([dice.choice((*texts, None)) for _ in range(rows)], pa.string())


_KINDS: tuple[Callable[[int, random.Random], pa.Array], ...] = (
    _texts,
    _texts,
    lambda rows, dice: pa.nulls(rows),
    lambda rows, dice: pa.array([dice.choice([n for n in _NUMBERS if n < 1 << 63]) for _ in range(rows)], pa.int64()),
    lambda rows, dice: pa.array(np.full(rows, dice.choice((np.nan, np.inf, 0.0))), pa.float32()),
    lambda rows, dice: pa.array([dice.randbytes(8) for _ in range(rows)], pa.binary()),
    lambda rows, dice: pa.array([[[1]]] * rows, pa.list_(pa.list_(pa.int8()))),
    lambda rows, dice: pa.array([{"bytes": {"bytes": b"x"}}] * rows),
    lambda rows, dice: pa.array([b"12345678"] * rows, pa.binary(8)),
    lambda rows, dice: pa.array([dice.random() < 0.5 for _ in range(rows)], pa.bool_()),
)


def damaged_safetensors(data: bytes, dice: random.Random) -> bytes:
    """Damaged bytes, another length of the header, or another header."""
    if dice.random() < 0.4 or len(data) < 8:
        return damaged_bytes(data, dice)
    length = struct.unpack("<Q", data[:8])[0]
    if dice.random() < 0.2:
        return struct.pack("<Q", dice.choice((*_NUMBERS[:-1], 1 << 60, length - 1, length + 1)) % (1 << 64)) + data[8:]
    header = damaged_json(data[8 : 8 + length], dice)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
