"""One shard in one cell: named arrays and tables as bytes, between two stages.

Ray Data may cut and merge blocks of rows as it likes. A row that holds a whole shard can't be cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

__all__ = ["cell", "pack", "unpack"]

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("dtype", pa.string()),  # null: an Arrow table
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("data", pa.large_binary()),
    ]
)


def cell(data: pa.Buffer) -> pa.Array:
    """A large_binary array of one value, without the copy that `pa.array` would make."""
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def pack(items: Mapping[str, np.ndarray | pa.Table]) -> pa.Buffer:
    """Arrays and tables as one Arrow stream."""
    batches = []
    for name, item in items.items():
        if isinstance(item, pa.Table):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, item.schema) as writer:
                writer.write_table(item)
            dtype, shape, data = None, [], sink.getvalue()
        else:
            flat = np.ascontiguousarray(item).reshape(-1)
            dtype, shape, data = flat.dtype.str, list(np.shape(item)), pa.py_buffer(flat.view(np.uint8))
        described = [pa.array([name]), pa.array([dtype], pa.string()), pa.array([shape], pa.list_(pa.int64()))]
        columns = [*described, cell(data)]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def unpack(buffer: pa.Buffer) -> dict[str, np.ndarray | pa.Table]:
    """The inverse of `pack`; arrays are read-only views of the buffer."""
    items: dict[str, np.ndarray | pa.Table] = {}
    for batch in pa.ipc.open_stream(buffer):
        name, dtype, shape = (batch.column(i)[0].as_py() for i in range(3))
        data = batch.column(3)[0].as_buffer()
        items[name] = (
            pa.ipc.open_stream(data).read_all()
            if dtype is None
            else np.frombuffer(data, np.dtype(dtype)).reshape(shape)
        )
    return items
