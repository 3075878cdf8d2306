"""Dzanic et al. 2020, "Fourier spectrum discrepancies in deep network generated images": decay of high frequencies.

Legend: B images, H W pixels, P coefficients, K bins.

Known from the original's code (MATLAB, tarikdzanic/FourierSpectrumDiscrepancies): grey image; |fftshift(fft2(x))|, of
which those with a radius over half of sqrt((H/2)^2 + (W/2)^2) are put into 200 equal bins of radius, mean of each; a
bin of exactly zero gets the mean of its neighbours; moving average of 5, shorter at both ends; of that the part from
0.85 of the largest radius on, bins 141 to 200 (a variable says 0.75, and isn't used); y = y_i (x / x_1)^c fitted by
Nelder-Mead from c = -2, least squares; features c, y_i, y_f: exponent, first and last value. Nearest neighbours, k =
5, standardised, on 100 images a class, classes balanced by repeating images. Radii are measured from row H/2 and
column W/2, counted from 1, which is one pixel before zero frequency on both axes: kept, since the numbers depend on
it.

Our reading: a bin without any coefficient, which the original's large images don't have and half of the bins have at
32 px, is filled like a zero one, by linear interpolation between its nearest neighbours that have a value. All
training images are used, balanced by repetition. A later re-evaluation by others had a support vector machine (rbf) on
the same features, settings unknown: it is the second candidate, with scikit-learn's; of equals the original's
neighbours win.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from manifpt.baselines.classic import ClassicBaseline
from manifpt.baselines.inputs import grey
from manifpt.baselines.spectra import magnitude, ring_means

__all__ = ["Dzanic20", "decay"]

BINS = 200
KEPT_FROM = 0.5  # of the half-diagonal
FITTED_FROM = 0.85
_WINDOW = 5
_START = -2.0
_TOLERANCE = 1e-4  # fminsearch's, of c and of the norm


class Dzanic20(ClassicBaseline):
    """Three numbers of the spectrum's tail, and their nearest neighbours."""

    name = "dzanic20"

    def _features(self, images_bchw: np.ndarray) -> np.ndarray:
        return decay(grey(images_bchw))

    def _resampled(self, label_b: np.ndarray) -> np.ndarray:
        rows = [np.flatnonzero(label_b == source) for source in range(self._shape.sources)]
        most = max(map(len, rows))
        return np.concatenate([np.resize(row, most) for row in rows])  # np.resize repeats

    def _candidates(self) -> dict[str, Any]:
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        return {
            "neighbours-5": make_pipeline(StandardScaler(), KNeighborsClassifier(5, n_jobs=self._threads)),
            "svm-rbf": make_pipeline(StandardScaler(), SVC(kernel="rbf", decision_function_shape="ovr")),
        }


def decay(grey_bhw: np.ndarray) -> np.ndarray:
    """c, y_i and y_f of y = y_i (x / x_1)^c (the repository's `generatedata.m`).

    Args:
        grey_bhw: uint8 [B, H, W].

    Returns:
        float64 [B, 3]. A constant image has nothing to fit: -2, 0, 0.
    """
    _, height_px, width_px = grey_bhw.shape
    middle_y, middle_x = (height_px + 1) // 2, (width_px + 1) // 2
    y_h, x_w = np.arange(1, height_px + 1) - middle_y, np.arange(1, width_px + 1) - middle_x
    radius_p = np.hypot(x_w[None], y_h[:, None]).reshape(-1)
    is_kept_p = radius_p > KEPT_FROM * np.hypot(middle_x, middle_y)
    edge_k = np.linspace(radius_p[is_kept_p].min(), radius_p[is_kept_p].max(), BINS + 1)
    # A radius on an edge belongs to the lower bin; the least one to the first.
    bin_p = np.maximum(np.searchsorted(edge_k, radius_p[is_kept_p], side="left") - 1, 0)
    mean_bk = ring_means(magnitude(grey_bhw).reshape(len(grey_bhw), -1)[:, is_kept_p], bin_p, BINS)
    smooth_bk = _smoothed(np.stack([_filled(mean_k) for mean_k in mean_bk]))
    first = round(BINS * (FITTED_FROM - KEPT_FROM) / (1 - KEPT_FROM))
    x_k, y_bk = ((edge_k[:-1] + edge_k[1:]) / 2)[first:], smooth_bk[:, first:]
    log_k = np.log(x_k / x_k[0])

    def error(c_b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(y_bk - y_bk[:, :1] * np.exp(c_b[:, None] * log_k), axis=1)

    return np.stack([_nelder_mead(error, len(y_bk)), y_bk[:, 0], y_bk[:, -1]], axis=1)


def _filled(mean_k: np.ndarray) -> np.ndarray:
    has_value_k = mean_k > 0  # not of NaN
    if not has_value_k.any():
        return np.zeros_like(mean_k)
    at_k = np.arange(len(mean_k))
    return np.interp(at_k, at_k[has_value_k], mean_k[has_value_k])


def _smoothed(values_bk: np.ndarray) -> np.ndarray:
    """MATLAB's `smooth`: a centred mean, over as many values on both sides as there are."""
    last, half = values_bk.shape[1] - 1, _WINDOW // 2
    reach_k = [min(half, k, last - k) for k in range(last + 1)]
    return np.stack([values_bk[:, k - reach : k + reach + 1].mean(1) for k, reach in enumerate(reach_k)], axis=1)


def _nelder_mead(function: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Minima of B functions of one number, all at once: Nelder-Mead as in `fminsearch`, from `_START`.

    In one dimension the simplex is a pair of points: the better, whose mirror image of the worse is tried, then twice
    as far, half as far outside, half as far inside, and else the pair shrinks.

    Args:
        function: float64 [B] -> float64 [B].
        count: B.
    """
    best_b, worst_b = np.full(count, _START), np.full(count, _START * 1.05)
    at_best_b, at_worst_b = function(best_b), function(worst_b)
    for _ in range(200):
        is_swapped_b = at_worst_b < at_best_b
        best_b, worst_b = np.where(is_swapped_b, worst_b, best_b), np.where(is_swapped_b, best_b, worst_b)
        at_best_b, at_worst_b = np.minimum(at_best_b, at_worst_b), np.maximum(at_best_b, at_worst_b)
        is_done_b = (abs(best_b - worst_b) <= _TOLERANCE) & (abs(at_best_b - at_worst_b) <= _TOLERANCE)
        if is_done_b.all():
            break
        step_b = best_b - worst_b
        mirrored_b, far_b = best_b + step_b, best_b + 2 * step_b
        outside_b, inside_b = best_b + step_b / 2, best_b - step_b / 2
        at_mirrored_b, at_far_b = function(mirrored_b), function(far_b)
        at_outside_b, at_inside_b = function(outside_b), function(inside_b)
        is_better_b, is_between_b = at_mirrored_b < at_best_b, at_mirrored_b < at_worst_b
        # A pair that shrinks ends where the contraction inside was tried, so that needs no case of its own.
        cases = [
            is_done_b,
            is_better_b & (at_far_b < at_mirrored_b),
            is_better_b,
            is_between_b & (at_outside_b <= at_mirrored_b),
        ]
        worst_b = np.select(cases, [worst_b, far_b, mirrored_b, outside_b], inside_b)
        at_worst_b = np.select(cases, [at_worst_b, at_far_b, at_mirrored_b, at_outside_b], at_inside_b)
    return best_b
