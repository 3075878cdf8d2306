"""The four steps of an image, as plain functions of one shard: decode, encode, project, commit.

Nothing here knows Ray: `manifpt.pipeline` puts each step where it runs. A shard travels as named arrays and tables:

    rows                       table: manifest columns and `content_hash` of the images that decoded
    rejected                   table: those that did not, with reasons
    view:<key> / code:<key>    uint8 or float32 [n, ...]
    index:<key>                int32 [n], which of `rows` these are: a view can reject an image that another takes
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.artifacts import artifact_table, parquet_bytes
from manifpt.decode import content_hash, decode
from manifpt.errors import BadImage, ConfigError
from manifpt.fetch import fetch
from manifpt.manifest import REAL, Manifest
from manifpt.plan import Plan
from manifpt.projection import Projection
from manifpt.reference import LISTED_COLUMNS, Reference, code_table, open_bundle
from manifpt.shards import Rejected, commit_shard
from manifpt.spaces import Space, SpaceSpec, View, make_space

__all__ = ["Encoder", "Projecting", "Shard", "commit_artifacts", "commit_codes", "decode_rows"]

Shard = dict[str, Any]

_LEFT_OUT, _COPY, _NEAR_COPIES = 1, 2, 3
# An image whose nearest is less than half as far as its second nearest is a re-encoded or retouched copy of it: the
# ratio is near one for independent images. It is counted, not kept out, since only a person can tell which it is.
_NEAR_COPY = 0.5

# What `fetch` needs travels on: a lazy artifact is made again from its image.
_CARRIED = ["image_id", "uri", "container", "offset", "size_bytes", "source", "split"]
_REJECTED = pa.schema([pa.field(name, pa.string()) for name in Rejected.__dataclass_fields__])


def decode_rows(plan: Plan, shard: int) -> Shard:
    """Reads and decodes the images of one shard, and makes every view that a space asks for."""
    begin = time.perf_counter()
    manifest = Manifest(plan.manifest_uri)
    rows = plan.rows_of(shard)
    table = manifest.read(rows.start, rows.stop)
    manifest.close()
    views: dict[str, View] = {}
    spaces_of: dict[str, list[str]] = {}
    for spec in plan.spaces:
        views[spec.view.key] = spec.view
        spaces_of.setdefault(spec.view.key, []).append(spec.name)

    pixels: dict[str, list[np.ndarray]] = {key: [] for key in views}
    index: dict[str, list[int]] = {key: [] for key in views}
    kept: list[int] = []
    hashes: list[str] = []
    rejected: list[Rejected] = []
    records = table.to_pylist()
    for number, (row, data) in enumerate(zip(records, fetch(records), strict=True)):
        try:
            if isinstance(data, BadImage):
                raise data
            image_hwc = decode(data)
        except BadImage as bad:
            rejected.append(_rejection(row, None, bad))
            continue
        bad_views: dict[str, BadImage] = {}
        for key, view in views.items():
            try:
                pixels[key].append(view.of(image_hwc))
                index[key].append(len(kept))
            except BadImage as bad:
                bad_views[key] = bad
        if len(bad_views) == len(views):
            rejected.append(_rejection(row, None, next(iter(bad_views.values()))))
            continue
        rejected.extend(_rejection(row, name, bad_views[key]) for key in bad_views for name in spaces_of[key])
        kept.append(number)
        hashes.append(content_hash(image_hwc))

    columns = [*_CARRIED, *manifest.kept_columns]
    out: Shard = {
        "shard": np.array(shard),
        "rows": table.select(columns).take(kept).append_column("content_hash", pa.array(hashes, pa.string())),
        "rejected": _rejected_table(rejected),
        "seconds:decode": np.array(time.perf_counter() - begin),
    }
    for key, view in views.items():
        shape = (len(pixels[key]), 3, view.height_px, view.width_px)
        out[f"view:{key}"] = np.stack(pixels[key]) if pixels[key] else np.empty(shape, np.uint8)
        out[f"index:{key}"] = np.array(index[key], np.int32)
    return out


def _rejection(row: dict[str, Any], space: str | None, bad: BadImage) -> Rejected:
    return Rejected(row["image_id"], row["uri"], row["source"], space, bad.reason.value, bad.detail)


def _rejected_table(rejected: Iterable[Rejected]) -> pa.Table:
    rows = [[getattr(r, name) for name in Rejected.__dataclass_fields__] for r in rejected]
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(_REJECTED), schema=_REJECTED)


def _rejected_rows(table: pa.Table) -> list[Rejected]:
    return [Rejected(**row) for row in table.to_pylist()]


class Encoder:
    """Views to codes: the step for the accelerator."""

    def __init__(self, specs: Iterable[SpaceSpec], threads: int = 1, device: str = "cpu") -> None:
        self._spaces: dict[str, Space] = {}
        for spec in specs:
            self._spaces[spec.code_key] = make_space(spec, threads, device)

    def __call__(self, shard: Shard) -> Shard:
        begin = time.perf_counter()
        out = {key: value for key, value in shard.items() if not key.startswith(("view:", "index:"))}
        for key, space in self._spaces.items():
            views_bchw = shard[f"view:{space.spec.view.key}"]
            out[f"code:{key}"] = space.encode(views_bchw) if len(views_bchw) else np.empty((0, 1), np.float32)
            out[f"index:{key}"] = shard[f"index:{space.spec.view.key}"]
        out["seconds:encode"] = np.array(time.perf_counter() - begin)
        return out


class Projecting:
    """Codes to projections, in every space of a plan. Holds the reference in memory."""

    def __init__(self, plan: Plan, threads: int = 1) -> None:
        bundle = open_bundle(plan.reference_uri)
        if bundle.digest != plan.reference_digest:
            raise ConfigError(
                f"The reference {plan.reference_uri} was built again while the job ran; start the job anew."
            )
        self._plan = plan
        self._references = {spec.name: Reference(bundle, spec, threads) for spec in plan.spaces}
        for reference in self._references.values():
            _ = reference.projector  # built here, so that the first shard's time is its own

    def __call__(self, shard: Shard) -> Shard:
        out = {key: value for key, value in shard.items() if not key.startswith(("code:", "index:"))}
        rows: pa.Table = shard["rows"]
        begin = time.perf_counter()
        for name, reference in self._references.items():
            index = shard[f"index:{reference.space.spec.code_key}"]
            codes = shard[f"code:{reference.space.spec.code_key}"]
            of_space = rows.take(pa.array(index))
            projection, twins = _project(reference, of_space, codes)
            out[f"index:{name}"] = index
            out[f"twins:{name}"] = twins
            out[f"neighbor:{name}"] = pa.table({"id": reference.image_ids.take(pa.array(projection.neighbor_b))})
            out[f"distance:{name}"] = projection.distance_b
            out[f"shape:{name}"] = np.array(reference.shape)
            if name in self._plan.inline:
                # float32 so far: the only rounding of what is stored
                out[f"artifact:{name}"] = projection.artifact_bd.astype(self._plan.dtype)
        out["seconds:project"] = np.array(time.perf_counter() - begin)
        return out


def _project(reference: Reference, rows: pa.Table, codes: np.ndarray) -> tuple[Projection, np.ndarray]:
    """Projects, and never a real image onto itself.

    A query that is real, or that is the very object a reference image was made of, does not see the reference images
    with its pixels (leave-one-out). A generated image may: it is a copy, and its artifact is rightly zero.

    Returns:
        The projection, and int8 [B], what the reference has of each image: nothing (0), its very pixels, kept out (1)
        or not (2), or a near copy (3).
    """
    excluded: list[np.ndarray] = []
    found = np.zeros(len(rows), np.int8)
    for b, row in enumerate(rows.select(["image_id", "uri", "source", "content_hash"]).to_pylist()):
        twins = reference.rows_with(row["content_hash"])
        itself = any(
            reference.uris[i].as_py() == row["uri"] and reference.image_ids[i].as_py() == row["image_id"]
            for i in twins.tolist()
        )
        keep_out = len(twins) > 0 and (row["source"] == REAL or itself)
        found[b] = (_LEFT_OUT if keep_out else _COPY) if len(twins) else 0
        excluded.append(twins if keep_out else twins[:0])
    if not len(rows):
        codes = np.empty((0, *reference.codes.shape[1:]), reference.codes.dtype)
    embeddings_bd = reference.space.embed(codes).reshape(len(rows), -1)
    projection = reference.projector.project(embeddings_bd, excluded)
    if (projection.neighbor_b < 0).any():
        raise ConfigError("A real image has no other image in the reference: build it from more than this one image.")
    near = (found == 0) & (projection.distance_b < _NEAR_COPY * projection.second_b) & np.isfinite(projection.second_b)
    found[near] = _NEAR_COPIES
    return projection, found


def commit_artifacts(plan: Plan, output: str, shard: Shard) -> dict[str, Any]:
    """Writes the artifact parts of one shard and commits it."""
    begin = time.perf_counter()
    number = int(shard["shard"])
    parts: dict[str, bytes] = {}
    statistics: dict[str, Any] = {}
    for spec in plan.spaces:
        name = spec.name
        rows = shard["rows"].take(pa.array(shard[f"index:{name}"]))
        inline = name in plan.inline
        distance_b = shard[f"distance:{name}"]
        artifact_bd = shard[f"artifact:{name}"] if inline else None
        shape = tuple(int(n) for n in shard[f"shape:{name}"])
        metadata = {
            "space": name,
            "shape": list(shape),
            "dtype": plan.dtype,
            "store": "inline" if inline else "lazy",
            "reference_digest": plan.reference_digest,
            "plan_digest": plan.digest,
            "spec": spec.identity(),
        }
        neighbors = shard[f"neighbor:{name}"]["id"].combine_chunks()
        table = artifact_table(rows, neighbors, distance_b, artifact_bd, shape, metadata)
        parts[f"artifacts/{name}/part-{number:05d}.parquet"] = parquet_bytes(table)
        statistics[name] = _statistics(rows["source"], distance_b, shard[f"twins:{name}"])
    return _commit(output, shard, parts, statistics, begin)


def _statistics(sources: pa.ChunkedArray, distance_b: np.ndarray, twins_b: np.ndarray) -> dict[str, dict[str, float]]:
    """Mergeable sums by source."""
    names = np.array(sources.to_pylist(), dtype=object)
    out = {}
    for source in sorted(set(names)):
        distances = distance_b[names == source].astype(np.float64)
        twins = twins_b[names == source]
        out[source] = {
            "images": len(distances),
            "distance_sum": float(distances.sum()),
            "distance_min": float(distances.min()),
            "distance_max": float(distances.max()),
            "left_out": int((twins == _LEFT_OUT).sum()),
            "copies": int((twins == _COPY).sum()),
            "near_copies": int((twins == _NEAR_COPIES).sum()),
        }
    return out


def commit_codes(output: str, shard: Shard) -> dict[str, Any]:
    """Writes the reference parts of one shard and commits it."""
    begin = time.perf_counter()
    number = int(shard["shard"])
    parts: dict[str, bytes] = {}
    for key in (name.removeprefix("code:") for name in shard if name.startswith("code:")):
        index = shard[f"index:{key}"]
        rows = shard["rows"].take(pa.array(index)).select(LISTED_COLUMNS)
        if len(rows):  # an empty part would have no shape
            parts[f"embeddings/{key}/part-{number:05d}.parquet"] = parquet_bytes(code_table(rows, shard[f"code:{key}"]))
    counts = {row["values"]: row["counts"] for row in pc.value_counts(shard["rows"]["source"]).to_pylist()}
    return _commit(output, shard, parts, {"images": counts}, begin)


def _commit(
    output: str, shard: Shard, parts: dict[str, bytes], statistics: dict[str, Any], begin: float
) -> dict[str, Any]:
    seconds = {key.removeprefix("seconds:"): float(value) for key, value in shard.items() if key.startswith("seconds:")}
    seconds["commit"] = time.perf_counter() - begin
    return commit_shard(output, int(shard["shard"]), parts, _rejected_rows(shard["rejected"]), statistics, seconds)
