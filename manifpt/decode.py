"""Bytes to pixels, by one pinned decoder and a written rule. Pure; nothing here touches storage.

The rule, which is part of every reference bundle as `DECODER`:

- The format is what the bytes say, never what the name says. The header is checked before pixels are decoded.
- JPEG is decoded whole, at full size: no draft mode, no DCT scaling.
- EXIF orientation is applied where it can be read. ICC profiles are ignored: the stored values are the evidence.
- Grey is repeated over three channels; palettes are looked up; CMYK is converted as Pillow does.
- Alpha is dropped, not composited: blending would mix a background of our choice into the generator's pixels.
- 16 bits a channel keep their high byte (Pillow scales those of a colour PPM). Other depths over 8 are unsupported.
- Several frames (GIF, APNG, WebP, TIFF) are rejected: which frame would be the image?
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

from manifpt.errors import BadImage, RejectReason

__all__ = ["DECODER", "MAX_BYTES", "MAX_PIXELS", "content_hash", "decode", "decoder_versions"]

DECODER = "pillow/1"  # library and version of the rule above; another one makes other pixels
MAX_BYTES = 256 << 20
MAX_PIXELS = 1 << 26  # 8192 x 8192

# Of what takes far more of a machine than its size says. WebP's decoder holds an image four times; Pillow parses run
# lengths of a bitmap and numbers of a PNM in Python; and a JPEG may say everything a thousand times over.
_MAX_WEBP_PIXELS = 1 << 24
_MAX_PARSED_BYTES = 1 << 20
_PARSED = {"bmp_rle", "ppm", "ppm_plain"}
_MAX_SCANNED_PIXELS = 1 << 30

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
    digest.update(np.ascontiguousarray(image_hwc).data)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's bomb warning, whose limit is higher than ours, and those on metadata
        image = _opened(data)
        try:
            _check_header(image, data)
            image.load()
            _check_whole(data, image.format)
            image_hwc, orientation = _as_rgb(image), _orientation(image)
        except Image.DecompressionBombError as error:
            raise BadImage(RejectReason.TOO_LARGE, str(error)) from error
        except _DECODE_ERRORS as error:
            raise _damaged(error, data) from error
    del image  # a turned copy needs its room
    return np.ascontiguousarray(_TURNS[orientation](image_hwc)) if orientation in _TURNS else image_hwc


class _Watched(io.BytesIO):
    """Remembers whether a reader wanted more than there is."""

    short = False

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.short |= size is not None and len(found) < size
        return found


def _opened(data: bytes) -> Image.Image:
    stream = _Watched(data)
    try:
        return Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError as error:  # also what Pillow says of a header that it can't read to its end
        if not data.startswith(_SIGNATURES):
            raise BadImage(RejectReason.NOT_AN_IMAGE, f"starts with {data[:8]!r}") from error
        reason = RejectReason.TRUNCATED if stream.short else RejectReason.CORRUPT
        raise BadImage(reason, f"no whole header; starts with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(RejectReason.TOO_LARGE, str(error)) from error
    except _DECODE_ERRORS as error:
        raise _damaged(error, data) from error


def _check_header(image: Image.Image, data: bytes) -> None:
    """Refuses what must not, or can't, be decoded."""
    most_px = _MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    # A TIFF's tiles are decoded whole, however small the image is that they cover.
    tags = getattr(image, "tag_v2", {})
    for width_px, height_px in (image.size, (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0))):
        if not (isinstance(width_px, int) and isinstance(height_px, int)):  # text times a number is a bomb of its own
            raise BadImage(RejectReason.CORRUPT, "a tile's size is no number")
        if width_px * height_px > most_px:
            raise BadImage(RejectReason.TOO_LARGE, f"{width_px} x {height_px} pixels; the limit is {most_px}")
    if len(data) > _MAX_PARSED_BYTES and any(tile[0] in _PARSED for tile in getattr(image, "tile", ())):
        detail = f"{len(data)} bytes of {image.format} in a slow form; the limit is {_MAX_PARSED_BYTES}"
        raise BadImage(RejectReason.TOO_LARGE, detail)
    scans = data.count(_START_OF_SCAN) if image.format in ("JPEG", "MPO") else 0
    if scans * image.size[0] * image.size[1] > _MAX_SCANNED_PIXELS:
        raise BadImage(RejectReason.TOO_LARGE, f"{scans} scans of {image.size[0]} x {image.size[1]} pixels")
    # Not `n_frames`, for which some formats read all of them. An MPO's first frame is the photograph.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(RejectReason.ANIMATED, f"{image.format} with several frames")
    if image.mode in _SIXTEEN_BIT and image.format == "TIFF":
        kind = (tags.get(_BITS), tags.get(_PHOTOMETRIC), tags.get(_SAMPLE_FORMAT, (1,)))
        if kind != ((16,), 1, (1,)):  # 12, 32, signed, inverted: Pillow leaves them as they are
            raise BadImage(RejectReason.UNSUPPORTED, f"TIFF with bits, photometric, sample format {kind}")


