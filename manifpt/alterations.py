"""What happens to images on their way through the world: re-encoding, resizing, cropping, blur, noise. Pure.

Legend: H W pixels.

A name says what is done and how strongly: `jpeg-75`. The size stays, so that spaces at native size take altered images
too. What each does to the bit (8-bit RGB in, 8-bit RGB out, Pillow's codecs at their defaults but for what is said):

- `jpeg-Q`, `webp-Q`: encoded with quality Q and decoded. Chroma is halved (4:2:0) at every quality: so do libjpeg,
  Pillow, browsers and lossy WebP unless told otherwise; few tools keep it whole (4:4:4) from 90 on. No metadata.
- `resize-F`: both sides times F, rounded to whole pixels, and back. Bicubic, antialiased where it shrinks.
- `crop-F`: the middle F of both sides, in whole pixels, enlarged to the old size. Bicubic.
- `blur-S`: a Gaussian of sigma S px, reflected at the borders, rounded.
- `noise-S`: Gaussian noise of sigma S grey levels, for each pixel and channel by itself, rounded and clipped.
- `none`: the image itself.

`drawn` stands for an alteration that is drawn for each image by its id, `none` among them: training-time augmentation.
It draws from whole ranges, not from the ladder's steps, so that a ladder shows more than what training has seen.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image

from manifpt.errors import BadImage, ConfigError, RejectReason

__all__ = ["ALTERATIONS", "DRAWN", "LADDER", "MILD", "NONE", "altered", "altered_as", "drawn", "reencoded"]

NONE, DRAWN = "none", "drawn"
LADDER = (
    "jpeg-95", "jpeg-90", "jpeg-75", "jpeg-50", "jpeg-30",
    "webp-95", "webp-75", "webp-50",
    "resize-0.5", "resize-0.75", "resize-1.5", "resize-2.0",
    "crop-0.95", "crop-0.9", "crop-0.75",
    "blur-0.5", "blur-1.0",
    "noise-1", "noise-2", "noise-4",
)  # fmt: skip
MILD = ("jpeg-95", "webp-95")  # what a verdict must survive: any upload does as much
ALTERATIONS = (NONE, *LADDER, DRAWN)  # of a run

# Between which strengths `drawn` draws, evenly on a logarithmic scale; as far as the ladder goes.
_RANGES = {"jpeg": (30, 95), "webp": (50, 95), "resize": (0.5, 2), "crop": (0.75, 0.95), "blur": (0.25, 1),
           "noise": (1, 4)}  # fmt: skip
_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
_MOST_PX = {"JPEG": 65_500, "WEBP": 16_383}  # a side: the formats' own limits
_MOST_AREA_PX = 1 << 28  # of an enlarged image: 768 MiB


def altered(image_hwc: np.ndarray, name: str, seed: int) -> np.ndarray:
    """One image, altered; see the module.

    Args:
        image_hwc: uint8 [H, W, 3].
        name: `none`, a step of `LADDER`, or another strength of its kinds.
        seed: of the noise.

    Returns:
        uint8 [H, W, 3]; for `none` the image itself, no copy.

    Raises:
        BadImage: too large for the format or for being enlarged.
        ConfigError: no such alteration.
    """
    if name == NONE:
        return image_hwc
    kind, strength = _parsed(name)
    if kind in _FORMATS:
        return reencoded(image_hwc, _FORMATS[kind], int(strength))
    if kind == "resize":
        return _there_and_back(image_hwc, strength)
    if kind == "crop":
        return _cropped(image_hwc, strength)
    if kind == "blur":
        return _blurred(image_hwc, strength)
    noise_hwc = np.random.default_rng(seed).normal(0.0, strength, image_hwc.shape)
    return _rounded(image_hwc + noise_hwc)


def altered_as(image_hwc: np.ndarray, alter: str, image_id: str) -> np.ndarray:
    """As `altered`, as a run does it: `drawn` is drawn for the image, and the seed comes from its id."""
    name = drawn(image_id, 0) if alter == DRAWN else alter
    return altered(image_hwc, name, _hashed(image_id, 1))


def drawn(image_id: str, seed: int) -> str:
    """Which alteration augmentation gives to an image: each kind as often as the others, a seventh stays as it is.

    Strengths are written with as many digits as `altered` takes, so that the name is all of it.
    """
    kinds = (NONE, *_RANGES)
    number = _hashed(image_id, 2 + 2 * seed)
    kind = kinds[number % len(kinds)]
    if kind == NONE:
        return NONE
    low, high = _RANGES[kind]
    strength = low * (high / low) ** (_hashed(image_id, 3 + 2 * seed) / 2**64)
    return f"{kind}-{strength:.0f}" if kind in _FORMATS else f"{kind}-{strength:.2f}"


def reencoded(image_hwc: np.ndarray, codec: str, quality: int) -> np.ndarray:
    """uint8 [H, W, 3] through a lossy codec (`JPEG` or `WEBP`, 4:2:0) and back.

    Raises:
        BadImage: more pixels a side than the format has.
    """
    if max(image_hwc.shape) > _MOST_PX[codec]:
        height_px, width_px = image_hwc.shape[:2]
        detail = f"{width_px} x {height_px} px; a {codec} has at most {_MOST_PX[codec]} a side"
        raise BadImage(RejectReason.TOO_LARGE, detail)
    stream = io.BytesIO()
    subsampling = {"subsampling": "4:2:0"} if codec == "JPEG" else {}  # lossy WebP has no other
    Image.fromarray(image_hwc).save(stream, codec, quality=quality, **subsampling)
    return np.asarray(Image.open(stream))


def _parsed(name: str) -> tuple[str, float]:
    kind, _, text = name.partition("-")
    try:
        if kind in _RANGES and float(text) > 0:
            return kind, float(text)
    except ValueError:
        pass
    raise ConfigError(f"Unknown alteration {name!r}; known: {', '.join(ALTERATIONS)}.")


def _there_and_back(image_hwc: np.ndarray, factor: float) -> np.ndarray:
    height_px, width_px = image_hwc.shape[:2]
    size = max(1, round(width_px * factor)), max(1, round(height_px * factor))
    if size[0] * size[1] > _MOST_AREA_PX:
        raise BadImage(RejectReason.TOO_LARGE, f"{width_px} x {height_px} px can't be enlarged {factor} times")
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image_hwc).resize(size, bicubic).resize((width_px, height_px), bicubic))


def _cropped(image_hwc: np.ndarray, factor: float) -> np.ndarray:
    height_px, width_px = image_hwc.shape[:2]
    kept_height, kept_width = max(1, round(height_px * factor)), max(1, round(width_px * factor))
    top, left = (height_px - kept_height) // 2, (width_px - kept_width) // 2
    image = Image.fromarray(np.ascontiguousarray(image_hwc[top : top + kept_height, left : left + kept_width]))
    return np.asarray(image.resize((width_px, height_px), Image.Resampling.BICUBIC))


def _blurred(image_hwc: np.ndarray, sigma_px: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter  # a decoder that alters nothing needn't wait for it

    return _rounded(gaussian_filter(image_hwc.astype(np.float32), (sigma_px, sigma_px, 0), mode="reflect"))


def _rounded(pixels_hwc: np.ndarray) -> np.ndarray:
    return np.rint(pixels_hwc).clip(0, 255).astype(np.uint8)


def _hashed(image_id: str, salt: int) -> int:
    """64 bits of an image id, other ones for each salt."""
    digest = hashlib.blake2b(image_id.encode(), digest_size=8, salt=salt.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
