"""What a run does, as metrics of the Ray node it runs on, for Prometheus to scrape.

Ray exports them on the node's `--metrics-export-port`, with the prefix `ray_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["METRICS", "Metric", "Telemetry"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name as Ray gets it, what it is, its kind and its labels."""

    name: str
    kind: str
    description: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("manifpt_images_total", "counter", "Images done.", ("status", "source")),
    Metric("manifpt_rejects_total", "counter", "Images rejected.", ("reason",)),
    Metric("manifpt_stage_seconds", "counter", "Seconds that a stage's workers took.", ("stage",)),
    Metric("manifpt_shards_committed_total", "counter", "Shards committed."),
    Metric("manifpt_drift_score", "gauge", "-log10 of a drift test's adjusted p-value.", ("test",)),
    Metric("manifpt_alerts_total", "counter", "Alerts raised.", ("rule", "severity")),
    Metric("manifpt_scan_watermark_seconds", "gauge", "Unix time up to which a bucket has been scanned."),
)


@dataclass
class Telemetry:
    """Told by the driver; does nothing where Ray isn't initialised."""

    _seen: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def shard(self, sources: Mapping[str, int], reasons: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """One committed shard: images by source, rejected images by reason, seconds by stage."""

    def verdicts(self, status: Mapping[str, int], sources: Mapping[str, int]) -> None:
        """One scanned shard: images by status without a source (`unknown`, ...), and attributed ones by source."""

    def drift(self, adjusted: Mapping[str, float]) -> None:
        """One window's adjusted p-values by test."""

    def alert(self, rule: str, severity: str) -> None:
        """One alert."""

    def watermark(self, time_s: float) -> None:
        """Unix time up to which everything has been scanned."""
