"""Spectra and their means over rings, for Durall20 and Dzanic20.

Legend: B images, H W pixels, P pixels of an image, R rings.
"""

from __future__ import annotations

import numpy as np

__all__ = ["magnitude", "ring_means"]


def magnitude(grey_bhw: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    """|fftshift(fft2(x)) + epsilon|, zero frequency at (H // 2, W // 2), not normalised: float64 [B, H, W]."""
    spectrum_bhw = np.fft.fftshift(np.fft.fft2(grey_bhw.astype(np.float64), axes=(1, 2)), axes=(1, 2))
    return np.abs(spectrum_bhw + epsilon)


def ring_means(values_bp: np.ndarray, ring_p: np.ndarray, rings: int) -> np.ndarray:
    """The mean of each ring's pixels.

    Args:
        values_bp: float64 [B, P].
        ring_p: int64 [P], 0 to rings - 1.
        rings: R.

    Returns:
        float64 [B, R]; NaN for a ring without a pixel.
    """
    order_p = np.argsort(ring_p, kind="stable")
    found_r, start_r, count_r = np.unique(ring_p[order_p], return_index=True, return_counts=True)
    means_br = np.full((len(values_bp), rings), np.nan)
    means_br[:, found_r] = np.add.reduceat(values_bp[:, order_p], start_r, axis=1) / count_r
    return means_br
