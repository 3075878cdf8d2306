"""What a finished window says: counts, drift, newcomers, alerts. A function of its shards and of what was before.

Legend: B images.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.artifacts import to_numpy
from manifpt.attributor.baseline import BASELINE
from manifpt.attributor.files import bundle_config, bundle_file
from manifpt.documents import table_of
from manifpt.monitoring.alerts import Alert, alerts_of
from manifpt.monitoring.attributing import INCONCLUSIVE, PARTS, UNKNOWN
from manifpt.monitoring.drift import Counts, Sample, drift
from manifpt.monitoring.newcomers import newcomers
from manifpt.monitoring.settings import Settings
from manifpt.monitoring.windows import Window, write_window_rejected
from manifpt.storage import join, store_of

__all__ = ["alerts_in", "counts_of", "read_baseline", "window_result"]

_MOST_IMAGES = 20_000  # of a window that drift and newcomers look at
_READ_AHEAD = 16
_OF_BASELINE = ("label", "predicted", "group", "is_unknown", "distance", "feature", "spectrum")
_COLUMNS = ["image_id", "verdict", "source", "reason", "label", "distance", "is_unknown", "feature",
            "spectrum"]  # fmt: skip


@dataclass(slots=True)
class _Seen:
    """What the shards of a window hold together.

    Attributes:
        sources, verdicts, reasons: images by each.
        image_id_b: of the images looked at.
        sample: the same images.
    """

    sources: Counter[str]
    verdicts: Counter[str]
    reasons: Counter[str]
    image_id_b: np.ndarray
    sample: Sample


def window_result(
    window: Window, settings: Settings, quiet: Sequence[Mapping[str, Any]], recent: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `window.json`; also writes the window's `rejected.parquet`.

    Args:
        window: all of whose shards are committed.
        settings: of the scan.
        quiet: results of windows before that gave no alert, oldest first.
        recent: of the last ones before, where none is quiet.
    """
    seen = _seen(window)
    rejects = write_window_rejected(window)
    counts = Counts(
        dict(sorted(seen.sources.items())), seen.verdicts[UNKNOWN], seen.verdicts[INCONCLUSIVE], sum(rejects.values())
    )
    baseline = read_baseline(settings.template.attributor_uri)
    # What fires goes on firing until it is dealt with: windows that alerted are no measure of what is usual. However
    # many of them come, each knows what was.
    before = _merged(quiet)
    if not quiet and recent and "usual" in recent[-1]:
        before = counts_of(recent[-1]["usual"])
    seed = window.number
    findings = drift(baseline, seen.sample, before, counts, settings.level, seed, _merged(recent))
    found = newcomers(seen.sample, seen.image_id_b, baseline, seed)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(window.began_s))
    alerts = alerts_of(
        settings.rules, findings, counts, found, time=stamp, window=f"{window.number:05d}", is_first=not before.images
    )
    return {
        "window": window.number,
        "began": stamp,
        "began_s": window.began_s,
        "objects": window.objects,
        "images": counts.images,
        "attributed": dict(counts.sources),
        "unknown": counts.unknown,
        "inconclusive": counts.inconclusive,
        "rejected": counts.rejected,
        "inconclusive_reasons": dict(seen.reasons.most_common()),
        "rejected_reasons": dict(rejects.most_common()),
        "norms": _norms(seen.sample),
        "looked_at": len(seen.sample),
        "not_compared": sorted(baseline.grouped_labels() & set(seen.sample.label_b)),
        "compared_with_windows": len(quiet),
        "usual": {
            "attributed": dict(before.sources),
            "unknown": before.unknown,
            "inconclusive": before.inconclusive,
            "rejected": before.rejected,
        },
        "findings": [asdict(finding) for finding in findings],
        "newcomers": [asdict(newcomer) for newcomer in found],
        "alerts": [asdict(alert) for alert in alerts],
    }


