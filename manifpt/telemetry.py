"""What a run does, as metrics of the Ray node that its driver is on, for Prometheus to scrape.

A node exports them on its `--metrics-export-port`, as `exported` names them. What is counted is what this driver did:
Ray gives each driver's metrics a label of their own (WorkerId), and takes what was told last before it ends. Counters
stay, at their last value, until the node ends. A gauge goes 20 s after it was set, whether its driver lives or not.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METRICS", "Metric", "Telemetry", "exported"]

_MOST_VALUES = 100  # of a label of a metric: each is a time series for as long as the node lives
_MOST_CHARACTERS = 64
_ODD = re.compile(r"[^A-Za-z0-9._:/-]")  # names come from strangers' buckets, and Ray raises where they aren't ASCII
_BEAT_S = 5.0  # of the gauge that says that a run goes on
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as Ray is given it.
        kind: Counter or Gauge.
        description: for whoever scrapes it.
        labels: names of its labels.
    """

    name: str
    kind: str
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    metric.name: metric
    for metric in (
        Metric("manifpt_images_total", "Counter", "Images done, by status and source.", ("status", "source")),
        Metric("manifpt_rejects_total", "Counter", "Images rejected, by reason.", ("reason",)),
        Metric("manifpt_stage_seconds", "Counter", "Seconds that a stage's workers took.", ("stage",)),
        Metric("manifpt_shards_committed_total", "Counter", "Shards committed."),
        Metric("manifpt_shards_pending", "Gauge", "Shards that the run has yet to commit; only while it runs."),
        Metric("manifpt_drift_score", "Gauge", "-log10 of a drift test's adjusted p-value.", ("test",)),
        Metric("manifpt_alerts_total", "Counter", "Alerts raised.", ("rule", "severity")),
        Metric("manifpt_scan_watermark_seconds", "Gauge", "Unix time up to which a bucket was scanned.", ("scan",)),
    )
}


def exported(metric: Metric) -> str:
    """The name in a scrape."""
    total = "_total" if metric.kind == "Counter" and not metric.name.endswith("_total") else ""
    return f"ray_{metric.name}{total}"


class Telemetry:
    """Told by the driver what happens. Does nothing where Ray isn't initialised.

    Labels are letters, digits and ._:/- alone, at most 64 of them; of a label's values the first 100 count, and all
    others are `other`.

    As a context it goes on saying what is pending, also while no shard gets done.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._values: dict[tuple[str, str], set[str]] = {}
        self._pending: int | None = None
        self._closed = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Telemetry:
        self._beating.start()
        return self

    def __exit__(self, *of_error: object) -> None:
        self._closed.set()
        self._beating.join()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            if self._pending is not None:
                self._record("manifpt_shards_pending", self._pending)

    def shard(self, tally: Mapping[str, Any], pending: int) -> None:
        """A committed shard.

        Args:
            tally: of `manifpt.shards.tally`. Statuses are `done` and `rejected`; of a scan `attributed`, `unknown`,
                `inconclusive` and `rejected`.
            pending: shards that are left.
        """
        for status, sources in tally["images"].items():
            for source, images in sources.items():
                self._record("manifpt_images_total", images, status=status, source=source)
        for reason, images in tally["reasons"].items():
            self._record("manifpt_rejects_total", images, reason=reason)
        for stage, seconds in tally["seconds"].items():
            self._record("manifpt_stage_seconds", seconds, stage=stage)
        self._record("manifpt_shards_committed_total", 1)
        self.pending(pending)

    def pending(self, shards: int) -> None:
        """Shards that are left, once before the first is committed."""
        self._pending = shards
        self._record("manifpt_shards_pending", shards)

    def drift(self, adjusted: Mapping[str, float]) -> None:
        """A window's adjusted p-values, above 0, by test."""
        for test, p_value in adjusted.items():
            self._record("manifpt_drift_score", -math.log10(max(p_value, sys.float_info.min)), test=test)

    def alert(self, rule: str, severity: str) -> None:
        """One alert."""
        self._record("manifpt_alerts_total", 1, rule=rule, severity=severity)

    def watermark(self, time_s: float, scan: str) -> None:
        """A scan, by its output folder, that has seen all that was in its bucket at a unix time."""
        # The end of a long place tells it from others: many scans end in /scans, and fewer begin in another bucket.
        self._record("manifpt_scan_watermark_seconds", time_s, scan=scan[-_MOST_CHARACTERS:])

    def _record(self, name: str, value: float, **labels: str) -> None:
        metric = METRICS[name]
        if "ray" not in sys.modules or (metric.kind == "Counter" and value <= 0):
            return
        import ray
        from ray.util import metrics

        if not ray.is_initialized():
            return
        if name not in self._made:
            self._made[name] = getattr(metrics, metric.kind)(name, metric.description, metric.labels)
        tags = {label: self._bounded(name, label, text) for label, text in labels.items()}
        (self._made[name].inc if metric.kind == "Counter" else self._made[name].set)(float(value), tags)

    def _bounded(self, name: str, label: str, text: str) -> str:
        text = _ODD.sub("_", text)[:_MOST_CHARACTERS] or "none"
        values = self._values.setdefault((name, label), set())
        if text not in values and len(values) >= _MOST_VALUES:
            return _OTHER
        values.add(text)
        return text
