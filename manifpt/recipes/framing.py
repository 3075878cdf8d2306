"""Reals in the framing of the generators: the same crop, before the same resize.

Legend: B images, H W pixels of the source, S side of the result.

A generator that was trained on a tight crop makes larger faces than the whole photograph shows. Left alone, the size of
the face tells real from generated, and the nearest real is of another framing; so a recipe names the crops that the
generators' own training code made.
"""

from __future__ import annotations

import io
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from PIL import Image

from manifpt.errors import BadImage, ConfigError
from manifpt.isolated import IsolatedDecoder

__all__ = ["framed", "framed_name", "framed_table"]


def framed(image_hwc: np.ndarray, crop_px: int, size_px: int) -> np.ndarray:
    """The centre square of an image, at another size: one resampling, Pillow's antialiased bicubic, as in every view.

    The square's corner may lie between two pixels: at (H - crop_px) / 2, as the centre demands, not rounded. At its
    edge the filter sees the pixels beyond, where code that crops first would see none.

    Args:
        image_hwc: uint8 [H, W, 3].
        crop_px: side of the square; at most the shorter side of the image.
        size_px: S; at most `crop_px`, since enlarging would invent pixels.

    Returns:
        square_ssc: uint8 [S, S, 3].

    Raises:
        ConfigError: a crop that is larger than the image or smaller than the result.
    """
    height_px, width_px = image_hwc.shape[:2]
    if crop_px > min(height_px, width_px):
        raise ConfigError(f"A crop of {crop_px} px doesn't fit into {width_px} x {height_px} px; choose a smaller one.")
    if crop_px < size_px:
        raise ConfigError(f"A crop of {crop_px} px would have to be enlarged to {size_px} px; choose a larger one.")
    left, top = (width_px - crop_px) / 2, (height_px - crop_px) / 2
    box = (left, top, left + crop_px, top + crop_px)
    return np.asarray(Image.fromarray(image_hwc).resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))


def framed_name(file: str, crop_px: int) -> str:
    """Name of the Parquet file of crops: `real.parquet` -> `real.crop74.parquet`."""
    path = PurePosixPath(file)
    return f"{path.stem}.crop{crop_px}{path.suffix}"


def framed_table(table: pa.Table, crop_px: int, size_px: int) -> pa.Table:
    """A Parquet set's rows with their images framed, as lossless PNG. Rows keep their numbers and other columns.

    Args:
        table: with a binary column `image`, files of any format; `format`, `width` and `height` are set where there.
        crop_px, size_px: as in `framed`.

    Raises:
        ConfigError: no column `image`, an image that can't be decoded, or one that is smaller than the crop.
    """
    if "image" not in table.column_names:
        raise ConfigError(f"Framing needs a column 'image'; there are {', '.join(table.column_names)}.")
    images = []
    kind = table.schema.field("image").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(f"Framing needs a column 'image' of binary files, not of {kind}; write its bytes as one.")
    with IsolatedDecoder() as decode:
        for row, data in enumerate(table["image"].to_pylist()):
            try:
                square = framed(decode(data or b""), crop_px, size_px)
            except BadImage as error:
                raise ConfigError(
                    f"Row {row} can't be framed ({error.reason.value}: {error.detail}); leave it out."
                ) from error
            buffer = io.BytesIO()
            Image.fromarray(square).save(buffer, "PNG")
            images.append(buffer.getvalue())
    changed = {"image": pa.array(images, pa.binary()), "format": "png", "width": size_px, "height": size_px}
    for name, values in changed.items():
        if name in table.column_names:
            kind = table.schema.field(name).type
            column = values if isinstance(values, pa.Array) else pa.repeat(pa.scalar(values), len(table))
            table = table.set_column(table.column_names.index(name), name, column.cast(kind))
    return table