def _merged(results: Sequence[Mapping[str, Any]]) -> Counts:
    found = Counts()
    for one in results:
        found = found.merged(counts_of(one))
    return found


def counts_of(result: Mapping[str, Any]) -> Counts:
    """Of a window's result."""
    return Counts(result["attributed"], result["unknown"], result["inconclusive"], result["rejected"])


def alerts_in(result: Mapping[str, Any]) -> list[Alert]:
    """Of a window's result."""
    names = [field.name for field in fields(Alert)]
    return [Alert(**{name: alert[name] for name in names}) for alert in result["alerts"]]


def read_baseline(attributor_uri: str) -> Sample:
    """The held-out images of an attributor's bundle.

    Raises:
        ConfigError: the bundle has none, or another one than it should.
    """
    data = bundle_file(attributor_uri, bundle_config(attributor_uri), BASELINE)
    table = table_of(data, join(attributor_uri, BASELINE), _OF_BASELINE)
    sample = _sample(table, "predicted")
    together = zip(table["label"].to_pylist(), table["group"].to_pylist(), strict=True)
    groups = [None if group is None else f"{label}/{group}" for label, group in together]
    return replace(sample, group_b=np.array(groups, dtype=object))


def _sample(table: pa.Table, label: str) -> Sample:
    return Sample(
        np.array(table[label].to_pylist(), dtype=object),
        table["distance"].to_numpy().astype(np.float64),
        to_numpy(table["feature"]).astype(np.float32),
        to_numpy(table["spectrum"]).astype(np.float32),
        table["is_unknown"].to_numpy(zero_copy_only=False),
    )


def _seen(window: Window) -> _Seen:
    """Counts of all images, and those with the smallest hashes of their ids to look at: chance, but the same again."""
    sources: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    kept: pa.Table | None = None
    for table in _parts(window):
        verdicts.update(table["verdict"].to_pylist())
        sources.update(s for s in table["source"].to_pylist() if s is not None)
        reasons.update(r for r in table["reason"].to_pylist() if r is not None)
        keys = [hashlib.blake2b(i.encode(), digest_size=8).hexdigest() for i in table["image_id"].to_pylist()]
        table = table.append_column("key", pa.array(keys, pa.string())).replace_schema_metadata(None)
        kept = table if kept is None else pa.concat_tables([kept, table])
        if len(kept) > 2 * _MOST_IMAGES:
            kept = kept.sort_by("key").slice(0, _MOST_IMAGES)
    if kept is None:
        nothing = np.empty((0, 1), np.float32)
        nobody = Sample(np.empty(0, object), np.empty(0), nothing, nothing, np.empty(0, bool))
        return _Seen(sources, verdicts, reasons, np.empty(0, object), nobody)
    kept = kept.sort_by("key").slice(0, _MOST_IMAGES).combine_chunks()
    return _Seen(
        sources, verdicts, reasons, np.array(kept["image_id"].to_pylist(), dtype=object), _sample(kept, "label")
    )


def _parts(window: Window) -> Iterator[pa.Table]:
    """The window's attributions, shard by shard, some requests ahead."""

    def read(number: int) -> pa.Table:
        uri = join(window.output, PARTS, f"part-{number:05d}.parquet")
        return pq.read_table(pa.BufferReader(store_of(uri).read(uri)), columns=_COLUMNS, use_threads=False)

    numbers = iter(window.plan.numbers if window.plan is not None else ())
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        while block := list(itertools.islice(numbers, 4 * _READ_AHEAD)):
            yield from pool.map(read, block)


def _norms(sample: Sample) -> dict[str, dict[str, float]]:
    """By most probable label: images looked at, and quartiles of their artifacts' norms."""
    found = {}
    for label in sorted(set(sample.label_b)):
        distance_n = sample.distance_b[sample.label_b == label]
        low, middle, high = np.quantile(distance_n, [0.25, 0.5, 0.75])
        found[label] = {"images": len(distance_n), "q25": float(low), "q50": float(middle), "q75": float(high)}
    return found
