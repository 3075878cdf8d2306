"""The report of a scan's folder: its last windows, what has changed in them, and how far verdicts can be believed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from manifpt.attributor.files import bundle_config, bundle_file, bundle_object
from manifpt.decode import decode
from manifpt.errors import BadImage
from manifpt.fetch import fetch
from manifpt.monitoring.attributing import PARTS
from manifpt.monitoring.settings import Settings
from manifpt.monitoring.windows import open_window
from manifpt.report.drawing import color_of, distinct, grid, in_legend, png
from manifpt.report.page import Figure, Section, Table, render_page
from manifpt.report.text import plain
from manifpt.storage import join, store_of

__all__ = ["write_scan_report"]

_MOST_SOURCES = 20
_THUMB_PX = 64
_LOCATION = ["image_id", "uri", "container", "offset", "size_bytes", "etag"]


def write_scan_report(settings: Settings, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes `report.html`.

    Args:
        settings: of the scan.
        results: of its windows, oldest first, at least one.
    """
    last = results[-1]
    facts = [
        ("Input", ", ".join(plain(uri, 200) for uri in settings.inputs)),
        ("Last window", f"{last['window']:05d}, {last['began']}"),
        ("Attributor", f"{settings.template.attributor_uri}, digest {settings.template.attributor_digest[:16]}"),
        ("Reference", f"{settings.template.reference_uri}, digest {settings.template.reference_digest[:16]}"),
        ("Drift level", f"{settings.level:g}: the chance of any finding in a window in which nothing has changed"),
    ]
    sections = [
        Section("Windows", (_WINDOWS,), (_windows(results), _shares_figure(results))),
        Section("What has changed", (_CHANGED,), tuple(_changes(results))),
        Section("Newcomers", (_NEWCOMERS,), tuple(_newcomers(settings, last))),
        Section("How far to believe it", (_BELIEF,), tuple(_belief(settings.template.attributor_uri, last))),
    ]
    page = render_page("Monitoring scan", facts, sections, "")
    store_of(settings.output).write(join(settings.output, "report.html"), page)


_WINDOWS = (
    "A window is what one scan found new. Attributed images have a source; unknown ones come from none that the "
    "attributor knows; inconclusive ones change their verdict when they are encoded again, are copies of reference "
    "images, or have no source of a probability of a half. Objects that were deleted since are counted, and their "
    "attributions stay."
)
_CHANGED = (
    "Tests compare each window with held-out images of the attributor's training, within the most probable source, and "
    "with the windows before that gave no alert. p-values are corrected for the number of tests in a window (Holm). "
    "Images count as independent: many of one upload look like a change, and are one."
)
_NEWCOMERS = (
    "Clusters among the last window's unknown images that are about as compact as a known source. Each may be one "
    "generator that the attributor hasn't seen; look at its images before you believe it."
)
_BELIEF = (
    "Probabilities are shares among the known sources, calibrated on images that the attributor was not trained on. "
    "They are evidence about images like those, not proof of who made an image."
)


def _windows(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            f"{result['window']:05d}", result["began"], result["images"], sum(result["attributed"].values()),
            result["unknown"], result["inconclusive"], result["rejected"], result["objects"].get("changed", 0),
            result["objects"].get("gone", 0), len(result["alerts"]),
        )
        for result in results
    )  # fmt: skip
    head = ("window", "began", "images", "attributed", "unknown", "inconclusive", "rejected", "changed objects",
            "deleted objects", "alerts")  # fmt: skip
    return Table("Images of each window by verdict", head, rows)


