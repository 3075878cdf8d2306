"""McCloskey and Albright 2018, "Detecting GAN-generated imagery using color cues": over- and under-exposed pixels.

Legend: B images, H W pixels, F features.

The paper has two cues. Exposure: how many pixels are near white or near black, since generators normalise and rarely
saturate; a linear support vector machine on those fractions. Chromaticity: histograms of r = R / (R + G + B) and g,
given to a small network. No code of theirs is known.

Known of the exposure cue, from memory of the paper: grey levels of at least 240, 245, 250, 255 and of at most 0, 5,
10, 15, eight fractions in all; a later re-implementation has the first four, on 0.299 R + 0.587 G + 0.114 B. Our
reading: that grey, rounded; each feature standardised, because fractions differ by orders of magnitude and a linear
machine would see only the largest; classes weighted alike (`LinearSVC`, one against the rest, C = 1).

The chromaticity cue is off (`chromaticity_bins = 0`): the network that classifies its histograms isn't known well
enough to be rebuilt, and published results with it are near chance. With N > 0, fractions of an N x N histogram of (r,
g) stand beside the eight, for the same linear machine; that is ours, not theirs. Grey images fill one bin of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from manifpt.baselines.classic import ClassicBaseline
from manifpt.baselines.inputs import grey

__all__ = ["McCloskey18", "exposure", "rg_histogram"]

OVER = (240, 245, 250, 255)
UNDER = (0, 5, 10, 15)


class McCloskey18(ClassicBaseline):
    """Eight exposure fractions and a linear support vector machine."""

    name = "mccloskey18"

    def __init__(
        self, sources: int, size_px: tuple[int, int], seed: int = 0, threads: int = 1, chromaticity_bins: int = 0
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        chromaticity_bins: N of the N x N histogram; 0: none.
        """
        super().__init__(sources, size_px, seed, threads)
        self._bins = chromaticity_bins

    def _features(self, images_bchw: np.ndarray) -> np.ndarray:
        features_bf = exposure(images_bchw)
        if self._bins:
            features_bf = np.hstack([features_bf, rg_histogram(images_bchw, self._bins)])
        return features_bf

    def _candidates(self) -> dict[str, Any]:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import LinearSVC

        machine = LinearSVC(class_weight="balanced", dual=False, random_state=self._seed)
        return {"svm-linear": make_pipeline(StandardScaler(), machine)}


def exposure(images_bchw: np.ndarray) -> np.ndarray:
    """Fractions of over- and under-exposed pixels: uint8 [B, 3, H, W] -> float64 [B, 8]."""
    grey_bp = grey(images_bchw).reshape(len(images_bchw), -1)
    over = [(grey_bp >= level).mean(1) for level in OVER]
    return np.stack([*over, *((grey_bp <= level).mean(1) for level in UNDER)], axis=1)


def rg_histogram(images_bchw: np.ndarray, bins: int) -> np.ndarray:
    """Fractions of pixels by chromaticity: uint8 [B, 3, H, W] -> float64 [B, bins^2]. Black counts as colourless."""
    rgb_bcp = images_bchw.reshape(len(images_bchw), 3, -1).astype(np.float64)
    total_bp = rgb_bcp.sum(1)
    share_bcp = np.where(total_bp[:, None] > 0, rgb_bcp / np.maximum(total_bp, 1)[:, None], 1 / 3)
    cell_bcp = np.minimum((share_bcp[:, :2] * bins).astype(np.int64), bins - 1)
    cell_bp = cell_bcp[:, 0] * bins + cell_bcp[:, 1]
    return np.stack([np.bincount(cell_p, minlength=bins * bins) / len(cell_p) for cell_p in cell_bp])
