"""Durall et al. 2020, "Watch your up-convolution": the azimuthal average of the log spectrum.

Legend: B images, H W pixels, R radii.

Known from the original's code (cc-hpc-itwm/DeepFakeDetection): grey image; 20 log|fftshift(fft2(x)) + 1e-8|; mean over
rings of integer radius around ((W - 1) / 2, (W - 1) / 2), half a pixel from zero frequency; the innermost and the
outermost ring are lost to a sum of differences, so floor((N - 1) / sqrt 2) - 1 values are left of N x N pixels: 20 at
32 px, 43 at 64, 179 at 256. Small images (CelebA): the profile, not the image, is brought to 80 points by cubic
interpolation and divided by its first value. 1,024 px (Faces-HQ): the 722 values as they are. Four classifiers, each
reported: support vector machines, linear, rbf (C 6.37, gamma 0.86) and poly, and logistic regression (liblinear, 1,000
iterations), on features that aren't standardised. scikit-learn's gamma of that time was 1 / R, so poly has that.

Our reading: 80 points under 256 px, the values as they are from there on; of the four, the best on validation; classes
weighted alike, which changes nothing for equal classes, as the original's are; each axis has its own centre where an
image isn't square. Logistic regression is one against the rest, as liblinear's was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from manifpt.baselines.classic import ClassicBaseline
from manifpt.baselines.inputs import grey
from manifpt.baselines.spectra import magnitude, ring_means

__all__ = ["Durall20", "profile"]

EPSILON = 1e-8
POINTS = 80
RAW_FROM_PX = 256


class Durall20(ClassicBaseline):
    """A radial profile, and the best of the original's four classifiers."""

    name = "durall20"

    def __init__(
        self, sources: int, size_px: tuple[int, int], seed: int = 0, threads: int = 1, points: int | None = None
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        points: R after interpolation; 0: the profile as it is; None: `POINTS` for images under `RAW_FROM_PX`.
        """
        super().__init__(sources, size_px, seed, threads)
        self._points = points if points is not None else (POINTS if min(size_px) < RAW_FROM_PX else 0)

    def _features(self, images_bchw: np.ndarray) -> np.ndarray:
        profile_br = profile(grey(images_bchw))
        return _interpolated(profile_br, self._points) if self._points else profile_br

    def _candidates(self) -> dict[str, Any]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.svm import SVC

        weight, seed = "balanced", self._seed
        logistic = LogisticRegression(solver="liblinear", max_iter=1000, class_weight=weight, random_state=seed)
        return {
            "svm-linear": SVC(kernel="linear", class_weight=weight, decision_function_shape="ovr"),
            "svm-rbf": SVC(C=6.37, kernel="rbf", gamma=0.86, class_weight=weight, decision_function_shape="ovr"),
            "svm-poly": SVC(kernel="poly", gamma="auto", class_weight=weight, decision_function_shape="ovr"),
            "logistic": OneVsRestClassifier(logistic),
        }


def profile(grey_bhw: np.ndarray) -> np.ndarray:
    """Azimuthal average of 20 log|F + 1e-8| (the repository's `radialProfile.py`).

    Args:
        grey_bhw: uint8 [B, H, W].

    Returns:
        float64 [B, R], radii of 1 px to the last but one.
    """
    _, height_px, width_px = grey_bhw.shape
    log_bp = 20 * np.log(magnitude(grey_bhw, EPSILON)).reshape(len(grey_bhw), -1)
    y_h, x_w = np.arange(height_px) - (height_px - 1) / 2, np.arange(width_px) - (width_px - 1) / 2
    radius_p = np.hypot(x_w[None], y_h[:, None]).reshape(-1).astype(np.int64)
    last = int(radius_p.max())
    return ring_means(log_bp, radius_p, last + 1)[:, 1:last]


def _interpolated(profile_br: np.ndarray, points: int) -> np.ndarray:
    """The same curve at so many points, divided by its first value: float64 [B, points]."""
    from scipy.interpolate import CubicSpline

    at_r = np.linspace(0, points, profile_br.shape[1])
    curve_bp = CubicSpline(at_r, profile_br, axis=1)(np.linspace(0, points, points))
    return curve_bp / curve_bp[:, :1]
