"""The reliability diagram of an attributor, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from manifpt.report.drawing import grid, png

__all__ = ["draw_reliability"]


def draw_reliability(found: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Accuracy over confidence, before and after calibration; below, how many images each bin holds.

    Args:
        found: `reliability` of a bundle's `calibration.json`: `before` and `after`, each with `images`, `confidence`
            and `accuracy` of its bins.
    """
    figure, axes = grid(2, 2, 4.2, 2.4, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (name, of_bins) in enumerate(found.items()):
        images_m, confidence_m, accuracy_m = (
            np.array(of_bins[key], float) for key in ("images", "confidence", "accuracy")
        )
        edge_m = np.linspace(0, 1, len(images_m) + 1)
        error = np.nansum(np.abs(accuracy_m - confidence_m) * images_m) / images_m.sum()
        above, below = axes[:, column]
        above.bar(edge_m[:-1], np.nan_to_num(accuracy_m), 1 / len(images_m), align="edge", color="#9ecae1",
                  edgecolor="#333333", linewidth=0.6, label="accuracy of a bin's images")  # fmt: skip
        above.plot(confidence_m, confidence_m, "D", color="#b30000", markersize=4, label="their mean confidence")
        above.plot([0, 1], [0, 1], color="#666666", linewidth=0.8, linestyle="--")
        above.set_title(f"{name} calibration: error {error:.3f}", fontsize=9, loc="left")
        below.bar(edge_m[:-1], images_m, 1 / len(images_m), align="edge", color="#cccccc", edgecolor="#333333",
                  linewidth=0.6)  # fmt: skip
        below.set_xlabel("confidence: the largest probability", fontsize=8)
    axes[0, 0].set_ylabel("share told rightly", fontsize=8)
    axes[1, 0].set_ylabel("test images", fontsize=8)
    axes[0, 0].legend(fontsize=7, loc="upper left", frameon=False)
    return png(figure)
