"""Parts and commits: how a shard gets from "computed" to "done", once, whoever else tries the same.

1. Every part is created under its deterministic name, or found there: a name, once taken, is never written again, but
   for a file that is no Parquet, which only a broken file system leaves.
2. The commit file is created last. It holds what was found out: rows, bytes, SHA-256, rejected images.

A shard is done when its commit is there. A process may die between any two steps: the next one computes the same bytes,
finds some parts already there, and goes on. Two runs on one folder race for names, and whoever comes second adopts what
is there; where the two read an image differently (it came or went meanwhile), the commit says what the part holds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.artifacts import parquet_bytes
from manifpt.documents import Kinds, json_of, object_of, table_of
from manifpt.errors import ConfigError
from manifpt.storage import join, store_of

__all__ = ["REJECTED_COLUMNS", "Rejected", "commit_shard", "committed_shards", "is_part_path", "part_path",
           "read_commit", "read_commits", "read_part", "reject_reasons", "tally", "write_rejected"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row of `rejected.parquet`; `space` is null for an image that has no row in any space."""

    image_id: str
    uri: str
    source: str
    space: str | None
    reason: str
    detail: str


REJECTED_COLUMNS = pa.schema([pa.field(name, pa.string()) for name in Rejected.__dataclass_fields__])


def part_path(group: str, name: str, shard: int) -> str:
    """Of a part relative to the output folder: `artifacts/<space>/...` or `embeddings/<code>/...`."""
    return f"{group}/{name}/part-{shard:05d}.parquet"


# The second step is a code's or a space's name: nothing in it may lead out of the folder.
_PATH = re.compile(r"((artifacts|embeddings)/(?!\.)[^/\\\x00-\x1f]+|attributions)/part-\d{5,}\.parquet")


def is_part_path(path: str) -> bool:
    """Whether it is that of a part of ours."""
    return _PATH.fullmatch(path) is not None


def read_part(
    output: str, path: str, columns: list[str] | None = None, commit: Mapping[str, Any] | None = None
) -> pa.Table:
    """One part.

    Args:
        output: the run folder.
        path: of `part_path`.
        columns: of these only; None: all.
        commit: the shard's, which says what the part has to be; None: not compared.

    Raises:
        ConfigError: it is damaged, or not what the commit says.
    """
    uri = join(output, path)
    data = store_of(uri).read(uri)
    if commit is not None and hashlib.sha256(data).hexdigest() != commit["parts"].get(path, {}).get("sha256"):
        raise ConfigError(
            f"{uri} is not what the commit of shard {commit['shard']} says: delete both, and the command that made "
            f"them computes the shard again."
        )
    return table_of(data, uri, columns)


