"""How well sources are separated in a space, without training anything; the FD ratio is in `manifpt.metrics.frechet`.

Legend: B images, N rows of all of them, F features.
"""

from __future__ import annotations

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.attribution import balanced_accuracy
from manifpt.metrics.tiles import finite
from manifpt.search import Found

__all__ = ["leave_one_out_accuracy", "silhouette"]


def silhouette(features_bf: np.ndarray, label_b: np.ndarray) -> float:
    """Mean silhouette of all images (Rousseeuw 1987), exact; scikit-learn's.

    (b - a) / max(a, b) with a the mean distance to the others of its source, b to those of the nearest other source:
    from -1 to 1, 0 where sources lie in each other. It looks at all B^2 pairs, in blocks.

    Args:
        features_bf: float [B, F].
        label_b: int64 [B].

    Raises:
        ConfigError: fewer than 2 sources, no source of 2 images, or a number that is not finite.
    """
    from sklearn.metrics import silhouette_score

    sources = len(np.unique(label_b))
    if not 2 <= sources < len(label_b):
        raise ConfigError(f"{len(label_b)} images of {sources} source(s) have no silhouette; it compares two or more.")
    return float(silhouette_score(finite(features_bf), label_b))


def leave_one_out_accuracy(nearest: Found, label_b: np.ndarray, label_n: np.ndarray) -> float:
    """How often an image's nearest other image is of its source: mean of the sources, chance is 1 / their number.

    Copies within a source count as right; look for them before you call a source well separated.

    Args:
        nearest: of the B images among all N, k = 1 or more, without itself; see `Nearest`.
        label_b: int64 [B], sources of the images.
        label_n: int64 [N], sources of all.

    Raises:
        ConfigError: an image has no other one.
    """
    row_b = nearest.row_bk[:, 0]
    if (row_b < 0).any():
        raise ConfigError("An image has no other image to be compared with; add images.")
    return balanced_accuracy(label_b, label_n[row_b])
