"""What every baseline asks of its images, and what several of them do to pixels.

Legend: B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from manifpt.errors import ConfigError

__all__ = ["MIN_PX", "Shape", "chunks", "grey", "mirrored", "reflected"]

MIN_PX = 16  # a side; under it there are too few radii and too few pixels at half resolution
_CHUNK_PIXELS = 1 << 21


class Shape:
    """How many sources, and how large their images; says no to what doesn't fit."""

    def __init__(self, sources: int, size_px: tuple[int, int]) -> None:
        """Raises:
        ConfigError: fewer than two sources, or a side under `MIN_PX`.
        """
        if sources < 2:
            raise ConfigError(f"Attribution needs at least 2 sources, not {sources}; add another one.")
        if min(size_px) < MIN_PX:
            raise ConfigError(f"Baselines need images of at least {MIN_PX} px a side, not {size_px}; use larger ones.")
        self.sources = sources
        self.size_px = size_px

    def check(self, images_bchw: np.ndarray) -> None:
        """Raises:
        ConfigError: not uint8 [B, 3, H, W] of this size.
        """
        expected = (3, *self.size_px)
        if images_bchw.dtype != np.uint8 or images_bchw.ndim != 4 or images_bchw.shape[1:] != expected:
            raise ConfigError(
                f"This baseline was made for uint8 images [B, {', '.join(map(str, expected))}], and got "
                f"{images_bchw.dtype} {list(images_bchw.shape)}; make another one for that size."
            )

    def check_training(
        self,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> None:
        """Raises:
        ConfigError: wrong images, labels that don't fit them, or a source without a training image.
        """
        for what, images, label in (
            ("training", images_bchw, label_b),
            ("validation", validation_bchw, validation_label_b),
        ):
            self.check(images)
            if label.shape != (len(images),) or not len(label):
                raise ConfigError(f"There are {len(images)} {what} images and labels {label.shape}; give one each.")
            if label.min() < 0 or label.max() >= self.sources:
                raise ConfigError(f"A {what} label is outside 0 to {self.sources - 1}; correct the labels.")
        missing = np.setdiff1d(np.arange(self.sources), label_b)
        if len(missing):
            raise ConfigError(f"Sources {missing.tolist()} have no training image; leave them out or add images.")


def chunks(images_bchw: np.ndarray) -> Iterator[np.ndarray]:
    """The same images, some at a time, so that float64 spectra of all of them never exist at once."""
    step = max(1, _CHUNK_PIXELS // (images_bchw.shape[2] * images_bchw.shape[3]))
    for start in range(0, len(images_bchw), step):
        yield images_bchw[start : start + step]


def grey(images_bchw: np.ndarray) -> np.ndarray:
    """0.299 R + 0.587 G + 0.114 B, rounded: uint8 [B, 3, H, W] -> uint8 [B, H, W].

    In 16-bit fixed point, as Pillow's mode L. OpenCV (Durall20) has 14 bits and MATLAB (Dzanic20) four decimals: one
    grey level may differ where the sum is near a half. Three equal channels give themselves.
    """
    red, green, blue = (images_bchw[:, c].astype(np.uint32) for c in range(3))
    return ((19_595 * red + 38_470 * green + 7_471 * blue + (1 << 15)) >> 16).astype(np.uint8)


def mirrored(images_bchw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """About half of the images, left and right exchanged: uint8 [B, C, H, W] -> the same."""
    is_mirrored_b = rng.random(len(images_bchw)) < 0.5
    return np.where(is_mirrored_b[:, None, None, None], images_bchw[..., ::-1], images_bchw)


def reflected(images_bchw: np.ndarray, side_px: int) -> np.ndarray:
    """Reflected outwards to a square, if it isn't one: uint8 [B, C, H, W] -> uint8 [B, C, side, side]."""
    missing = (side_px - images_bchw.shape[2], side_px - images_bchw.shape[3])
    pads = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
    return np.pad(images_bchw, [(0, 0), (0, 0), *pads], mode="reflect")