def _shares_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of shares, window by window."""
    totals: dict[str, int] = {}
    for result in results:
        for source, images in result["attributed"].items():
            totals[source] = totals.get(source, 0) + images
    shown = sorted(totals, key=lambda source: (-totals[source], source))[:_MOST_SOURCES]
    others = [sum(n for s, n in result["attributed"].items() if s not in shown) for result in results]
    rows: list[tuple[str, list[int], str]] = [
        (name, [result["attributed"].get(source, 0) for result in results], color_of(place, len(shown)))
        for place, (source, name) in enumerate(zip(shown, distinct(shown), strict=True))
    ]
    rows += [("other sources", others, "#bbbbbb")] if any(others) else []
    for name, color in (("unknown", "#111111"), ("inconclusive", "#777777"), ("rejected", "#dddddd")):
        rows.append((name, [result[name] for result in results], color))
    figure, axes = grid(1, 1, 9.0, 4.2)
    axis, place_w = axes[0, 0], np.arange(len(results))
    images_w = np.maximum([result["images"] for result in results], 1)
    bottom_w = np.zeros(len(results))
    for place, (name, count_w, color) in enumerate(rows):
        share_w = np.array(count_w) / images_w
        hatch = "//" if name in ("unknown", "inconclusive", "rejected") else ("", "..", "xx")[place // 10 % 3]
        axis.bar(place_w, share_w, 0.8, bottom_w, color=color, label=in_legend(name), hatch=hatch,
                 edgecolor="white", linewidth=0.3)  # fmt: skip
        bottom_w += share_w
    for place, result in enumerate(results):
        if result["alerts"]:
            axis.text(place, 1.01, "!", ha="center", va="bottom", fontsize=12, color="#b00020", fontweight="bold")
    axis.set_xticks(place_w, [f"{result['window']:05d}" for result in results], rotation=90, fontsize=7)
    axis.set_ylim(0, 1.08)
    axis.set_ylabel("share of images")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    text = (
        f"Shares of {len(shown)} sources and of unknown, inconclusive and rejected images. ! marks windows with alerts."
    )
    return Figure("shares", "Shares of each window", text, png(figure))


def _changes(results: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    alerts = tuple(
        (alert["window"], alert["severity"], alert["rule"], plain(alert["sentence"], 300))
        for result in reversed(results)
        for alert in result["alerts"]
    )
    notes = () if alerts else ("No alert in these windows.",)
    yield Table("Alerts, the newest first", ("window", "severity", "rule", "what"), alerts, notes)
    rows = tuple(
        (
            f"{result['window']:05d}", finding["name"], finding["statistic"], finding["p_value"], finding["adjusted"],
            "yes" if finding["fired"] else "no", plain(finding["detail"], 400),
        )
        for result in reversed(results)
        for finding in result["findings"]
    )  # fmt: skip
    head = ("window", "test", "statistic", "p", "p, corrected", "fired", "compared")
    grouped = sorted({label for result in results for label in result.get("not_compared", ())})
    without = ", ".join(plain(label, 60) for label in grouped)
    which = f"Not compared in norms, features and spectra: {without}."
    note = f"{which} Held-out images come in groups, and new ones are of others."
    notes = (note,) if grouped else ()
    yield Table("Tests, the newest first", head, rows, notes)


def _newcomers(settings: Settings, last: Mapping[str, Any]) -> Iterator[Table | Figure]:
    rows = tuple(
        (place, found["images"], found["compactness"], plain(found["nearest_source"], 60), found["separation"])
        for place, found in enumerate(last["newcomers"], start=1)
    )
    head = ("cluster", "images", "width, of a known source's", "nearest source", "distance, in its widths")
    notes = () if rows else ("None in the last window.",)
    yield Table("Clusters of unknown images", head, rows, notes)
    if not rows:
        return
    wanted = [image_id for found in last["newcomers"] for image_id in found["examples"]]
    pictures = _pictures(settings, last["window"], wanted)
    for place, found in enumerate(last["newcomers"], start=1):
        examples = [pictures.get(image_id) for image_id in found["examples"]]
        shown = [picture for picture in examples if picture is not None]
        if shown:
            text = f"The {len(shown)} images nearest to the centre of cluster {place}: " + ", ".join(
                plain(image_id, 80) for image_id in found["examples"]
            )
            yield Figure(f"newcomer-{place}", f"Cluster {place}", text, _strip(shown))


def _pictures(settings: Settings, number: int, image_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Pixels by image id, of those that are still there."""
    window = open_window(settings.output, number, settings.template)
    assert window is not None and window.plan is not None
    wanted, rows = pa.array(image_ids, pa.string()), []
    for part in window.plan.numbers:
        uri = join(settings.output, PARTS, f"part-{part:05d}.parquet")
        table = pq.read_table(pa.BufferReader(store_of(uri).read(uri)), columns=_LOCATION, use_threads=False)
        rows += table.filter(pc.is_in(table["image_id"], value_set=wanted)).to_pylist()
        if len(rows) == len(set(image_ids)):
            break
    found = {}
    for row, data in zip(rows, fetch(rows), strict=True):
        try:
            if isinstance(data, bytes):
                found[row["image_id"]] = decode(data)
        except BadImage:
            continue
    return found


def _strip(pictures: Sequence[np.ndarray]) -> bytes:
    """Pictures side by side, small ones enlarged without smoothing."""
    strip = Image.new("RGB", (len(pictures) * (_THUMB_PX + 4), _THUMB_PX), "white")
    for place, image_hwc in enumerate(pictures):
        picture = Image.fromarray(image_hwc)
        how = Image.Resampling.NEAREST if max(picture.size) < _THUMB_PX else Image.Resampling.LANCZOS
        scale = _THUMB_PX / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        strip.paste(picture.resize(size, how), (place * (_THUMB_PX + 4), 0))  # type: ignore[arg-type]
    sink = io.BytesIO()
    strip.save(sink, "PNG")
    return sink.getvalue()


def _belief(attributor_uri: str, last: Mapping[str, Any]) -> Iterator[Table | Figure]:
    config = bundle_config(attributor_uri)
    calibration = bundle_object(attributor_uri, config, "calibration.json")
    unknown = calibration["unknown"]
    rows = (
        ("calibration error on test images (ECE)", calibration["calibration_error"]),
        ("the same, before calibration", calibration["calibration_error_uncalibrated"]),
        ("score of unknownness", unknown["score"]),
        ("known images to be called unknown, as chosen", unknown["rate"]),
        ("known test images called unknown", unknown["measured_rate"]),
    )
    yield Table("The attributor", ("what", "value"), rows)
    picture = bundle_file(attributor_uri, config, "calibration.png")
    text = "Share of test images whose most probable source is right, by its probability, before and after calibration."
    yield Figure("calibration", "Reliability of the attributor's probabilities", text, picture)
    reasons = tuple((name, count) for name, count in last["inconclusive_reasons"].items())
    yield Table("Why images of the last window are inconclusive", ("reason", "images"), reasons)
    rejects = tuple((name, count) for name, count in last["rejected_reasons"].items())
    yield Table("Why images of the last window were rejected", ("reason", "images"), rejects)
