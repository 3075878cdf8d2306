"""Projections from the k nearest reals: their mean, and the nearest point of their affine hull.

Legend: B queries, k neighbours, D dimensions.

One sample is a noisy estimate of a point of the manifold: its own content and noise enter the artifact. More neighbours
average that out. With k = 1 both are the paper's artifact, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from manifpt.projection import NearestProjector, Projection, norms

__all__ = ["HullProjector", "MeanProjector", "hull_weights"]

_BLOCK_BYTES = 64 << 20


class _Weighted:
    """x* = sum_j w_j y_j over the k nearest, with weights that sum to one."""

    def __init__(
        self,
        nearest: NearestProjector,
        neighbors: int,
        weights: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self._nearest, self._neighbors, self._weights = nearest, neighbors, weights

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; a query with fewer than k reals left takes those there are."""
        query_bd = np.ascontiguousarray(embeddings_bd, np.float32)
        found = self._nearest.nearest(query_bd, max(2, self._neighbors), excluded)
        two = self._nearest.with_next(query_bd, found, excluded)
        first_b, second_b = np.sqrt(two.squared_bk).astype(np.float32).T
        artifact_bd = np.empty_like(query_bd)
        step = max(1, _BLOCK_BYTES // (8 * self._neighbors * max(1, query_bd.shape[1])))
        for start in range(0, len(query_bd), step):
            block = slice(start, start + step)
            row_bk = found.row_bk[block, : self._neighbors]
            near_bkd = self._nearest.embeddings_of(np.maximum(row_bk, 0).reshape(-1)).astype(np.float64)
            near_bkd = near_bkd.reshape(*row_bk.shape, -1)
            weight_bk = self._weights(query_bd[block], np.where(row_bk[..., None] < 0, np.nan, near_bkd))
            near_bd = np.matmul(weight_bk[:, None], near_bkd)[:, 0].astype(np.float32)
            artifact_bd[block] = query_bd[block] - near_bd
        is_alone_b = found.row_bk[:, 0] < 0
        artifact_bd[is_alone_b] = np.nan
        if self._neighbors == 1:  # the paper's: one sample, and the search's own distance
            return Projection(found.row_bk[:, 0], first_b, second_b, artifact_bd)
        none_b = np.full(len(query_bd), -1)
        return Projection(none_b, norms(artifact_bd), second_b, artifact_bd, first_b, is_alone_b)


class MeanProjector(_Weighted):
    """x* = the mean of the k nearest reals."""

    def __init__(self, nearest: NearestProjector, neighbors: int) -> None:
        super().__init__(nearest, neighbors, _equal_weights)


class HullProjector(_Weighted):
    """x* = the nearest point of the affine hull of the k nearest reals, ridge-regularised; see `hull_weights`."""

    def __init__(self, nearest: NearestProjector, neighbors: int, ridge: float) -> None:
        super().__init__(nearest, neighbors, lambda query_bd, near_bkd: hull_weights(query_bd, near_bkd, ridge))


def _equal_weights(query_bd: np.ndarray, near_bkd: np.ndarray) -> np.ndarray:
    is_there_bk = ~np.isnan(near_bkd[..., 0])
    return is_there_bk / np.maximum(1, is_there_bk.sum(axis=1, keepdims=True))


def hull_weights(query_bd: np.ndarray, near_bkd: np.ndarray, ridge: float) -> np.ndarray:
    """Weights that sum to one and minimise |x - sum_j w_j y_j|^2 + ridge * m * |w|^2, m the mean of |x - y_j|^2.

    With z_j = x - y_j this is w ~ (Z Z^T + ridge * m * I)^-1 1, the locally linear weights of Roweis and Saul (Science
    290, 2000, eq. 1), whose regularisation is ours. An infinite ridge gives the mean, none the affine hull.

    Args:
        query_bd: float32 [B, D].
        near_bkd: float64 [B, k, D]; NaN where there are fewer than k.
        ridge: above 0.

    Returns:
        weight_bk: float64 [B, k].
    """
    is_there_bk = ~np.isnan(near_bkd[..., 0])
    z_bkd = np.where(is_there_bk[..., None], query_bd[:, None].astype(np.float64) - near_bkd, 0)
    gram_bkk = np.matmul(z_bkd, z_bkd.transpose(0, 2, 1))
    mean_b = np.trace(gram_bkk, axis1=1, axis2=2) / np.maximum(1, is_there_bk.sum(axis=1))
    mean_b = np.maximum(mean_b, np.finfo(np.float64).tiny ** 0.5)  # all of them are x itself
    gram_bkk += (ridge * mean_b)[:, None, None] * np.eye(gram_bkk.shape[1])
    solved_bk = np.linalg.solve(gram_bkk, is_there_bk[..., None].astype(np.float64))[..., 0]
    total_b1 = solved_bk.sum(axis=1, keepdims=True)
    return np.where(total_b1 > 0, solved_bk / np.where(total_b1 > 0, total_b1, 1), 0)
