"""The third step of an image: from codes to projections, in every space of a plan. Knows no Ray; see `manifpt.stages`.

Legend: B images of a shard, D dimensions.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa

from manifpt.artifacts import in_format
from manifpt.errors import BadImage, ConfigError, RejectReason
from manifpt.estimates import make_projector
from manifpt.estimates.residual import artifacts_of, projected_in
from manifpt.manifest import REAL, records
from manifpt.plan import Plan
from manifpt.projection import Projection, nearer_of, projection_of
from manifpt.reference import Bundle, Codes, Reference, open_bundle
from manifpt.search import Choice, Found
from manifpt.spaces import SpaceSpec
from manifpt.stages import Shard, not_finite, rejected_table, rejection

__all__ = ["Projecting"]

_CHECKED = 64  # images a shard whose approximate neighbour is compared with the exact one


class Projecting:
    """Codes to projections, in every space of a plan. Holds the reference, or one share of it, in memory."""

    def __init__(self, plan: Plan, threads: int = 1, share: int = 0, device: str = "cpu") -> None:
        """Args:
        plan: of artifacts.
        threads: CPU threads.
        share: which of `plan.reference_shards` to hold. A shard passes all of them, and its best goes with it.
        device: for an estimate that multiplies matrices; the search for neighbours finds its own.
        """
        bundle = open_bundle(plan.reference_uri)
        if bundle.digest != plan.reference_digest:
            raise ConfigError(
                f"The reference {plan.reference_uri} was built again while the job ran; start the job anew."
            )
        self._plan, self._is_last = plan, share == plan.reference_shards - 1
        self._specs = {spec.name: spec for spec in plan.spaces}
        shares = plan.reference_shards
        codes = {key: Codes(bundle, key, share, shares) for key in {spec.code_key for spec in plan.spaces}}
        self.references, self._projectors, self._exact = {}, {}, {}
        for spec in plan.spaces:
            sought_in = projected_in(spec, plan.estimate)
            measured = _measured(bundle, sought_in)
            reference = Reference(codes[spec.code_key], sought_in, threads, _choice(plan.projection, measured))
            self.references[spec.name] = reference
            if shares == 1:
                self._projectors[spec.name] = make_projector(plan.estimate, reference, device)
            else:
                _ = reference.projector  # built here, so that the first shard's time is its own
            if plan.projection == "approximate":
                self._exact[spec.name] = reference.projector_by(measured)

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
            infinite, rows = rows.filter(pa.array(~finite_b)), rows.filter(pa.array(finite_b))
            embeddings_bd = embeddings_bd[finite_b]
            excluded, twin = _left_out(reference.codes, rows, self._plan.task == "attributions")
            if self._plan.estimate.name == "denoiser":  # it has learned its reference, and can't forget one image
                free_b = np.array([not len(of_query) for of_query in excluded], bool)
                rejected.append(_in_reference(rows.filter(pa.array(~free_b)), name))
                rows, embeddings_bd = rows.filter(pa.array(free_b)), embeddings_bd[free_b]
                excluded = [empty for empty in excluded if not len(empty)]
                twin = [of_query for of_query, is_free in zip(twin, free_b, strict=True) if is_free]
            if not self._plan.estimate.uses_reals:
                twin = [None] * len(rows)
            if self._plan.reference_shards == 1:
                found = self._projectors[name].project(embeddings_bd, excluded)
            else:
                best = _nearest_so_far(reference, embeddings_bd, excluded, shard, name)
                if not self._is_last:
                    out |= best
                    continue
                near_bd = reference.space.embed(best[f"near:code:{name}"]).reshape(embeddings_bd.shape)
                found = projection_of(embeddings_bd, _found_in(best, name), near_bd)
            if name in self._exact:
                out[f"recall:{name}"] = self._recall(name, found.distance_b, embeddings_bd, excluded)
            rejected.append(not_finite(infinite, name))
            out[f"rows:{name}"] = _with_neighbors(rows, found, twin, reference.codes.image_ids)
            out[f"shape:{name}"] = np.array(reference.shape)
            if name in self._plan.inline:
                artifact_bd = artifacts_of(found.artifact_bd, self._specs[name], self._plan.estimate)
                out[f"artifact:{name}"] = in_format(artifact_bd, self._plan.dtype, name)
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


def _measured(bundle: Bundle, spec: SpaceSpec) -> Choice:
    """The search that the bundle found fastest in a space, under whatever name; flat where it has none."""
    for name, known in bundle.spaces.items():
        if replace(known, name=spec.name, weights=spec.weights) == spec:
            return bundle.searches[name]
    return Choice()


def _in_reference(rows: pa.Table, space: str) -> pa.Table:
    bad = BadImage(RejectReason.IN_REFERENCE, "the denoiser was trained on this very image")
    return rejected_table(rejection(row, space, bad) for row in records(rows))


def _left_out(codes: Codes, rows: pa.Table, may_be_real: bool) -> tuple[list[np.ndarray], list[str | None]]:
    """What each image must not be projected onto: never a real image onto itself.

    A query that is the very object a reference image was made of does not see that image; one whose source is `real`
    does not see any with its pixels either (leave-one-out). A generated image may: it is a copy, and its artifact is
    rightly zero. Of images that may be real (`may_be_real`), since nobody knows yet, all are treated as real ones.

    Returns:
        int64 rows for each image; and what the reference has of it: nothing, its very pixels, `left_out` or not
        (`copy`).
    """
    excluded: list[np.ndarray] = []
    twin: list[str | None] = []
    of = {name: rows[name].to_pylist() for name in ("uri", "offset", "source", "content_hash")}
    lookups = codes.rows_with(of["content_hash"]), codes.rows_at(of["uri"], of["offset"])
    for source, same_pixels, itself in zip(of["source"], *lookups, strict=True):
        left_out = np.union1d(itself, same_pixels) if may_be_real or source == REAL or len(itself) else itself
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
        query_bd = np.ascontiguousarray(embeddings_bd, np.float32)
        here = reference.projector.with_next(query_bd, reference.projector.nearest(query_bd, 2, local), local)
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
    if found.is_lacking_b.any():
        raise ConfigError("A real image has no other image in the reference: build it from more than this one image.")
    sources = rows["source"].to_pylist()
    for b in np.flatnonzero(found.near_copy_b):
        # Of a real that was left out, the reference may hold another copy, which spoils its distance as if it weren't.
        if twin[b] is None or (twin[b] == "left_out" and sources[b] == REAL):
            twin[b] = "near_copy"
    sample_b = pa.array(found.neighbor_b, mask=found.neighbor_b < 0)
    table = rows.append_column("neighbor_id", image_ids.take(sample_b).cast(pa.string()))
    table = table.append_column("distance", pa.array(found.distance_b, pa.float32()))
    return table.append_column("twin", pa.array(twin, pa.string()))