def commit_shard(
    output: str,
    shard: int,
    parts: Mapping[str, pa.Table],
    rejected: Sequence[Rejected],
    seconds: Mapping[str, float],
    statistics: Callable[[Mapping[str, pa.Table]], dict[str, Any]] = lambda parts: {},
    part_of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Publishes a shard's parts, then its commit.

    Args:
        output: the run folder.
        shard: its number.
        parts: tables by path relative to `output`, with an `image_id` and the plan's digest in their metadata.
        rejected: images without a row in one part or in all.
        seconds: how long the stages took.
        statistics: sums over the parts that the commit keeps.
        part_of: the part that holds a space's images, by the space's name, where that isn't the part's name.

    Returns:
        The commit; that of the process which was first, where there was one.

    Raises:
        ConfigError: the folder holds parts of another plan.
    """
    described, held = {}, dict(parts)
    for path, table in parts.items():
        data = parquet_bytes(table)
        uri = join(output, path)
        if not store_of(uri).create(uri, data):
            data, held[path] = _adopted(uri, data, table)
        described[path] = {"rows": len(held[path]), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if any(held[path] is not table for path, table in parts.items()):
        rejected = _reconciled(parts, held, rejected, part_of or {})
    commit = {
        "shard": shard,
        "parts": described,
        "rejected": [list(astuple(r)) for r in rejected],
        "rejected_images": len({r.image_id for r in rejected}),
        "statistics": statistics(held),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
    uri = join(output, "commits", f"{shard:05d}.json")
    if store_of(uri).create(uri, json.dumps(commit).encode()):
        return commit
    return _commit_of(store_of(uri).read(uri), uri, shard)


def _adopted(uri: str, data: bytes, table: pa.Table) -> tuple[bytes, pa.Table]:
    """The part that is there already, and its table. Ours replaces it only where it is no Parquet file at all."""
    there = store_of(uri).read(uri)
    if there == data:
        return data, table
    try:
        found = table_of(there, uri)
    except ConfigError:  # truncated by a file system, say: no run of ours leaves such a file
        store_of(uri).write(uri, data)
        return data, table
    if (found.schema.metadata or {}).get(b"manifpt.plan_digest") != table.schema.metadata[b"manifpt.plan_digest"]:
        raise ConfigError(f"{uri} is of another run: choose another --output, or delete the folder.")
    return there, found


def _reconciled(
    ours: Mapping[str, pa.Table], held: Mapping[str, pa.Table], rejected: Sequence[Rejected], part_of: Mapping[str, str]
) -> list[Rejected]:
    """Rejected images as the held parts have them: every image of the shard has a row in a part or is listed."""
    known = {r.image_id: (r.uri, r.source) for r in rejected}
    for table in (*ours.values(), *held.values()):
        sources = table["source"].to_pylist() if "source" in table.column_names else ["real"] * len(table)
        sources = [source or "" for source in sources]  # of an image without a verdict: a scan's manifest names none
        known.update(
            zip(table["image_id"].to_pylist(), zip(table["uri"].to_pylist(), sources, strict=True), strict=True)
        )
    tables = {path.split("/")[1]: table for path, table in held.items()}
    ids = {name: set(table["image_id"].to_pylist()) for name, table in tables.items()}
    why: dict[tuple[str, str], list[Rejected]] = {}
    without_part: dict[str, list[Rejected]] = {}  # of spaces in which no image of the shard came through
    for r in rejected:
        names = dict.fromkeys(part_of.get(space, space) for space in r.space.split(", ")) if r.space else tables
        for name in names:
            if name in tables:
                why.setdefault((r.image_id, name), []).append(r)
            else:
                without_part.setdefault(r.image_id, []).append(r)
    out = []
    for image_id, (uri, source) in sorted(known.items()):
        absent = [name for name in tables if image_id not in ids[name]]
        detail = "another run of this plan, at the same time, could not use it"
        found = list(without_part.get(image_id, ()))
        for name in absent:
            unknown = [Rejected(image_id, uri, source, name, "changed", detail)]
            found += [replace(r, space=r.space or name) for r in why.get((image_id, name), unknown)]
        if found and len(absent) == len(tables):
            told = next((r for r in found if r.detail != detail), found[0])
            found = [replace(told, space=None)]
        out += found
    return out


_COMMIT: Kinds = {"shard": int, "parts": dict, "rejected": list, "rejected_images": int, "statistics": dict,
                  "seconds": dict}  # fmt: skip
_PART: Kinds = {"rows": int, "bytes": int, "sha256": str}


def _commit_of(data: bytes, uri: str, shard: int) -> dict[str, Any]:
    """A commit, as far as others rely on it.

    Raises:
        ConfigError: it is none, or that of another shard.
    """
    commit = object_of(json_of(data, uri), uri, _COMMIT)
    for path, part in commit["parts"].items():
        object_of(part, f"{uri}: part {path!r:.120}", _PART)
    is_good = (
        commit["shard"] == shard
        and all(map(is_part_path, commit["parts"]))
        and all(_is_rejected(row) for row in commit["rejected"])
        and all(_is_number(value) for value in commit["seconds"].values())
        and all(
            isinstance(of_space, dict)
            and all(isinstance(sums, dict) and all(map(_is_number, sums.values())) for sums in of_space.values())
            for of_space in commit["statistics"].values()
        )
    )
    if not is_good:
        raise ConfigError(f"{uri} is damaged: delete it, and the same command computes its shard again.")
    return commit


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rejected(row: Any) -> bool:
    """Whether it is the fields of a `Rejected`, of which only the space may be null."""
    return (
        isinstance(row, list)
        and len(row) == len(REJECTED_COLUMNS)
        and all(isinstance(v, str) or (v is None and REJECTED_COLUMNS.names[n] == "space") for n, v in enumerate(row))
    )


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
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(shards), 256):  # a million commits must not be in memory at once
            yield from pool.map(functools.partial(read_commit, output), shards[start : start + 256])


def read_commit(output: str, shard: int) -> dict[str, Any]:
    """That of one shard.

    Raises:
        FileNotFoundError: it has none.
        ConfigError: it is damaged.
    """
    uri = join(output, "commits", f"{shard:05d}.json")
    return _commit_of(store_of(uri).read(uri), uri, shard)


def reject_reasons(commit: Mapping[str, Any]) -> Counter[str]:
    """Rejected images of a commit by reason; an image that two spaces reject counts once."""
    return Counter({image_id: reason for image_id, _, _, _, reason, _ in commit["rejected"]}.values())


def tally(commit: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What a commit says in few numbers, for `manifpt.telemetry`.

    Args:
        commit: of `commit_shard`.
        task: of its plan: `artifacts`, `reference` or `attributions`.

    Returns:
        `images`: by status and source; `reasons`: rejected images by reason; `seconds`: by stage.
    """
    by_group: dict[str, dict[str, dict[str, float]]] = commit["statistics"]
    images: dict[str, Counter[str]] = {}
    if task == "attributions":
        images = {
            verdict: Counter({s: int(f["images"]) for s, f in found.items()}) for verdict, found in by_group.items()
        }
    elif task == "reference":
        images["done"] = Counter(real=max((part["rows"] for part in commit["parts"].values()), default=0))
    else:
        images["done"] = Counter()
        for found in by_group.values():  # an image has a row in each space
            images["done"] |= Counter({source: int(sums["images"]) for source, sums in found.items()})
    images["rejected"] = Counter({image_id: source for image_id, _, source, _, _, _ in commit["rejected"]}.values())
    return {"images": images, "reasons": reject_reasons(commit), "seconds": commit["seconds"]}


def write_rejected(output: str, commits: Iterator[dict[str, Any]]) -> None:
    """`rejected.parquet` from commits, in the order of the manifest; also where nothing was rejected."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECTED_COLUMNS, compression="zstd") as writer:
        for commit in commits:
            if commit["rejected"]:
                columns = [list(values) for values in zip(*commit["rejected"], strict=True)]
                writer.write_table(pa.table(columns, schema=REJECTED_COLUMNS))
    uri = join(output, "rejected.parquet")
    store_of(uri).write(uri, sink.getvalue().to_pybytes())
