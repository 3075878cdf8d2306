"""The figures of a fingerprint report, as PNG. Each takes numbers of `report.json`, or means of images.

Legend: B images, S labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.cluster import hierarchy

from manifpt.manifest import REAL
from manifpt.metrics.clusters import tree_of
from manifpt.report.drawing import MARKERS, color_of, distinct, grid, in_legend, literal, png, shown
from manifpt.report.preview import artifact_picture

__all__ = ["draw_alignment", "draw_confusion", "draw_distances", "draw_map", "draw_means", "draw_norms"]


def draw_norms(distance_b: np.ndarray, label_b: np.ndarray, labels: Sequence[str]) -> bytes:
    """Artifact norms of each label: box from the 25th to the 75th percentile, whiskers from the 5th to the 95th."""
    figure, axes = grid(1, 1, 7.5, 0.8 + 0.24 * len(labels))
    axis = axes[0, 0]
    by_label = [distance_b[label_b == number] for number in range(len(labels))]
    boxes = axis.boxplot(by_label, orientation="horizontal", whis=(5, 95), showfliers=False, patch_artist=True,
                         widths=0.6, tick_labels=shown(labels, 24))  # fmt: skip
    for box, label in zip(boxes["boxes"], labels, strict=True):
        box.set(facecolor="#9ecae1" if label != REAL else "#fdae6b", edgecolor="#333333")
    for median in boxes["medians"]:
        median.set(color="#111111", linewidth=1.6)
    axis.invert_yaxis()
    axis.set_xlabel("norm of the artifact: distance to the projection")
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    return png(figure)


def draw_means(
    labels: Sequence[str],
    mean_artifact_schw: np.ndarray,
    mean_spectrum_shw: np.ndarray | None,
    real_spectrum_hw: np.ndarray | None,
) -> bytes:
    """By label: the mean artifact; the mean log spectrum, and what it is more than that of the reals."""
    columns = 1 if mean_spectrum_shw is None else 3
    across = max(1, 6 // columns)  # labels side by side
    figure, axes = grid(-(-len(labels) // across), across * columns, 1.3, 1.5)
    for axis in axes.flat:
        axis.set_axis_off()
    gain_shw = None if mean_spectrum_shw is None or real_spectrum_hw is None else mean_spectrum_shw - real_spectrum_hw
    most = 1e-12 if gain_shw is None else max(1e-12, float(np.percentile(np.abs(gain_shw), 99)))
    for number, label in enumerate(shown(labels, 20)):
        row, place = divmod(number, across)
        cells = axes[row, place * columns : (place + 1) * columns]
        mean_chw = mean_artifact_schw[number]
        cells[0].imshow(artifact_picture(mean_chw))
        cells[0].set_title(label, fontsize=7, loc="left")
        if mean_spectrum_shw is not None and gain_shw is not None:
            cells[1].imshow(mean_spectrum_shw[number], cmap="magma")
            cells[1].set_title("spectrum", fontsize=7)
            cells[2].imshow(gain_shw[number], cmap="RdBu_r", vmin=-most, vmax=most)
            cells[2].set_title("less the reals'", fontsize=7)
    return png(figure)


def draw_distances(labels: Sequence[str], distance_ss: np.ndarray, title: str) -> bytes:
    """The tree of fingerprints by average linkage, and beside it the distances in the tree's order."""
    size = 0.8 + 0.26 * len(labels)
    figure, axes = grid(1, 2, max(4.0, size), max(3.0, size))
    tree = tree_of(distance_ss)
    names, short = shown(labels, 24), shown(labels, 14)
    found = hierarchy.dendrogram(tree, orientation="left", ax=axes[0, 0], labels=names,
                                 color_threshold=0, above_threshold_color="#333333", leaf_font_size=8)  # fmt: skip
    axes[0, 0].set_xlabel(title)
    axes[0, 0].spines[["top", "right", "left"]].set_visible(False)
    order = found["leaves"][::-1]
    image = axes[0, 1].imshow(np.maximum(distance_ss[np.ix_(order, order)], 0), cmap="viridis")
    axes[0, 1].set_yticks(range(len(order)), [])
    axes[0, 1].set_xticks(range(len(order)), [short[place] for place in order], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes[0, 1], shrink=0.7)
    return png(figure)


def draw_map(found: Mapping[str, Any], labels: Sequence[str]) -> bytes:
    """A map of images, each label with a colour and a shape."""
    figure, axes = grid(1, 1, 8.5, 5.6)
    axis = axes[0, 0]
    x_b, y_b, label_b = (np.array(found[name]) for name in ("x", "y", "label"))
    names = [in_legend(name) for name in distinct(labels)]
    for number in np.unique(label_b):
        of_label = label_b == number
        axis.scatter(x_b[of_label], y_b[of_label], s=9, linewidths=0, alpha=0.8, color=color_of(number, len(labels)),
                     marker=MARKERS[number % len(MARKERS)], label=names[number])  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    columns = 1 if len(labels) <= 24 else 2
    axis.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, ncols=columns)
    return png(figure)


def draw_alignment(rows: Mapping[str, Mapping[str, float | None]], choices: Sequence[str]) -> bytes:
    """NMI of clusters with design choices: a row a space, a column a choice; blank where there is none."""
    figure, axes = grid(1, 1, 1.8 + 0.85 * len(choices), 0.9 + 0.42 * len(rows))
    axis = axes[0, 0]
    value_rc = np.array([[row.get(name) for name in choices] for row in rows.values()], dtype=float)
    image = axis.imshow(value_rc, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(choices)), [literal(name, 16) for name in choices], fontsize=8)
    axis.set_yticks(range(len(rows)), [literal(name, 24) for name in rows], fontsize=8)
    for (row, column), value in np.ndenumerate(value_rc):
        if np.isfinite(value):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if value < 0.6 else "black")  # fmt: skip
    figure.colorbar(image, ax=axis, label="NMI")
    return png(figure)


def draw_confusion(confusion_ss: np.ndarray, labels: Sequence[str]) -> bytes:
    """Of each true label (row), the share told to be each label (column)."""
    size = 1.6 + 0.3 * len(labels)
    figure, axes = grid(1, 1, max(4.5, size), max(4.0, size))
    axis = axes[0, 0]
    share_ss = confusion_ss / np.maximum(confusion_ss.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(share_ss, cmap="Blues", vmin=0, vmax=1)
    names = shown(labels, 18)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("told to be of")
    axis.set_ylabel("is of")
    for (row, column), share in np.ndenumerate(share_ss):
        if share >= 0.05:
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6,
                      color="white" if share > 0.5 else "black")  # fmt: skip
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the row")
    return png(figure)
