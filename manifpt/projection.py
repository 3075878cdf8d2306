"""The projection x* of an image onto the reference: its nearest real image, proved exact.

Legend: B queries, N reference images, D dimensions, k candidates, P pairs of a query and a candidate.

A flat search in float32 (FAISS) computes |a|^2 + |b|^2 - 2 a.b, whose rounding error can swap near neighbours. So
FAISS only proposes candidates. The few that rounding could have swapped are compared again with float64 differences;
and when even the first image that FAISS left out might be nearer, the query is searched again in float64. What is
returned is the nearest of all N float32 embeddings, for every query, with ties going to the smallest image id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["NearestProjector", "Projection", "Projector"]

_CANDIDATES = 4
_MOST_EXCLUDED = 64  # beyond, the float64 search is cheaper than a long candidate list
_BLOCK_BYTES = 128 << 20  # of reference rows in float64
_AGAIN = 256  # queries of one float64 search
_PAIR_BYTES = 4 << 20  # of differences in float64: what fits a cache

Rows = np.ndarray | slice


@dataclass(frozen=True, slots=True)
class Projection:
    """Where B images come to lie on the reference.

    Attributes:
        neighbor_b: int64 [B], row of the nearest reference image; -1 where every one was excluded.
        distance_b: float32 [B], Euclidean.
        second_b: float32 [B], Euclidean, to the second nearest, from the float32 search; infinite where there is none.
            For statistics only: a first much nearer than the second is a near copy.
        artifact_bd: float32 [B, D], phi(x) - phi(x*); NaN where there is no x*.
    """

    neighbor_b: np.ndarray
    distance_b: np.ndarray
    second_b: np.ndarray
    artifact_bd: np.ndarray


class Projector(Protocol):
    """The seam for estimates of the projection."""

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; `excluded[b]` holds reference rows that query b must not use."""
        ...


