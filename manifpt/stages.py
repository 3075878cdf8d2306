"""The steps of an image, as plain functions of one shard: decode, encode, commit; `manifpt.projecting` is the third.

Nothing here knows Ray: `manifpt.pipeline` puts each step where it runs. A shard travels as named arrays and tables:

    rows                       table: manifest columns and `content_hash` of the images that decoded; of an altered
                               run that of the image before, so that the two stay together and no real sees itself
    rejected                   table: those that did not, with reasons
    view:<key> / code:<key>    uint8 or float32 [n, ...]
    index:<key>                int32 [n], which of `rows` these are: a view can reject an image that another takes
    rows:<space>               table: the rows of a part, all but the artifact
    artifact:<space>           [n, D] in the stored number format, where it is stored
    near:...:<space>           the best so far, between the parts of a reference
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from manifpt.alterations import NONE, altered, altered_as
from manifpt.artifacts import artifact_table
from manifpt.decode import content_hash, decode
from manifpt.errors import BadImage, ConfigError, RejectReason
from manifpt.estimates import Estimate
from manifpt.fetch import fetch
from manifpt.manifest import Manifest, records
from manifpt.plan import Plan
from manifpt.reference import LISTED_COLUMNS, code_table
from manifpt.shards import REJECTED_COLUMNS, Rejected, commit_shard, part_path
from manifpt.spaces import Space, SpaceSpec, View, make_space

__all__ = [
    "Encoder",
    "Shard",
    "commit",
    "commit_artifacts",
    "commit_codes",
    "decode_rows",
    "rejected_table",
    "rejection",
]

Shard = dict[str, Any]

# What `fetch` needs travels on: a lazy artifact is made again from its image.
_CARRIED = ["image_id", "uri", "container", "offset", "size_bytes", "source", "split"]


def decode_rows(
    plan: Plan, shard: int, resize_later: bool = False, decode: Callable[[bytes], np.ndarray] = decode
) -> Shard:
    """Reads, decodes and alters the images of one shard, and makes every view that a space asks for.

    Args:
        plan: it.
        shard: its number.
        resize_later: leave resizing to the encoder's accelerator, which gives the same pixels, where a shard's images
            are all of one size, and not so large that they should become small before they travel.
        decode: a file's bytes to uint8 [H, W, 3].
    """
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

    # A view that a space of pixels shares is that space's code.
    later = {spec.view.key for spec in plan.spaces if spec.kind == "network"} if resize_later else set()
    later -= {spec.view.key for spec in plan.spaces if spec.kind != "network"}
    pixels: dict[str, list[np.ndarray]] = {key: [] for key in views}
    index: dict[str, list[int]] = {key: [] for key in views}
    kept: list[int] = []
    hashes: list[str] = []
    variants: list[int] = []
    rejected: list[Rejected] = []
    asked = records(table)
    for number, (row, data) in enumerate(zip(asked, fetch(asked, exact=bool(plan.variants)), strict=True)):
        try:
            if isinstance(data, BadImage):
                raise data
            image_hwc = decode(data)
            altered_hwc = altered_as(image_hwc, plan.alter, row["image_id"])
        except BadImage as bad:
            rejected.append(rejection(row, None, bad))
            continue
        hashed = content_hash(image_hwc)
        for variant, name in enumerate((NONE, *plan.variants)):
            bad_views: dict[str, BadImage] = {}
            for key, view in views.items():
                try:
                    shown_hwc = altered(altered_hwc, name, 0)
                    pixels[key].append(view.whole(shown_hwc) if key in later else view.of(shown_hwc))
                    index[key].append(len(kept))
                except BadImage as bad:
                    bad_views[key] = bad
            if len(bad_views) < len(views):
                kept.append(number)
                hashes.append(hashed)
                variants.append(variant)
            if variant:  # what is missing of an image that is there says so by itself
                continue
            if len(bad_views) == len(views):
                rejected.append(rejection(row, None, next(iter(bad_views.values()))))
                break
            rejected.extend(rejection(row, name, bad_views[key]) for key in bad_views for name in spaces_of[key])

    columns = [*_CARRIED, *manifest.kept_columns, *(["etag"] if plan.task == "attributions" else [])]
    good = table.select(columns).take(pa.array(kept, pa.int32()))
    if plan.variants:
        good = good.append_column("variant", pa.array(variants, pa.int8()))
    out: Shard = {
        "shard": np.array(shard),
        "rows": good.append_column("content_hash", pa.array(hashes, pa.string())),
        "rejected": rejected_table(rejected),
        "seconds:decode": np.array(time.perf_counter() - begin),
    }
    for key, view in views.items():
        shape = (len(pixels[key]), 3, view.height_px, view.width_px)
        if len({image_chw.shape for image_chw in pixels[key]}) > 1:
            pixels[key] = [view.of(image_chw.transpose(1, 2, 0)) for image_chw in pixels[key]]
        out[f"view:{key}"] = np.stack(pixels[key]) if pixels[key] else np.empty(shape, np.uint8)
        out[f"index:{key}"] = np.array(index[key], np.int32)
    return out


def rejection(row: dict[str, Any], space: str | None, bad: BadImage) -> Rejected:
    """One row of `rejected.parquet`."""
    return Rejected(row["image_id"], row["uri"], row["source"], space, bad.reason.value, bad.detail)


def rejected_table(rejected: Iterable[Rejected]) -> pa.Table:
    """As it travels with a shard."""
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
            "estimate": plan.estimate.identity(),
            **({"alter": plan.alter} if plan.alter != NONE else {}),
        }
        path = part_path("artifacts", spec.name, int(shard["shard"]))
        parts[path] = artifact_table(shard[f"rows:{spec.name}"], artifact_bd, tuple(shape), metadata)
    recall = {name.removeprefix("recall:"): value for name, value in shard.items() if name.startswith("recall:")}
    return commit(output, shard, parts, lambda held: _statistics(held, plan.estimate, recall))


def _statistics(
    parts: Mapping[str, pa.Table], estimate: Estimate, recall: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mergeable sums by space and source; of what an estimate doesn't look for there is no number, rather than 0."""
    kinds = {"left_out": "left_out", "copies": "copy"} if estimate.uses_reals else {}
    kinds |= {"near_copies": "near_copy"} if estimate.seeks_neighbors else {}
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
            }
            | {name: int((twins[names == source] == kind).sum()) for name, kind in kinds.items()}
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
    """Writes the reference parts of one shard and commits it. An image without a finite embedding is no reference."""
    parts: dict[str, pa.Table] = {}
    rejected = [shard["rejected"]]
    for key in (name.removeprefix("code:") for name in shard if name.startswith("code:")):
        rows, codes = shard["rows"].take(pa.array(shard[f"index:{key}"])), shard[f"code:{key}"]
        finite_b = np.isfinite(codes).all(axis=tuple(range(1, codes.ndim)))
        names = ", ".join(spec.name for spec in plan.spaces if spec.code_key == key)
        rejected.append(not_finite(rows.filter(pa.array(~finite_b)), names))
        rows, codes = rows.filter(pa.array(finite_b)).select(LISTED_COLUMNS), codes[finite_b]
        if len(rows):  # an empty part would have no shape
            path = part_path("embeddings", key, int(shard["shard"]))
            parts[path] = code_table(rows, codes, {"manifpt.plan_digest": plan.digest})
    part_of = {spec.name: spec.code_key for spec in plan.spaces}
    return commit(output, shard | {"rejected": pa.concat_tables(rejected)}, parts, part_of=part_of)


def not_finite(rows: pa.Table, space: str, what: str = "the embedding") -> pa.Table:
    """Rejections of rows of which something is no finite number."""
    bad = BadImage(RejectReason.NOT_FINITE, f"{what} holds numbers that are not finite")
    return rejected_table(rejection(row, space, bad) for row in records(rows))


def commit(
    output: str,
    shard: Shard,
    parts: Mapping[str, pa.Table],
    statistics: Callable[[Mapping[str, pa.Table]], dict[str, Any]] = lambda parts: {},
    part_of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Publishes the parts of a shard with what it carries: its rejected images and how long its stages took."""
    seconds = {key.removeprefix("seconds:"): float(value) for key, value in shard.items() if key.startswith("seconds:")}
    rejected = [Rejected(**row) for row in shard["rejected"].to_pylist()]
    return commit_shard(output, int(shard["shard"]), parts, rejected, seconds, statistics, part_of)
