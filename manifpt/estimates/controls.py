"""Controls: projections in which the real manifold has no part, so that a table shows how much it brings.

Legend: B queries, N reference images, D dimensions, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from manifpt.projection import Projection, Rows, norms, projection_without_sample

__all__ = ["BlurControl", "NoneControl", "RandomControl"]


class NoneControl:
    """x* = 0: the artifact is the embedding itself."""

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """float32 [B, D] as they are."""
        return projection_without_sample(np.array(embeddings_bd, np.float32))


class BlurControl:
    """x* = x blurred: a high-pass filter, of which no real image knows. Reflected at the borders."""

    def __init__(self, shape: tuple[int, int, int], sigma_px: float) -> None:
        self._shape, self._sigma_px = shape, sigma_px

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """float32 [B, 3 H W], pixels."""
        pixels_bchw = embeddings_bd.reshape(-1, *self._shape)
        blurred_bchw = gaussian_filter(pixels_bchw, (0, 0, self._sigma_px, self._sigma_px), mode="reflect")
        return projection_without_sample((pixels_bchw - blurred_bchw).reshape(embeddings_bd.shape))


class RandomControl:
    """x* = some real, drawn for each query by its embedding and a seed; the same one on every machine."""

    def __init__(self, embeddings_of: Callable[[Rows], np.ndarray], count: int, seed: int) -> None:
        self._embeddings_of, self._count, self._seed = embeddings_of, count, seed

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; never onto an excluded row."""
        query_bd = np.ascontiguousarray(embeddings_bd, np.float32)
        neighbor_b = np.full(len(query_bd), -1)
        for b, query_d in enumerate(query_bd):
            left_out = np.empty(0, np.int64) if excluded is None else np.unique(excluded[b])
            if len(left_out) < self._count:
                key = hashlib.sha256(query_d.tobytes() + self._seed.to_bytes(8, "little")).digest()
                row = int.from_bytes(key[:8], "little") % (self._count - len(left_out))
                for out in left_out.tolist():  # ascending: each that lies before moves the row on by one
                    row += row >= out
                neighbor_b[b] = row
        artifact_bd = query_bd - self._embeddings_of(np.maximum(neighbor_b, 0))
        artifact_bd[neighbor_b < 0] = np.nan
        unknown_b = np.full(len(query_bd), np.inf, np.float32)
        return Projection(neighbor_b, norms(artifact_bd), unknown_b, artifact_bd)
