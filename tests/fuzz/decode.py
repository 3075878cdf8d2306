"""`manifpt.decode`: any bytes are an image of the documented kind, or a `BadImage`."""

from __future__ import annotations

import io
import math
import random
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from manifpt.decode import MAX_PIXELS, decode
from manifpt.errors import BadImage, RejectReason
from tests.fuzz.mutation import damaged_bytes
from tests.helpers.images import bad_files, encoded, odd_but_good_files, picture, sample_files

__all__ = ["check", "mutated", "seeds"]

_PNG = b"\x89PNG\r\n\x1a\n"


def seeds() -> list[bytes]:
    """Every format in several ways, files that must be rejected, and images of the sample."""
    exif = Image.Exif()
    exif[0x112] = 6
    images = {mode: picture(24, 1, mode) for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr")}
    saved: list[tuple[str, str, dict[str, object]]] = [
        *((mode, "PNG", {}) for mode in ("RGB", "L", "1", "P", "RGBA", "LA")),
        ("RGB", "JPEG", {"exif": exif}), ("L", "JPEG", {"progressive": True}), ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "restart_marker_blocks": 2}), ("P", "GIF", {"transparency": 0}),
        ("RGB", "GIF", {"interlace": 1}), ("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True, "exif": exif}),
        *((mode, "TIFF", {}) for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "YCbCr")),
        *(("RGB", "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        ("1", "TIFF", {"compression": "group4"}), *((mode, "BMP", {}) for mode in ("RGB", "L", "1", "P", "RGBA")),
        ("RGB", "PPM", {}), ("L", "PPM", {}), ("1", "PPM", {}),
    ]  # fmt: skip
    made = [encoded(images[mode], kind, **options) for mode, kind, options in saved]
    made += [b"P3\n2 1\n255\n1 2 3 4 5 6\n", b"P1\n2 2\n0 1 1 0\n", b"P6\n2 1\n31\n" + bytes(6), b"P5 1 1 65535\n\1\2"]
    others = [data for data, _ in bad_files().values()] + list(odd_but_good_files().values())
    return made + others + [data for _, data in sample_files("query", {"real": 2})]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Damaged bytes; those of a PNG with right checksums, half the time, or nothing behind them would be reached."""
    damaged = damaged_bytes(data, dice, 1 << 16)
    return _with_checksums(damaged) if damaged.startswith(_PNG) and dice.random() < 0.5 else damaged


def _with_checksums(png: bytes) -> bytes:
    found, place = bytearray(png), len(_PNG)
    while place + 12 <= len(found):
        end = place + 8 + struct.unpack(">I", found[place : place + 4])[0]
        if end + 4 > len(found):
            break
        found[end : end + 4] = struct.pack(">I", zlib.crc32(found[place + 4 : end]))
        place = end + 4
    return bytes(found)


def check(data: bytes) -> int:
    """Decodes; the pixels of its header."""
    try:
        image_hwc = decode(data)
    except BadImage as bad:
        return 0 if bad.reason is RejectReason.TOO_LARGE else _pixels(data)
    assert image_hwc.dtype == np.uint8
    assert image_hwc.ndim == 3
    assert image_hwc.shape[2] == 3
    assert image_hwc.flags.c_contiguous
    assert 0 < image_hwc.shape[0] * image_hwc.shape[1] <= MAX_PIXELS
    return image_hwc.shape[0] * image_hwc.shape[1]


def _pixels(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return math.prod(Image.open(io.BytesIO(data)).size)
    except Exception:  # Pillow's word for no image at all, and others for half a one
        return 0
