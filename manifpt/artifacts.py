"""Artifacts as they are stored: an Arrow table a shard and space, which any Parquet reader understands.

Legend: B images, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.errors import ConfigError

__all__ = ["INLINE_LIMIT_BYTES", "artifact_table", "in_format", "parquet_bytes", "tensor_column", "to_numpy"]

# Beyond this many bytes a row, `--store auto` keeps neighbour and distance only; a reader makes the artifact again.
INLINE_LIMIT_BYTES = 128 << 10


def artifact_table(
    rows: pa.Table,
    artifact_bd: np.ndarray | None,
    shape: tuple[int, ...],
    metadata: Mapping[str, Any],
) -> pa.Table:
    """The rows of one artifact shard.

    Args:
        rows: the images' columns, with `neighbor_id` and `distance`, B rows.
        artifact_bd: [B, D], in the number format to be stored; None: neighbour and distance only.
        shape: of one embedding, `(D,)` or `(3, H, W)`.
        metadata: becomes the file's key-value metadata, each key under `manifpt.`.
    """
    if artifact_bd is not None:
        rows = rows.append_column("artifact", tensor_column(artifact_bd.reshape(-1, *shape)))
    return rows.replace_schema_metadata(
        {f"manifpt.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    )


def in_format(artifact_bd: np.ndarray, dtype: str, space: str) -> np.ndarray:
    """In the number format of the shards: the only rounding of an artifact.

    Raises:
        ConfigError: numbers that it can't hold.
    """
    with np.errstate(over="ignore"):
        stored = artifact_bd.astype(dtype)
    if not np.isfinite(stored).all():
        raise ConfigError(f"Artifacts of space {space!r} are too large for {dtype}; use --dtype float32.")
    return stored


def tensor_column(array: np.ndarray) -> pa.Array:
    """[B, ...] -> B rows of Arrow's canonical `arrow.fixed_shape_tensor`."""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    width = int(np.prod(array.shape[1:]))
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, width))


def to_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The inverse of `tensor_column`; a view where the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column.to_numpy_ndarray()


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file of a table, the same bytes for the same table.

    float32 is split by byte before zstd, which takes up to a third off. float16 is not: the split would take off a
    tenth, and DuckDB (2.0) can't read it. A dictionary of numbers would only cost time.
    """
    tensors = [f.name for f in table.schema if isinstance(f.type, pa.FixedShapeTensorType)]
    split = [name for name in tensors if table.schema.field(name).type.value_type == pa.float32()]
    others = [name for name in table.column_names if name not in tensors]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[name for name in others if name != "distance"],
        use_byte_stream_split=[f"{name}.list.element" for name in split],
        write_statistics=others,
        row_group_size=max(1, len(table)),
    )
    return sink.getvalue().to_pybytes()
