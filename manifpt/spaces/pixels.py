"""The spaces made of pixels: `rgb` and `frequency`, each also of YCbCr.

Legend: B images, H W pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from manifpt.spaces.base import SpaceSpec

__all__ = ["EPSILON", "FrequencySpace", "RgbSpace", "log_spectrum", "pixels"]

EPSILON = 1e-12

# JPEG's colours (ITU-R BT.601, full range, chroma around 0): most of an image's energy goes into Y, and what a
# generator leaves in the chroma stands alone.
_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ]
)


def pixels(codes: np.ndarray, color: str) -> np.ndarray:
    """uint8 RGB [B, 3, H, W] -> float64 [B, 3, H, W] in [0, 1], or Y in [0, 1] and Cb, Cr in [-0.5, 0.5]; nothing is
    rounded."""
    rgb_bchw = codes.astype(np.float64) / 255
    if color == "rgb":
        return rgb_bchw
    flat_bcp = rgb_bchw.reshape(len(codes), 3, codes.shape[2] * codes.shape[3])  # -1 can't be told of no image
    return np.matmul(_YCBCR, flat_bcp).reshape(rgb_bchw.shape)


class _PixelSpace:
    def __init__(self, spec: SpaceSpec) -> None:
        self.spec = spec

    def load(self) -> None:
        """Nothing to load."""

    def encode(self, views_bchw: np.ndarray) -> np.ndarray:
        """The view itself: uint8 [B, 3, H, W]."""
        return views_bchw

    def compact(self, embeddings_bd: Any) -> Any:
        """The embedding itself."""
        return embeddings_bd


class RgbSpace(_PixelSpace):
    """phi(x) = x in [0, 1], all channels, no normalisation (paper section 3; cocoaaa/gm-fpts)."""

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
        if self.spec.color == "rgb":
            return codes.astype(np.float32) / np.float32(255)
        return pixels(codes, self.spec.color).astype(np.float32)


class FrequencySpace(_PixelSpace):
    """phi(x) = log(|fftshift(fft2(x))| + eps), a channel (paper section 3; cocoaaa/gm-fpts)."""

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
        return log_spectrum(pixels(codes, self.spec.color))

    def compact(self, embeddings_bd: Any) -> Any:
        """Half of the spectrum: float32 [B, D] -> float32 [B, D / 2 and a few].

        |F(-u, -v)| = |F(u, v)| of a real image. So (a + b) / sqrt(2) of the two holds their distances but for the noise
        of near-zero bins, and is never longer, since it is an orthonormal projection.
        """
        spectrum_bcp = embeddings_bd.reshape(len(embeddings_bd), 3, -1)
        first_p, second_p, single_p = _mirrored(self.spec.view.height_px or 1, self.spec.view.width_px or 1)
        half_bcp = spectrum_bcp[:, :, np.concatenate([first_p, single_p])]
        half_bcp[:, :, : len(first_p)] += spectrum_bcp[:, :, second_p]
        half_bcp[:, :, : len(first_p)] *= 0.5**0.5
        return half_bcp.reshape(len(embeddings_bd), -1)


@functools.cache
def _mirrored(height_px: int, width_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions of a shifted spectrum: the two of each mirrored pair, and those that are their own mirror."""
    place_hw = np.arange(height_px * width_px).reshape(height_px, width_px)
    unshifted_hw = np.fft.ifftshift(place_hw)
    mirror_hw = np.roll(unshifted_hw[::-1, ::-1], (1, 1), (0, 1))
    mirror_p = np.empty(height_px * width_px, np.int64)
    mirror_p[unshifted_hw.reshape(-1)] = mirror_hw.reshape(-1)
    own_p = place_hw.reshape(-1)
    first_p = own_p[own_p < mirror_p]
    return first_p, mirror_p[first_p], own_p[own_p == mirror_p]


def log_spectrum(pixels_bchw: np.ndarray) -> np.ndarray:
    """Log-magnitude spectra, a channel, zero frequency in the middle.

    log(|F| + 1e-12), F the 2-D DFT without normalisation, over all frequencies, as in the paper's released code.
    Computed in float64: a bin that is zero in exact arithmetic holds rounding noise, whose logarithm is a number of
    order -30 that depends on it, and float32 noise would be 20 units larger (as of a residual, which is rounded to
    float32 before).

    Args:
        pixels_bchw: float [B, 3, H, W], as of `pixels`, or a residual of them.

    Returns:
        spectrum_bchw: float32 [B, 3, H, W].
    """
    spectrum = np.fft.fft2(pixels_bchw.astype(np.float64), axes=(-2, -1))
    return np.log(np.abs(np.fft.fftshift(spectrum, axes=(-2, -1))) + EPSILON).astype(np.float32)
