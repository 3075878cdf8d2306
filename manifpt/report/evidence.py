"""The evidence panel, a page of what was measured of one image. What it shows, `evidence.json` holds.

Legend: H W pixels, C channels.

Names come from files, so they are drawn as plain text of bounded length; no mark is told by its colour alone.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from manifpt.report.drawing import distinct, literal
from manifpt.report.preview import artifact_picture, spectrum_picture
from manifpt.report.text import plain
from manifpt.spaces import SpaceSpec
from manifpt.spaces.pixels import pixels

__all__ = ["draw_evidence"]

_WIDTH_IN, _HEAD_IN, _FOOT_IN, _LINE_IN = 12.0, 1.35, 0.2, 0.149
_ROWS_IN = (2.45, 0.8, 2.0, 0.7, 2.7, 0.65)  # pictures, nearest reals, charts; with a gap below each
_DPI = 100
_MOST_ROWS = 8  # of labels and of sources
_LINE = 79  # characters that half a page holds, in the small font
_MOST_PX = 512  # of a picture's side: more than its place has
_SMALL, _USUAL, _LARGE = 8.5, 9.5, 17.0  # pt


def draw_evidence(
    evidence: dict[str, Any],
    image_hwc: np.ndarray,
    view_chw: np.ndarray,
    artifact: np.ndarray,
    nearest: Sequence[np.ndarray | None],
    spec: SpaceSpec,
) -> bytes:
    """The panel, as PNG.

    Args:
        evidence: as `manifpt.analysis.explain` describes it, but for the panel.
        image_hwc: uint8 [H, W, 3].
        view_chw: uint8 [3, H, W], as the space sees it.
        artifact: float [C, H, W] or [D].
        nearest: uint8 [H, W, 3], of each nearest real; None where it can't be shown.
        spec: of the space.
    """
    words = _reasons(evidence), _custody(evidence)
    rows_in = (*_ROWS_IN, _LINE_IN * max(map(len, words)))
    height_in = _HEAD_IN + sum(rows_in) + _FOOT_IN
    figure = Figure(figsize=(_WIDTH_IN, height_in))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows_in), 1, height_ratios=rows_in, left=0.03, right=0.97, top=1 - _HEAD_IN / height_in,
        bottom=_FOOT_IN / height_in, hspace=0,
    )  # fmt: skip
    _head(figure, evidence, height_in)
    columns = 4 if _has_spectrum(artifact, spec) else 3
    _pictures(grid[0].subgridspec(1, columns).subplots(), evidence, image_hwc, view_chw, artifact, spec)
    _nearest(grid[2].subgridspec(1, 5).subplots(), evidence["nearest_reals"], nearest)
    charts = grid[4].subgridspec(1, 4, width_ratios=(0.32, 1, 0.42, 1.1), wspace=0.05)
    _probabilities(figure.add_subplot(charts[1]), evidence)
    _distances(figure.add_subplot(charts[3]), evidence)
    halves = grid[6].subgridspec(1, 2, wspace=0.03)
    for number, lines in enumerate(words):
        _words(figure.add_subplot(halves[number]), lines)
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        figure.savefig(sink, format="png", dpi=_DPI)
    return sink.getvalue()


def _head(figure: Figure, evidence: dict[str, Any], height_in: float) -> None:
    found = evidence["verdict"]
    title = f"Attributed to {literal(found['source'], 50)}" if found["conclusive"] else "Inconclusive"
    figure.text(0.03, 1 - 0.35 / height_in, title, fontsize=_LARGE, fontweight="bold", va="center")
    figure.text(0.03, 1 - 0.67 / height_in, literal(evidence["image"]["uri"], 100), fontsize=_USUAL, va="center")
    figure.text(0.03, 1 - 0.9 / height_in, evidence["meaning"]["verdict"], fontsize=_USUAL, va="center", style="italic")


def _has_spectrum(artifact: np.ndarray, spec: SpaceSpec) -> bool:
    """Whether an artifact is made of pixels, and no spectrum itself."""
    return artifact.ndim == 3 and spec.kind == "rgb"


def _pictures(
    cells: Any, evidence: dict[str, Any], image_hwc: np.ndarray, view_chw: np.ndarray, artifact: np.ndarray,
    spec: SpaceSpec,
) -> None:  # fmt: skip
    image = evidence["image"]
    _show(
        cells[0],
        image_hwc,
        "The image",
        f"{image['width_px']} x {image['height_px']} px, {literal(image['format'], 8)}",
    )
    seen = pixels(view_chw[None], spec.color)[0]
    _show(
        cells[1], spectrum_picture(seen), "Its spectrum, as the space sees it", "log magnitude, low frequencies inside"
    )
    norm = f"|a| = {evidence['artifact']['norm']:.3f}"
    shown = artifact.astype(np.float32)
    if artifact.ndim == 3:
        _show(cells[2], artifact_picture(shown), f"Its artifact, {literal(spec.name, 20)}", f"{norm}; grey is zero")
    else:
        cells[2].plot(shown, linewidth=0.5, color="black")
        cells[2].set_title(f"Its artifact, {literal(spec.name, 20)}", fontsize=_USUAL)
        cells[2].set_xlabel(f"{norm}; {len(shown):,} dimensions", fontsize=_SMALL)
        cells[2].tick_params(labelsize=_SMALL)
        cells[2].set_box_aspect(1)
    if _has_spectrum(artifact, spec):
        _show(cells[3], spectrum_picture(shown), "The artifact's spectrum", "log magnitude")


def _nearest(cells: Any, rows: Sequence[dict[str, Any]], nearest: Sequence[np.ndarray | None]) -> None:
    for cell in cells[len(rows) :]:
        cell.set_axis_off()
    for number, (cell, row, picture) in enumerate(zip(cells, rows, nearest, strict=False), 1):
        title, below = f"Nearest real {number}, at {row['distance']:.3f}", literal(row["image_id"], 24)
        if picture is None:
            picture = np.full((1, 1, 3), 255, np.uint8)
            cell.text(0.5, 0.5, "gone or changed", ha="center", va="center", fontsize=_USUAL, transform=cell.transAxes)
        _show(cell, picture, title, below)


def _probabilities(axes: Axes, evidence: dict[str, Any]) -> None:
    rows = evidence["probabilities"][:_MOST_ROWS]
    share = [100 * row["probability"] for row in rows]
    axes.barh(range(len(rows)), share, height=0.6, color="0.75", edgecolor="black", linewidth=0.7)
    for y, value in enumerate(share):
        axes.text(118, y, f"{value:.1f}%", ha="right", va="center", fontsize=_SMALL)  # where no line crosses it
    least = 100 * evidence["attributor"]["threshold"]
    axes.axvline(least, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 119)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel(f"%; dashed: {least:.1f}% needed, 50 and the calibration error", fontsize=_SMALL)
    left = len(evidence["probabilities"]) - len(rows)
    names = distinct([row["label"] for row in evidence["probabilities"]], 20)
    _rows(axes, names[: len(rows)], "Probability of each label, calibrated", left)


def _distances(axes: Axes, evidence: dict[str, Any]) -> None:
    sources, norm = evidence["sources"], evidence["artifact"]["norm"]
    rank = {row["label"]: number for number, row in enumerate(evidence["probabilities"])}
    names = sorted(sources, key=lambda name: (rank.get(sources[name]["label"], len(rank)), name))
    shown, told = names[:_MOST_ROWS], distinct(names, 20)
    boxes = [_box(sources[name]["quantiles"]) for name in shown]
    axes.bxp(
        boxes,
        positions=np.arange(len(shown)),
        orientation="horizontal",
        showfliers=False,
        widths=0.5,
        medianprops={"color": "black"},
    )
    axes.axvline(norm, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("distance |a|; box: middle half; whiskers: middle 99%; dashed: this image", fontsize=_SMALL)
    ticks = [
        f"{name_told}\n{sources[name]['images']:,} images, P {sources[name]['percentile']:.1f}"
        for name, name_told in zip(shown, told, strict=False)
    ]
    _rows(axes, ticks, "Distances of sources (P: this image's percentile)", len(names) - len(shown))


def _box(quantiles: dict[str, float]) -> dict[str, Any]:
    names = {"whislo": "0.5", "q1": "25", "med": "50", "q3": "75", "whishi": "99.5"}
    return {name: quantiles[share] for name, share in names.items()} | {"fliers": []}


def _rows(axes: Axes, names: Sequence[str], title: str, left: int) -> None:
    """Names on the vertical axis, the first one on top."""
    lines = ["\n".join(literal(line, 28) for line in name.split("\n")) for name in names]
    axes.set_yticks(np.arange(len(names)), labels=lines)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title + (f"; {left} more in the JSON" if left else ""), fontsize=_USUAL)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _reasons(evidence: dict[str, Any]) -> list[str]:
    found, tested = evidence["verdict"], evidence["attributor"]
    lines = ["WHY" if found["reasons"] else "NO RULE SPEAKS AGAINST IT"]
    for reason in found["reasons"]:
        lines += textwrap.wrap(plain(reason, 240), _LINE, initial_indent="- ", subsequent_indent="  ")
    lines += ["", "HOW FAR TO BELIEVE IT"]
    lines += textwrap.wrap(
        f"On its test images the attributor was right in {_percent(tested['accuracy'])}; where it named "
        f"{plain(tested['label'])}, in {_percent(tested['precision'])}; {tested['test_images']:,} test images were of "
        f"{plain(tested['label'])}. Calibration error {_percent(tested['calibration_error'])}.",
        _LINE,
    )
    for name in ("probability", "unknown", "distance", "nearest_reals"):
        said = f"{name.replace('_', ' ').capitalize()}: {evidence['meaning'][name]}"
        lines += ["", *textwrap.wrap(said, _LINE)]
    return lines


def _custody(evidence: dict[str, Any]) -> list[str]:
    image, code = evidence["image"], evidence["tool"]["code"]
    rows = {
        "made": evidence["created"],
        "image SHA-256": image["sha256"],
        "pixels BLAKE2b": image["content_hash"],
        "reference digest": evidence["reference"]["digest"],
        "weights SHA-256": evidence["attributor"]["weights_sha256"],
        "run's plan": evidence["run"]["plan_digest"],
        f"code, {code['kind']}": code["value"],
    }
    lines = ["CHAIN OF CUSTODY"]
    for name, value in rows.items():
        lines += [name, f"  {value}"]
    versions = evidence["tool"]["versions"]
    said = ", ".join(f"{name} {versions[name]}" for name in ("manifpt", "torch", "numpy", "pillow") if name in versions)
    space, estimate = plain(evidence["run"]["space"]["name"], 20), evidence["run"]["estimate"]["name"]
    return [*lines, f"space {space}, x* by {estimate}, {evidence['reference']['images']:,} reals", said]


def _words(axes: Axes, lines: Sequence[str]) -> None:
    axes.set_axis_off()
    text = "\n".join(literal(line, 2 * _LINE) for line in lines)
    axes.text(0, 1, text, va="top", fontsize=_SMALL, family="monospace", linespacing=1.25, transform=axes.transAxes)


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.1f}%"


def _show(axes: Axes, picture_hwc: np.ndarray, title: str, below: str) -> None:
    if max(picture_hwc.shape[:2]) > _MOST_PX and picture_hwc.dtype == np.uint8:
        thumbnail = Image.fromarray(picture_hwc)
        thumbnail.thumbnail((_MOST_PX, _MOST_PX))
        picture_hwc = np.asarray(thumbnail)
    axes.imshow(picture_hwc, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=_USUAL)
    axes.set_xlabel(below, fontsize=_SMALL)
