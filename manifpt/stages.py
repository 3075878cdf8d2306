"""The four steps of an image, as plain functions of one shard: decode, encode, project, commit.

Nothing here knows Ray: `manifpt.pipeline` puts each step where it runs. A shard travels as named arrays and tables:

    rows                       table: manifest columns and `content_hash` of the images that decoded
    rejected                   table: those that did not, with reasons
    view:<key> / code:<key>    uint8 or float32 [n, ...]
    index:<key>                int32 [n], which of `rows` these are: a view can reject an image that another takes
    rows:<space>               table: the rows of a part, all but the artifact
    artifact:<space>           [n, D] in the stored number format, where it is stored
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from manifpt.artifacts import artifact_table
from manifpt.decode import content_hash, decode
from manifpt.errors import BadImage, ConfigError, RejectReason
from manifpt.fetch import fetch
from manifpt.manifest import REAL, Manifest
from manifpt.plan import Plan
from manifpt.projection import Projection, nearer_of, projection_of
from manifpt.reference import LISTED_COLUMNS, Codes, Reference, code_table, open_bundle
from manifpt.search import Choice, Found
from manifpt.shards import REJECTED_COLUMNS, Rejected, commit_shard, part_path
from manifpt.spaces import Space, SpaceSpec, View, make_space

__all__ = ["Encoder", "Projecting", "Shard", "commit_artifacts", "commit_codes", "decode_rows"]

Shard = dict[str, Any]

# An image whose nearest is less than half as far as its second nearest is a re-encoded or retouched copy of it: the
# ratio is near one for independent images. It is marked, not kept out, since only a person can tell which it is.
_NEAR_COPY = 0.5

_CHECKED = 64  # images a shard whose approximate neighbour is compared with the exact one

# What `fetch` needs travels on: a lazy artifact is made again from its image.
_CARRIED = ["image_id", "uri", "container", "offset", "size_bytes", "source", "split"]


def decode_rows(plan: Plan, shard: int) -> Shard:
    """Reads and decodes the images of one shard, and makes every view that a space asks for."""
    begin = time.perf_counter()
    manifest = Manifest(plan.manifest_uri)
    if manifest.etag != plan.manifest_etag:
        raise ConfigError(f"The manifest {plan.manifest_uri} was replaced while the job ran; start the job anew.")
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

    good = table.select([*_CARRIED, *manifest.kept_columns]).take(pa.array(kept, pa.int32()))
    out: Shard = {
        "shard": np.array(shard),
        "rows": good.append_column("content_hash", pa.array(hashes, pa.string())),
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
    return pa.Table.from_pylist([asdict(r) for r in rejected], schema=REJECTED_COLUMNS)


class Encoder:
    """Views to codes: the step for the accelerator."""

    def __init__(self, specs: Iterable[SpaceSpec], threads: int = 1, device: str = "cpu", images: int = 0) -> None:
        self._spaces: dict[str, Space] = {}
        for spec in specs:
            self._spaces[spec.code_key] = make_space(spec, threads, device, images)

    def load(self) -> None:
        """Brings the networks into memory, which the first shard would do otherwise."""
        for space in self._spaces.values():
            space.load()

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
    """Codes to projections, in every space of a plan. Holds the reference, or one share of it, in memory."""

    def __init__(self, plan: Plan, threads: int = 1, share: int = 0) -> None:
        """Args:
        plan: of artifacts.
        threads: CPU threads.
        share: which of `plan.reference_shards` to hold. A shard passes all of them, and its best goes with it.
        """
        bundle = open_bundle(plan.reference_uri)
        if bundle.digest != plan.reference_digest:
            raise ConfigError(
                f"The reference {plan.reference_uri} was built again while the job ran; start the job anew."
            )
        self._plan, self._is_last = plan, share == plan.reference_shards - 1
        shares = plan.reference_shards
        codes = {key: Codes(bundle, key, share, shares) for key in {spec.code_key for spec in plan.spaces}}
        choices = {name: _choice(plan.projection, choice) for name, choice in bundle.searches.items()}
        self.references = {
            spec.name: Reference(codes[spec.code_key], spec, threads, choices[spec.name]) for spec in plan.spaces
        }
        self._exact = {}
        for name, reference in self.references.items():
            _ = reference.projector  # built here, so that the first shard's time is its own
            if plan.projection == "approximate":
                self._exact[name] = reference.projector_by(bundle.searches[name])

    def __call__(self, shard: Shard) -> Shard:
        begin = time.perf_counter()
        consumed = ("code:", "index:", "rows", "near:") if self._is_last else ("near:",)
        out = {key: value for key, value in shard.items() if not key.startswith(consumed)}
        rejected = [shard["rejected"]]
        for name, reference in self.references.items():
            key = reference.space.spec.code_key
            rows = shard["rows"].take(pa.array(shard[f"index:{key}"]))
            codes = shard[f"code:{key}"] if len(rows) else reference.codes.array[:0]
            embeddings_bd = reference.space.embed(codes).reshape(len(rows), int(np.prod(reference.shape)))
            finite_b = np.isfinite(embeddings_bd).all(axis=1)
            not_finite, rows = rows.filter(pa.array(~finite_b)), rows.filter(pa.array(finite_b))
            embeddings_bd = embeddings_bd[finite_b]
            excluded, twin = _left_out(reference.codes, rows)
            if self._plan.reference_shards == 1:
                found = reference.projector.project(embeddings_bd, excluded)
            else:
                best = _nearest_so_far(reference, embeddings_bd, excluded, shard, name)
                if not self._is_last:
                    out |= best
                    continue
                near_bd = reference.space.embed(best[f"near:code:{name}"]).reshape(embeddings_bd.shape)
                found = projection_of(embeddings_bd, _found_in(best, name), near_bd)
            if name in self._exact:
                out[f"recall:{name}"] = self._recall(name, found.distance_b, embeddings_bd, excluded)
            rejected.append(_not_finite(not_finite, name))
            out[f"rows:{name}"] = _with_neighbors(rows, found, twin, reference.codes.image_ids)
            out[f"shape:{name}"] = np.array(reference.shape)
            if name in self._plan.inline:
                out[f"artifact:{name}"] = _stored(found.artifact_bd, self._plan.dtype, name)
        out["rejected"] = pa.concat_tables(rejected)
        spent_s = float(shard.get("seconds:project", 0))
        out["seconds:project"] = np.array(spent_s + time.perf_counter() - begin)
        return out

    def _recall(
        self, name: str, distance_b: np.ndarray, embeddings_bd: np.ndarray, excluded: list[np.ndarray]
    ) -> np.ndarray:
        """bool [n], whether the first images of a shard, looked up exactly too, got their true neighbour."""
        some = slice(0, _CHECKED)
        exact = self._exact[name].project(embeddings_bd[some], excluded[some])
        return distance_b[some] <= exact.distance_b


def _choice(projection: str, measured: Choice) -> Choice:
    return measured if projection == "exact" else Choice(projection)


def _not_finite(rows: pa.Table, space: str) -> pa.Table:
    bad = BadImage(RejectReason.NOT_FINITE, "the embedding holds numbers that are not finite")
    return _rejected_table(_rejection(row, space, bad) for row in rows.to_pylist())


def _stored(artifact_bd: np.ndarray, dtype: str, space: str) -> np.ndarray:
    """In the number format of the shards: the only rounding of an artifact."""
    with np.errstate(over="ignore"):
        stored = artifact_bd.astype(dtype)
    if not np.isfinite(stored).all():
        raise ConfigError(f"Artifacts of space {space!r} are too large for {dtype}; use --dtype float32.")
    return stored


def _left_out(codes: Codes, rows: pa.Table) -> tuple[list[np.ndarray], list[str | None]]:
    """What each image must not be projected onto: never a real image onto itself.

    A query that is the very object a reference image was made of does not see that image; one whose source is `real`
    does not see any with its pixels either (leave-one-out). A generated image may: it is a copy, and its artifact is
    rightly zero.

    Returns:
        int64 rows for each image; and what the reference has of it: nothing, its very pixels, `left_out` or not
        (`copy`).
    """
    excluded: list[np.ndarray] = []
    twin: list[str | None] = []
    of = {name: rows[name].to_pylist() for name in ("uri", "offset", "source", "content_hash")}
    lookups = codes.rows_with(of["content_hash"]), codes.rows_at(of["uri"], of["offset"])
    for source, same_pixels, itself in zip(of["source"], *lookups, strict=True):
        left_out = np.union1d(itself, same_pixels) if source == REAL or len(itself) else itself
        excluded.append(left_out)
        twin.append("left_out" if len(left_out) else "copy" if len(same_pixels) else None)
    return excluded, twin


def _nearest_so_far(
    reference: Reference, embeddings_bd: np.ndarray, excluded: list[np.ndarray], shard: Shard, name: str
) -> Shard:
    """The two nearest among the shares that a shard has passed, this one with them, and the code of the nearest."""
    held = reference.codes.rows
    local = [rows[(rows >= held.start) & (rows < held.stop)] - held.start for rows in excluded]
    if len(embeddings_bd):
        here = reference.projector.search.search(np.ascontiguousarray(embeddings_bd, np.float32), 2, local)
    else:
        here = Found(np.empty((0, 2), np.int64), np.empty((0, 2)))
    codes = reference.codes.array[np.maximum(here.row_bk[:, 0], 0)]
    best = Found(np.where(here.row_bk < 0, -1, here.row_bk + held.start), here.squared_bk)
    if f"near:row:{name}" in shard:
        best, codes = nearer_of(_found_in(shard, name), shard[f"near:code:{name}"], best, codes)
    return {f"near:row:{name}": best.row_bk, f"near:squared:{name}": best.squared_bk, f"near:code:{name}": codes}


def _found_in(shard: Shard, name: str) -> Found:
    return Found(shard[f"near:row:{name}"], shard[f"near:squared:{name}"])


def _with_neighbors(rows: pa.Table, found: Projection, twin: list[str | None], image_ids: pa.Array) -> pa.Table:
    """Rows with `neighbor_id`, `distance` and `twin`, which is now also `near_copy`."""
    if (found.neighbor_b < 0).any():
        raise ConfigError("A real image has no other image in the reference: build it from more than this one image.")
    for b in np.flatnonzero((found.distance_b < _NEAR_COPY * found.second_b) & np.isfinite(found.second_b)):
        twin[b] = twin[b] or "near_copy"
    table = rows.append_column("neighbor_id", image_ids.take(pa.array(found.neighbor_b)).cast(pa.string()))
    table = table.append_column("distance", pa.array(found.distance_b, pa.float32()))
    return table.append_column("twin", pa.array(twin, pa.string()))


def commit_artifacts(plan: Plan, output: str, shard: Shard) -> dict[str, Any]:
    """Writes the artifact parts of one shard and commits it."""
    parts: dict[str, pa.Table] = {}
    for spec in plan.spaces:
        shape = [int(n) for n in shard[f"shape:{spec.name}"]]
        artifact_bd = shard.get(f"artifact:{spec.name}")
        metadata = {
            "space": spec.name,
            "shape": shape,
            "dtype": plan.dtype,
            "store": "lazy" if artifact_bd is None else "inline",
            "reference_digest": plan.reference_digest,
            "plan_digest": plan.digest,
            "spec": spec.identity(),
        }
        path = part_path("artifacts", spec.name, int(shard["shard"]))
        parts[path] = artifact_table(shard[f"rows:{spec.name}"], artifact_bd, tuple(shape), metadata)
    recall = {name.removeprefix("recall:"): value for name, value in shard.items() if name.startswith("recall:")}
    return _commit(output, shard, parts, lambda held: _statistics(held, recall))


def _statistics(
    parts: Mapping[str, pa.Table], recall: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mergeable sums by space and source."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for path, table in parts.items():
        names = np.array(table["source"].to_pylist(), dtype=object)
        twins = np.array(table["twin"].to_pylist(), dtype=object)
        distance_b = table["distance"].to_numpy().astype(np.float64)
        out[path.split("/")[1]] = {
            source: {
                "images": int((names == source).sum()),
                "distance_sum": float(distance_b[names == source].sum()),
                "distance_min": float(distance_b[names == source].min()),
                "distance_max": float(distance_b[names == source].max()),
                "left_out": int((twins[names == source] == "left_out").sum()),
                "copies": int((twins[names == source] == "copy").sum()),
                "near_copies": int((twins[names == source] == "near_copy").sum()),
            }
            for source in sorted(set(names))
        }
    for space, right_b in recall.items():
        path = next(path for path in parts if path.split("/")[1] == space)
        checked = parts[path]["source"].to_pylist()[: len(right_b)]
        for source, sums in out[space].items():
            is_of_b = np.array([name == source for name in checked], bool)
            sums |= {"checked": int(is_of_b.sum()), "right": int(right_b[: len(checked)][is_of_b].sum())}
    return out


def commit_codes(plan: Plan, output: str, shard: Shard) -> dict[str, Any]:
    """Writes the reference parts of one shard and commits it."""
    parts: dict[str, pa.Table] = {}
    for key in (name.removeprefix("code:") for name in shard if name.startswith("code:")):
        rows = shard["rows"].take(pa.array(shard[f"index:{key}"])).select(LISTED_COLUMNS)
        if len(rows):  # an empty part would have no shape
            path = part_path("embeddings", key, int(shard["shard"]))
            parts[path] = code_table(rows, shard[f"code:{key}"], {"manifpt.plan_digest": plan.digest})
    return _commit(output, shard, parts)


def _commit(
    output: str,
    shard: Shard,
    parts: Mapping[str, pa.Table],
    statistics: Callable[[Mapping[str, pa.Table]], dict[str, Any]] = lambda parts: {},
) -> dict[str, Any]:
    seconds = {key.removeprefix("seconds:"): float(value) for key, value in shard.items() if key.startswith("seconds:")}
    rejected = [Rejected(**row) for row in shard["rejected"].to_pylist()]
    return commit_shard(output, int(shard["shard"]), parts, rejected, seconds, statistics)
