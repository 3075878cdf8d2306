"""The last step of a scanned image: from its artifact to a verdict. Knows no Ray; see `manifpt.stages`.

Legend: N rows (images and their alterations), B images.

An image's verdict is one of

    attributed     to the source of highest probability
    unknown        it comes from no source that the attributor knows, at the bundle's threshold
    inconclusive   something speaks against either; `reason` says what:
                   in_reference       the reference holds its very pixels
                   near_copy          it is a copy of a reference image, encoded again
                   flips              mild re-encoding changes the verdict
                   improbable         no source has a probability of a half
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.artifacts import artifact_table, tensor_column
from manifpt.attributor.baseline import as_kept
from manifpt.attributor.bundle import Attributor, Verdicts
from manifpt.errors import ConfigError
from manifpt.plan import Plan
from manifpt.projecting import Projecting
from manifpt.stages import Shard, commit, not_finite

__all__ = ["ATTRIBUTED", "INCONCLUSIVE", "PARTS", "UNKNOWN", "Attributing", "commit_attributions", "judged"]

ATTRIBUTED, UNKNOWN, INCONCLUSIVE = "attributed", "unknown", "inconclusive"
PARTS = "attributions"
_HALF = 0.5
_COLUMNS = ["image_id", "uri", "container", "offset", "size_bytes", "etag", "content_hash", "neighbor_id", "distance",
            "twin"]  # fmt: skip


class Attributing:
    """Codes to verdicts: projects, then attributes. Holds the reference and the attributor in memory."""

    def __init__(self, plan: Plan, threads: int = 1, device: str = "cpu") -> None:
        """Raises:
        ConfigError: the attributor isn't the plan's any more.
        """
        self._plan, self._device = plan, device
        self._attributor = Attributor.load(plan.attributor_uri)
        if self._attributor.digest != plan.attributor_digest:
            raise ConfigError(
                f"The attributor {plan.attributor_uri} was replaced since this scan was planned: scan into another "
                f"--output, or put the earlier one back."
            )
        self._projecting = Projecting(plan, threads, device=device)

    def __call__(self, shard: Shard) -> Shard:
        shard = self._projecting(shard)
        begin = time.perf_counter()
        (spec,) = self._plan.spaces
        rows, artifact_nd = shard[f"rows:{spec.name}"], shard[f"artifact:{spec.name}"]
        shape = tuple(int(n) for n in shard[f"shape:{spec.name}"])
        artifact_nd = artifact_nd.reshape(-1, *shape)
        verdicts, is_told_n = self._attributor.verdicts_where_finite(artifact_nd, self._device)
        is_first_n = rows["variant"].to_numpy() == 0
        untold, rows = rows.filter(pa.array(~is_told_n & is_first_n)), rows.filter(pa.array(is_told_n))
        table = judged(rows, verdicts, 1 + len(self._plan.variants))
        out = {key: value for key, value in shard.items() if not key.startswith(("rows:", "artifact:", "shape:"))}
        rejected = pa.concat_tables([shard["rejected"], not_finite(untold, spec.name, "the attributor's output")])
        # An alteration that can't be used leaves its image without a vote, and is not an image of its own.
        listed = pc.is_in(rejected["image_id"], value_set=table["image_id"].combine_chunks())
        out["rejected"] = rejected.filter(pc.invert(listed))
        return out | {"verdicts": table, "seconds:attribute": np.array(time.perf_counter() - begin)}


def judged(rows: pa.Table, verdicts: Verdicts, variants: int) -> pa.Table:
    """One row an image: what is said of it, and whether its alterations agree.

    Args:
        rows: N rows, those of an image one after the other, with `variant`: 0 is the image itself.
        verdicts: of the same N.
        variants: rows that an image should have, itself among them. One that is missing counts against it.
    """
    named_n = np.where(verdicts.is_unknown_b, UNKNOWN, np.array(verdicts.label, dtype=object))
    variant_n, id_n = rows["variant"].to_numpy(), np.array(rows["image_id"].to_pylist(), dtype=object)
    image_b = np.flatnonzero(variant_n == 0)
    place = {image_id: b for b, image_id in enumerate(id_n[image_b])}
    agree_b = np.zeros(len(image_b), np.int64)
    for n, image_id in enumerate(id_n):
        b = place.get(image_id)
        if b is not None:
            agree_b[b] += named_n[n] == named_n[image_b[b]]
    flips_b = variants - agree_b
    table = rows.take(pa.array(image_b)).select(_COLUMNS)
    probability_b = verdicts.probability_bs[image_b].max(axis=1, initial=0.0)
    reason_b = [
        _reason(twin, int(flips), bool(unknown), float(probability))
        for twin, flips, unknown, probability in zip(
            table["twin"].to_pylist(), flips_b, verdicts.is_unknown_b[image_b], probability_b, strict=True
        )
    ]
    label_b = [verdicts.label[n] for n in image_b]
    verdict_b = [
        INCONCLUSIVE if reason else UNKNOWN if unknown else ATTRIBUTED
        for reason, unknown in zip(reason_b, verdicts.is_unknown_b[image_b], strict=True)
    ]
    source_b = [label if verdict == ATTRIBUTED else None for label, verdict in zip(label_b, verdict_b, strict=True)]
    columns: dict[str, Any] = {
        "verdict": pa.array(verdict_b, pa.string()),
        "source": pa.array(source_b, pa.string()),
        "reason": pa.array(reason_b, pa.string()),
        "label": pa.array(label_b, pa.string()),
        "probability": pa.array(probability_b, pa.float32()),
        "unknown_score": pa.array(verdicts.unknown_score_b[image_b], pa.float32()),
        "is_unknown": pa.array(verdicts.is_unknown_b[image_b]),
        "flips": pa.array(flips_b, pa.int8()),
        "feature": tensor_column(as_kept(verdicts.feature_ba[image_b])),
        "spectrum": tensor_column(as_kept(verdicts.spectrum_bk[image_b])),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _reason(twin: str | None, flips: int, is_unknown: bool, probability: float) -> str | None:
    """What speaks against a verdict, the strongest first; None: nothing."""
    if twin is not None:
        return "near_copy" if twin == "near_copy" else "in_reference"
    if flips:
        return "flips"
    return "improbable" if not is_unknown and probability < _HALF else None


def commit_attributions(plan: Plan, output: str, shard: Shard) -> dict[str, Any]:
    """Writes the verdicts of one shard and commits it."""
    number, (spec,) = int(shard["shard"]), plan.spaces
    metadata = {
        "plan_digest": plan.digest,
        "attributor_digest": plan.attributor_digest,
        "reference_digest": plan.reference_digest,
        "space": spec.name,
        "estimate": plan.estimate.identity(),
        "variants": list(plan.variants),
    }
    table = artifact_table(shard["verdicts"], None, (), metadata)
    # Every window continues the numbers of the one before, so that all are one table.
    return commit(output, shard, {f"{PARTS}/part-{number:05d}.parquet": table}, _statistics)


def _statistics(parts: Mapping[str, pa.Table]) -> dict[str, dict[str, dict[str, float]]]:
    """Images by verdict and source, as `manifpt.shards.tally` counts them."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for table in parts.values():
        told = zip(table["verdict"].to_pylist(), table["source"].to_pylist(), strict=True)
        for (verdict, source), images in Counter(told).items():
            out.setdefault(verdict, {})[source or ""] = {"images": images}
    return out
