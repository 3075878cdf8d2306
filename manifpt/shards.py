"""Parts and commits: how a shard gets from "computed" to "done", once, whoever else tries the same.

1. Every part is created under its deterministic name, or found there: a name, once taken, is never written again.
2. The commit file is created last. It holds what was found out: rows, bytes, SHA-256, rejected images.

A shard is done when its commit is there. A process may die between any two steps: the next one computes the same bytes,
finds some parts already there, and goes on. Two runs on one folder race for names, and whoever comes second adopts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.storage import join, store_of

__all__ = ["Rejected", "commit_shard", "committed_shards", "read_commits", "write_rejected"]

_REJECTED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("source", pa.string()),
        pa.field("space", pa.string()),  # null: in every space
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row of `rejected.parquet`."""

    image_id: str
    uri: str
    source: str
    space: str | None
    reason: str
    detail: str


def commit_shard(
    output: str,
    shard: int,
    parts: dict[str, bytes],
    rejected: list[Rejected],
    statistics: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Publishes a shard's parts, then its commit.

    Args:
        output: the run folder.
        shard: its number.
        parts: Parquet files by path relative to `output`.
        rejected: images without a row in one part or in all.
        statistics: mergeable sums by space and source.
        seconds: how long the stages took.

    Returns:
        The commit; that of the process which was first, where there was one.
    """
    described = {}
    for path, data in parts.items():
        uri = join(output, path)
        if not store_of(uri).create(uri, data):
            data = _adopted(uri, data)
        rows = pq.read_metadata(pa.BufferReader(data)).num_rows
        described[path] = {"rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit = {
        "shard": shard,
        "parts": described,
        "rejected": [[r.image_id, r.uri, r.source, r.space, r.reason, r.detail] for r in rejected],
        "rejected_images": len({r.image_id for r in rejected}),
        "statistics": statistics,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
    uri = join(output, "commits", f"{shard:05d}.json")
    if store_of(uri).create(uri, json.dumps(commit).encode()):
        return commit
    first: dict[str, Any] = json.loads(store_of(uri).read(uri))
    return first


def _adopted(uri: str, data: bytes) -> bytes:
    """The part that is there already. Ours replaces it only where it is damaged, which no run of ours can cause."""
    there = store_of(uri).read(uri)
    if there == data:
        return data
    try:
        if pq.read_metadata(pa.BufferReader(there)).num_rows == pq.read_metadata(pa.BufferReader(data)).num_rows:
            return there
    except pa.ArrowInvalid:
        pass
    store_of(uri).write(uri, data)
    return data


def committed_shards(output: str) -> set[int]:
    """Numbers of the shards that are done: one list call a thousand."""
    uri = join(output, "commits")
    try:
        names = [entry.key for entry in store_of(uri).list(uri)]
    except FileNotFoundError:
        return set()
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[:-5].isdigit()}


def read_commits(output: str, shards: Sequence[int]) -> Iterator[dict[str, Any]]:
    """All commits in order, a few dozen requests ahead."""

    def read(shard: int) -> dict[str, Any]:
        uri = join(output, "commits", f"{shard:05d}.json")
        commit: dict[str, Any] = json.loads(store_of(uri).read(uri))
        return commit

    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(shards), 256):  # a million commits must not be in memory at once
            yield from pool.map(read, shards[start : start + 256])


def write_rejected(output: str, commits: Iterator[dict[str, Any]]) -> None:
    """`rejected.parquet` from commits, in the order of the manifest; also where nothing was rejected."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, _REJECTED_SCHEMA, compression="zstd") as writer:
        for commit in commits:
            if commit["rejected"]:
                columns = [list(values) for values in zip(*commit["rejected"], strict=True)]
                writer.write_table(pa.table(columns, schema=_REJECTED_SCHEMA))
    uri = join(output, "rejected.parquet")
    store_of(uri).write(uri, sink.getvalue().to_pybytes())
