"""Reals without their structure: a control that tells how much of an estimate is the manifold, how much its spectrum.

Legend: H W pixels.

A picture's edges and shapes are in the phases of its spectrum; its colours and its sharpness in the magnitudes. Reals
whose phases are random have the second and none of the first: an estimate of the projection that does as well with
them knows a spectrum, not a manifold.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from manifpt.errors import BadImage
from manifpt.fetch import fetch
from manifpt.isolated import IsolatedDecoder
from manifpt.manifest import Manifest, records
from manifpt.spaces import View

__all__ = ["phase_randomized", "phase_randomized_reals"]

_BLOCK_ROWS = 1024


def phase_randomized(image_hwc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same magnitudes and other phases, equal shifts in all channels, so that colours stay correlated.

    Args:
        image_hwc: uint8 [H, W, 3].
        rng: of the noise whose phases are added.

    Returns:
        image_hwc: uint8 [H, W, 3], rounded; what lies outside of 0 to 255 is clipped, which is all that changes a
            magnitude.
    """
    shift_hw = np.angle(np.fft.fft2(rng.standard_normal(image_hwc.shape[:2])))
    shift_hw[0, 0] = 0  # the mean stays
    spectrum_hwc = np.fft.fft2(image_hwc, axes=(0, 1)) * np.exp(1j * shift_hw)[..., None]
    return np.rint(np.fft.ifft2(spectrum_hwc, axes=(0, 1)).real).clip(0, 255).astype(np.uint8)


def phase_randomized_reals(manifest: Manifest, view: View, seed: int = 0) -> Iterator[pa.RecordBatch]:
    """A manifest's images with random phases, as lossless PNG in a Parquet set's column `image`.

    Args:
        manifest: of reals; what can't be decoded is left out, as it is of a reference.
        view: at whose size the phases are changed: a later resize would filter what they left.
        seed: of the phases of each row.
    """
    with IsolatedDecoder() as decode:
        for start in range(0, manifest.rows, _BLOCK_ROWS):
            rows = records(manifest.read(start, min(manifest.rows, start + _BLOCK_ROWS)))
            images = []
            for number, data in enumerate(fetch(rows), start):
                try:
                    if isinstance(data, BadImage):
                        continue
                    image_hwc = view.of(decode(data)).transpose(1, 2, 0)
                except BadImage:
                    continue
                buffer = io.BytesIO()
                Image.fromarray(phase_randomized(image_hwc, np.random.default_rng([seed, number]))).save(buffer, "PNG")
                images.append(buffer.getvalue())
            yield pa.record_batch({"image": pa.array(images, pa.binary())})