class NearestProjector:
    """x* = argmin over the reference of |phi(x) - phi(y)|^2 (paper section 3; k = 1)."""

    def __init__(self, embeddings_of: Callable[[Rows], np.ndarray], count: int, dim: int, threads: int = 1) -> None:
        """Embeds the reference once and hands it to FAISS.

        Args:
            embeddings_of: reference rows -> float32 [M, D]. Must be deterministic: it is called again for candidates.
            count: N, at least 1; rows in ascending order of image id.
            dim: D.
            threads: CPU threads for the search.
        """
        import faiss

        self._faiss = faiss
        faiss.omp_set_num_threads(threads)
        self._embeddings_of = embeddings_of
        self._count, self._dim = count, dim
        self._block_rows = max(1, _BLOCK_BYTES // (8 * max(dim, _AGAIN)))
        blocks = [slice(start, min(start + self._block_rows, count)) for start in range(0, count, self._block_rows)]
        self._blocks = blocks
        centred_nd = np.empty((count, dim), np.float32)
        total_d = np.zeros(dim)
        for block in blocks:
            centred_nd[block] = embeddings_of(block)
            total_d += centred_nd[block].sum(axis=0, dtype=np.float64)
        # Distances don't change under a shift, and rounding errors shrink with the norms.
        self._mean_d = (total_d / count).astype(np.float32)
        centred_nd -= self._mean_d
        if not np.isfinite(centred_nd).all():
            raise ValueError(
                "the reference holds embeddings that are no finite numbers: the network or its weights are broken"
            )
        self._search = self._on_gpu(centred_nd) or (lambda query_bd, k: faiss.knn(query_bd, centred_nd, k))

    def _on_gpu(self, centred_nd: np.ndarray) -> Callable[[np.ndarray, int], Any] | None:
        if not self._faiss.get_num_gpus():
            return None
        resources = self._faiss.StandardGpuResources()
        index = self._faiss.GpuIndexFlatL2(resources, self._dim)
        index.add(centred_nd)
        return lambda query_bd, k: index.search(query_bd, k)

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; see `Projector`."""
        query_bd = np.ascontiguousarray(embeddings_bd, np.float32)
        if not np.isfinite(query_bd).all():
            raise ValueError("an embedding is no finite number: the network or its weights are broken")
        if not len(query_bd):
            return Projection(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32), query_bd)
        excluded = excluded or [np.empty(0, np.int64)] * len(query_bd)
        neighbor_b, squared_b, second_b, proved_b = self._by_candidates(query_bd, excluded)
        for start in range(0, int((~proved_b).sum()), _AGAIN):
            again = np.flatnonzero(~proved_b)[start : start + _AGAIN]
            neighbor_b[again], squared_b[again] = self._in_float64(query_bd[again], [excluded[b] for b in again])
        artifact_bd = np.full_like(query_bd, np.nan)
        found = np.flatnonzero(neighbor_b >= 0)
        artifact_bd[found] = query_bd[found] - self._embeddings_of(neighbor_b[found])
        return Projection(neighbor_b, np.sqrt(squared_b).astype(np.float32), second_b, artifact_bd)

    def _by_candidates(
        self, query_bd: np.ndarray, excluded: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Best row, squared distance, distance to the second, and whether the best is proved, for each query."""
        centred_bd = query_bd - self._mean_d
        most = min(max(len(rows) for rows in excluded), _MOST_EXCLUDED)
        k = min(self._count, _CANDIDATES + most)
        distance_bk, row_bk = self._search(centred_bd, k)
        distance_bk = np.asarray(distance_bk, np.float64)
        norm_b = np.linalg.norm(centred_bd.astype(np.float64), axis=1)

        allowed_bk = np.ones_like(row_bk, dtype=bool)
        for b in (b for b, rows in enumerate(excluded) if len(rows)):
            allowed_bk[b] = ~np.isin(row_bk[b], excluded[b])
        masked_bk = np.where(allowed_bk, distance_bk, np.inf)
        nearest_b = masked_bk.min(axis=1)
        # A candidate is compared again unless rounding can't have hidden that it is nearer than the first. With d the
        # first one's true distance and g the bound's factor: d <= sqrt(nearest) + sqrt(g) (2 |x| + d), solved for d;
        # and whatever is nearer has a norm of at most |x| + d.
        root = np.sqrt(_rounding(self._dim, 1.0))
        computed_b = np.sqrt(np.maximum(np.where(np.isfinite(nearest_b), nearest_b, 0), 0))
        reach_b = (computed_b + 2 * root * norm_b) / (1 - root)
        margin_b = _rounding(self._dim, 2 * norm_b + reach_b)
        pair_b, pair_k = np.nonzero(np.isfinite(masked_bk) & (masked_bk <= (nearest_b + 2 * margin_b)[:, None]))
        neighbor_b, squared_b = self._best_of_pairs(query_bd, pair_b, row_bk[pair_b, pair_k])

        # Whatever was left out has a computed distance of at least the last candidate's. It is truly farther than the
        # best if that leaves room for rounding; if its norm is so large that the rounding is larger, it is farther by
        # the triangle inequality (|y| > |x| + d  =>  |x - y| > d).
        room_b = _rounding(self._dim, norm_b + (norm_b + np.sqrt(squared_b)) * (1 + 1e-6))
        proved_b = (distance_bk[:, -1] - room_b > squared_b) | (k == self._count)
        proved_b &= np.array([len(rows) <= most for rows in excluded]) & np.isfinite(squared_b)
        second_b = np.sort(masked_bk, axis=1)[:, 1] if k > 1 else np.full(len(query_bd), np.inf)
        return neighbor_b, squared_b, np.sqrt(np.maximum(second_b, 0)).astype(np.float32), proved_b

    def _in_float64(self, query_bd: np.ndarray, excluded: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Flat search in float64, then differences for all that its rounding can't tell apart."""
        centred_bd = query_bd.astype(np.float64) - self._mean_d
        norm_b = np.linalg.norm(centred_bd, axis=1)
        best_b = np.full(len(query_bd), np.inf)
        pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for block in self._blocks:
            block_nd = self._embeddings_of(block).astype(np.float64) - self._mean_d
            squared_n = (block_nd**2).sum(axis=1)
            squared_bn = (norm_b**2)[:, None] + squared_n - 2 * (centred_bd @ block_nd.T)
            for b, rows in enumerate(excluded):
                inside = rows[(rows >= block.start) & (rows < block.stop)]
                squared_bn[b, inside - block.start] = np.inf
            error_bn = _rounding(self._dim, norm_b[:, None] + np.sqrt(squared_n), unit=2.0**-53)
            best_b = np.minimum(best_b, (squared_bn + error_bn).min(axis=1))  # an upper bound of the true minimum
            lower_bn = squared_bn - error_bn
            near_b, near_n = np.nonzero((lower_bn <= best_b[:, None]) & np.isfinite(squared_bn))
            pairs.append((near_b, near_n + block.start, lower_bn[near_b, near_n]))
        pair_b, row, lower = (np.concatenate(part) for part in zip(*pairs, strict=True))
        kept = lower <= best_b[pair_b]
        return self._best_of_pairs(query_bd, pair_b[kept], row[kept])

    def _best_of_pairs(
        self, query_bd: np.ndarray, pair_b: np.ndarray, row_p: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest candidate of each query by float64 differences; ties to the smallest row, that is image id."""
        squared_p = np.empty(len(pair_b), np.float64)
        step = max(1, _PAIR_BYTES // (8 * self._dim))
        for start in range(0, len(pair_b), step):
            part = slice(start, start + step)
            unique, inverse = np.unique(row_p[part], return_inverse=True)
            difference = query_bd[pair_b[part]].astype(np.float64) - self._embeddings_of(unique)[inverse]
            squared_p[part] = np.einsum("pd,pd->p", difference, difference)
        order = np.lexsort((row_p, squared_p, pair_b))
        queries, first = np.unique(pair_b[order], return_index=True)
        neighbor_b = np.full(len(query_bd), -1, np.int64)
        squared_b = np.full(len(query_bd), np.inf)
        neighbor_b[queries] = row_p[order][first]
        squared_b[queries] = squared_p[order][first]
        return neighbor_b, squared_b


def _rounding(dim: int, norms: Any, unit: float = 2.0**-24) -> Any:
    """Bound on the error of a computed |x - y|^2, for `norms` = |x| + |y| after centring.

    gamma_n (|x| + |y|)^2 with gamma_n = n u / (1 - n u): any order of summation, with or without fused multiply-add
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). n = D + 8 covers the three sums and the
    rounding of the centred vectors themselves.
    """
    gamma = (dim + 8) * unit / (1 - (dim + 8) * unit)
    return gamma * np.square(norms)
