"""The two spaces made of pixels: `rgb` and `frequency`.

Legend: B images, H W pixels.
"""

from __future__ import annotations

import numpy as np

from manifpt.spaces.base import SpaceSpec

__all__ = ["EPSILON", "FrequencySpace", "RgbSpace", "log_spectrum"]

EPSILON = 1e-12


class _PixelSpace:
    def __init__(self, spec: SpaceSpec) -> None:
        self.spec = spec

    def encode(self, views_bchw: np.ndarray) -> np.ndarray:
        """The view itself: uint8 [B, 3, H, W]."""
        return views_bchw


class RgbSpace(_PixelSpace):
    """phi(x) = x in [0, 1], all channels, no normalisation (paper section 3; cocoaaa/gm-fpts)."""

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
        return codes.astype(np.float32) / np.float32(255)


class FrequencySpace(_PixelSpace):
    """phi(x) = log(|fftshift(fft2(x))| + eps), a channel (paper section 3; cocoaaa/gm-fpts)."""

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
        return log_spectrum(codes)


def log_spectrum(images_bchw: np.ndarray) -> np.ndarray:
    """Log-magnitude spectra, a channel, zero frequency in the middle.

    log(|F| + 1e-12), F the 2-D DFT of x / 255 without normalisation, over all frequencies, as in the paper's released
    code. Computed in float64: a bin that is zero in exact arithmetic holds rounding noise, whose logarithm is a number
    of order -30 that depends on it, and float32 noise would be 20 units larger.

    Args:
        images_bchw: uint8 [B, 3, H, W].

    Returns:
        spectrum_bchw: float32 [B, 3, H, W].
    """
    spectrum = np.fft.fft2(images_bchw.astype(np.float64) / 255, axes=(-2, -1))
    return np.log(np.abs(np.fft.fftshift(spectrum, axes=(-2, -1))) + EPSILON).astype(np.float32)
