"""Bytes to pixels, by one pinned decoder and a written rule. Pure; nothing here touches storage.

The rule, which is part of every reference bundle as `DECODER`:

- The format is what the bytes say, never what the name says. The header is checked before pixels are decoded.
- JPEG is decoded whole, at full size: no draft mode, no DCT scaling.
- EXIF orientation is applied. ICC profiles are ignored: the stored values are the evidence.
- Grey is repeated over three channels; palettes are looked up; CMYK is converted as Pillow does.
- Alpha is dropped, not composited: blending would mix a background of our choice into the generator's pixels.
- 16 bits a channel keep their high byte.
- Several frames (GIF, APNG, WebP, TIFF) are rejected: which frame would be the image?
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features

from manifpt.errors import BadImage, RejectReason

__all__ = ["DECODER", "MAX_BYTES", "MAX_PIXELS", "content_hash", "decode", "decoder_versions"]

DECODER = "pillow/1"  # library and version of the rule above; another one makes other pixels
MAX_BYTES = 256 << 20
MAX_PIXELS = 1 << 26  # 8192 x 8192

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_DIRECT = {"RGB", "L", "1", "P", "PA", "RGBA", "RGBX", "LA", "La", "RGBa", "CMYK", "YCbCr"}
_SIXTEEN_BIT = {"I", "I;16", "I;16L", "I;16B", "I;16N"}


def decoder_versions() -> dict[str, str]:
    """Versions of what decodes, for the record: a JPEG may differ by a grey level between two libraries."""
    return {
        "pillow": PIL.__version__,
        "jpeg": str(features.version("jpg")),
        "png": str(features.version("zlib")),
        "webp": str(features.version("webp")),
    }


def content_hash(image_hwc: np.ndarray) -> str:
    """BLAKE2b-128, hex, of size and pixels: two files with the same pixels are the same image."""
    digest = hashlib.blake2b(struct.pack("<II", *image_hwc.shape[:2]), digest_size=16)
    digest.update(np.ascontiguousarray(image_hwc))
    return digest.hexdigest()


def decode(data: bytes) -> np.ndarray:
    """Decodes one image.

    Args:
        data: a whole file.

    Returns:
        image_hwc: uint8 [H, W, 3], RGB.

    Raises:
        BadImage: with the reason. Nothing else, whatever the bytes are.
    """
    if not data:
        raise BadImage(RejectReason.EMPTY, "zero bytes")
    if len(data) > MAX_BYTES:
        raise BadImage(RejectReason.TOO_LARGE, f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning: our own, lower limit follows
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(RejectReason.NOT_AN_IMAGE, f"starts with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(RejectReason.TOO_LARGE, str(error)) from error
    except _DECODE_ERRORS as error:
        raise _damaged(error) from error
    width_px, height_px = image.size
    if width_px * height_px > MAX_PIXELS:
        raise BadImage(RejectReason.TOO_LARGE, f"{width_px} x {height_px} pixels; the limit is {MAX_PIXELS}")
    try:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # an MPO's first frame is the photograph
            raise BadImage(RejectReason.ANIMATED, f"{image.format} with {image.n_frames} frames")  # type: ignore[attr-defined]
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise _damaged(error) from error


# What Pillow's plugins raise on damaged data. A MemoryError is ours to see, not a property of the image.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError,
                  AttributeError, AssertionError, RuntimeError, ZeroDivisionError, struct.error, zlib.error)  # fmt: skip


def _damaged(error: BaseException) -> BadImage:
    text = f"{type(error).__name__}: {error}"
    short = "truncated" in text.lower() or "end of file" in text.lower() or isinstance(error, EOFError)
    return BadImage(RejectReason.TRUNCATED if short else RejectReason.CORRUPT, text)


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode not in _DIRECT:
        raise BadImage(RejectReason.UNSUPPORTED, f"pixel format {image.mode}")
    if image.mode in {"P", "PA"}:  # through RGBA, so that a transparent entry keeps its own colour
        image = image.convert("RGBA")
    if image.mode in {"RGBA", "RGBX"}:
        return np.ascontiguousarray(np.asarray(image)[:, :, :3])
    if image.mode in {"LA", "La"}:
        return np.repeat(np.asarray(image)[:, :, :1], 3, axis=2)
    return np.array(image.convert("RGB"))
