"""JSON, Parquet and safetensors that others may have written: what they hold, or one sentence of why not.

Whoever reads a run, a bundle or a manifest reads what came over a network or from another person. Damage and malice
look alike here, and both end as a `ConfigError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.errors import ConfigError
from manifpt.storage import is_of_storage, store_of

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "Kinds",
    "check_columns",
    "check_rows",
    "json_of",
    "load_tensors",
    "object_of",
    "parquet_errors",
    "stored_object",
    "table_of",
    "tensors_of",
]

Kinds = Mapping[str, type | tuple[type, ...]]


def json_of(data: bytes, where: str) -> Any:
    """What JSON says.

    Args:
        data: of the document, UTF-8.
        where: it is, for the message.

    Raises:
        ConfigError: it is none, or nests too deep to read.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged ({error}): restore it, or make it again.") from error


def object_of(found: Any, where: str, kinds: Kinds) -> dict[str, Any]:
    """A JSON object that has some names, each of its kind; it may have others.

    Args:
        found: what `json_of` returned, or a part of it.
        where: it is, for the message.
        kinds: types by name; `bool` is no `int` here.

    Raises:
        ConfigError: it is something else; the sentence says what is wrong first.
    """
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is damaged (no object): restore it, or make it again.")
    for name, kind in kinds.items():
        value = found.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            what = "is missing" if name not in found else f"can't be {str(value)[:50]!r}"
            raise ConfigError(f"{where} is damaged ({name} {what}): restore it, or make it again.")
    return found


def stored_object(uri: str, kinds: Kinds) -> dict[str, Any] | None:
    """The JSON object of a file, see `object_of`; None: there is no such file.

    Raises:
        ConfigError: it is something else.
    """
    try:
        data = store_of(uri).read(uri)
    except FileNotFoundError:
        return None
    return object_of(json_of(data, uri), uri, kinds)


def check_columns(schema: pa.Schema, where: str, kinds: Mapping[str, pa.DataType]) -> None:
    """Raises:
    ConfigError: a column is missing, there twice or of another type.
    """
    for name, kind in kinds.items():
        found = [field.type for field in schema if field.name == name]
        if found != [kind]:
            is_what = f"is {found[0]}, not {kind}" if len(found) == 1 else f"is there {len(found)} times"
            raise ConfigError(f"{where} is damaged (column {name!r} {is_what}): make it again.")


_MOST_ROWS_A_BYTE = 1_000  # nothing of ours comes near, and a footer may claim anything


def check_rows(metadata: pq.FileMetaData, size_bytes: int, where: str) -> None:
    """Raises:
    ConfigError: a footer claims rows that the file can't hold, or that its groups don't have.
    """
    counts = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    if sum(counts) != metadata.num_rows or min(counts, default=0) < 0 or sum(counts) > _MOST_ROWS_A_BYTE * size_bytes:
        raise ConfigError(f"{where} is damaged ({metadata.num_rows} rows in {size_bytes} bytes): make it again.")


@contextmanager
def parquet_errors(where: str) -> Iterator[None]:
    """What Arrow raises on damaged Parquet, as a `ConfigError`; storage's own errors stay what they are."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if is_of_storage(error):
            raise
        raise ConfigError(f"{where} is damaged ({' '.join(str(error).split())[:200]}): make it again.") from error


def table_of(data: bytes, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file as a table, its text checked, since Parquet promises UTF-8 and Arrow believes it.

    Raises:
        ConfigError: it is none, or lacks a column.
    """
    with parquet_errors(where):
        table = pq.read_table(pa.BufferReader(data), columns=columns and list(columns), use_threads=False)
        table.validate(full=True)
    for name in columns or ():
        if table.column_names.count(name) != 1:
            raise ConfigError(f"{where} is damaged (no column {name!r}): make it again.")
    return table


def tensors_of(data: bytes, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConfigError: it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load  # torch costs seconds

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{where} is no safetensors file ({error}): get it again.") from error


def load_tensors(network: nn.Module, data: bytes, where: str) -> None:
    """Takes over the tensors of a safetensors file, which must be just the network's, of its types and shapes.

    The network may be on the device `meta`, where it has no memory: it then has as much as the file holds.

    Raises:
        ConfigError: they aren't.
    """
    found, wanted = tensors_of(data, where), network.state_dict()
    same = set(found) == set(wanted)
    if not same or any((found[n].dtype, found[n].shape) != (wanted[n].dtype, wanted[n].shape) for n in wanted):
        raise ConfigError(f"{where} is damaged (weights of another network): get it or make it again.")
    network.load_state_dict(found, assign=True)