# The signatures that no text starts with by chance.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_BITS, _PHOTOMETRIC, _ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLE_FORMAT = 258, 262, 274, 322, 323, 339
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_ZEROS = 16  # at the end, from which on a file may be one that was not written
# How an array [H, W, 3] is turned upright, by the value of EXIF's tag.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}

# What Pillow's plugins raise on damaged data. A MemoryError is ours to see, not a property of the image.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError,
                  EOFError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError,
                  struct.error, zlib.error)  # fmt: skip


def _damaged(error: BaseException, data: bytes) -> BadImage:
    text = f"{type(error).__name__}: {error}"
    if "Decompressed data too large" in text or "Too much memory used in text chunks" in text:
        return BadImage(RejectReason.TOO_LARGE, text)
    short = "truncated" in text.lower() or "end of file" in text.lower() or isinstance(error, EOFError)
    if data[:4] == b"RIFF" and len(data) >= 8:  # WebP's decoder has one word for all damage
        short = short or len(data) < struct.unpack("<I", data[4:8])[0] + 8
    return BadImage(RejectReason.TRUNCATED if short else RejectReason.CORRUPT, text)


def _check_whole(data: bytes, kind: str | None) -> None:
    """Refuses a file that was not written to its end, though a decoder takes it: where its length was set first, the
    rest is zeros, which are data to it.

    Such a JPEG has no end. The checksums of a PNG's pixels differ, which Pillow never compares. WebP, BMP, PPM and TIFF
    without compression can't tell: flat images end so too.
    """
    unwritten = BadImage(RejectReason.TRUNCATED, "its end is zeros, of a file that was not written to its end")
    ends_in_zeros = data.endswith(bytes(_ZEROS))
    if kind == "PNG" and not _has_its_checksums(data):
        raise unwritten if ends_in_zeros else BadImage(RejectReason.CORRUPT, "a checksum of its pixels is another")
    if kind in ("JPEG", "MPO") and ends_in_zeros:
        place = 2
        # Over the segments before the scan: they hold thumbnails, with ends of their own.
        while data[place : place + 1] == b"\xff" and data[place : place + 2] != _START_OF_SCAN:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data.find(_END_OF_IMAGE, place) < 0:
            raise unwritten


def _has_its_checksums(png: bytes) -> bool:
    """Whether all parts that hold pixels are those that were written."""
    place, view = 8, memoryview(png)
    while place < len(png) and (kind := png[place + 4 : place + 8]) != b"IEND":
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        if kind == b"IDAT" and png[end : end + 4] != zlib.crc32(view[place + 4 : end]).to_bytes(4, "big"):
            return False
        place = end + 4
    return True


def _orientation(image: Image.Image) -> int:
    """EXIF's; 1, as it is, where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DECODE_ERRORS:  # metadata that contradict their format say nothing of the pixels
        return 1


_BAND_PX = 1 << 21  # converted at a time: several copies of a large image would be gigabytes


def _as_rgb(image: Image.Image) -> np.ndarray:
    """A contiguous array of its own."""
    width_px, height_px = image.size
    rows = max(1, _BAND_PX // max(1, width_px))
    if rows >= height_px:
        return _band_as_rgb(image)
    image_hwc = np.empty((height_px, width_px, 3), np.uint8)
    for top in range(0, height_px, rows):
        band = image.crop((0, top, width_px, min(top + rows, height_px)))
        image_hwc[top : top + rows] = _band_as_rgb(band)
    return image_hwc


def _band_as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode not in _DIRECT:
        raise BadImage(RejectReason.UNSUPPORTED, f"pixel format {image.mode}")
    if image.mode in {"P", "PA"}:  # through RGBA, so that a transparent entry keeps its own colour
        image = image.convert("RGBA")
    if image.mode in {"RGBA", "RGBX"}:
        return np.asarray(image)[:, :, :3].copy()
    if image.mode in {"LA", "La"}:
        return np.repeat(np.asarray(image)[:, :, :1], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
