"""The flat search: FAISS in float32 over all rows, proved, with float64 where float32 can't tell.

Legend: B queries, N reference rows, D dimensions, k neighbours, c candidates, P pairs of a query and a candidate.

FAISS computes |a|^2 + |b|^2 - 2 a.b, whose rounding error can swap near neighbours. So it only proposes candidates.
Those that rounding could have swapped are compared again with differences; and when even the first row that FAISS left
out might be nearer, the query is searched again in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manifpt.log import event
from manifpt.search.vectors import LARGE, Batch, Found, Vectors, nearest_of_pairs

if TYPE_CHECKING:
    from manifpt.search.device import DeviceIndex

__all__ = ["FlatSearch", "rounding"]

_CANDIDATES = (1, 15)  # beyond k: few, which is fast, and more for what few don't prove
_MOST_EXCLUDED = 64  # beyond, the float64 search is cheaper than a long candidate list
_CENTRED_BYTES = 1 << 30
_AGAIN = 256  # queries of one float64 search


class FlatSearch:
    """Exact by looking at everything."""

    def __init__(self, vectors: Vectors, threads: int = 1, device: str | None = None) -> None:
        """Args:
        vectors: the reference.
        threads: CPU threads.
        device: that holds the reference and compares, as far as it can; None: FAISS on the CPU.
        """
        import faiss

        self._faiss = faiss
        faiss.cvar.distance_compute_blas_threshold = 2  # a few queries, too, should read the reference once together
        self._threads = threads
        self._vectors = vectors
        total_d = np.zeros(vectors.dim)
        for block in vectors.slices():
            total_d += vectors.at(block).sum(axis=0, dtype=np.float64)
        # Distances don't change under a shift, and rounding errors shrink with the norms.
        self._mean_d = (total_d / vectors.count).astype(np.float32)
        self._centred_nd: np.ndarray | None = None
        self._knn: Callable[..., Any] = faiss.knn
        self._index: DeviceIndex | None = None
        if device is not None and vectors.hold_on(device):
            from manifpt.search.device import device_index

            assert vectors.on_device is not None
            self._index = device_index(vectors.on_device, self._mean_d)
        if self._index is None and device == "cuda" and faiss.get_num_gpus():  # block by block through the device
            self._knn = functools.partial(self._knn_on_gpu, faiss.StandardGpuResources())

    def _knn_on_gpu(self, resources: Any, query_bd: np.ndarray, block_md: np.ndarray, c: int) -> Any:
        try:
            return self._faiss.knn_gpu(resources, query_bd, block_md, c)
        except (
            RuntimeError
        ) as error:  # FAISS takes memory of its own, beside what torch keeps, and has no word for its lack
            event("search_on_cpu", why=error)
            self._knn = self._faiss.knn
            return self._knn(query_bd, block_md, c)

    @np.errstate(over="ignore", invalid="ignore")  # what overflows isn't proved, and is searched again
    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """The k nearest rows of float32 [B, D]; `excluded[b]` are rows that query b must not find."""
        excluded = excluded or [np.empty(0, np.int64)] * len(query_bd)
        found, proved_b = self._by_candidates(Batch(query_bd), k, excluded, _CANDIDATES[0])
        again = np.flatnonzero(~proved_b)
        if len(again):
            more, proved_b[again] = self._by_candidates(
                Batch(query_bd[again]), k, [excluded[b] for b in again.tolist()], _CANDIDATES[1]
            )
            found.row_bk[again], found.squared_bk[again] = more.row_bk, more.squared_bk
        again = np.flatnonzero(~proved_b)
        for start in range(0, len(again), _AGAIN):
            part = again[start : start + _AGAIN]
            redone = self._in_float64(Batch(query_bd[part]), k, [excluded[b] for b in part])
            found.row_bk[part], found.squared_bk[part] = redone.row_bk, redone.squared_bk
        return found

    def _centred_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        if self._centred_nd is not None:
            yield 0, self._centred_nd
            return
        for block in self._vectors.slices():
            yield block.start, self._vectors.at(block) - self._mean_d

    def _candidates(self, batch: Batch, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared distances in float32 and rows, of the c that seem nearest: [B, c] each; and norms, float64 [B]."""
        if self._index is not None:
            return self._index.search(batch, c)
        centred_bd = batch.query_bd - self._mean_d
        norm_b = np.linalg.norm(centred_bd.astype(np.float64), axis=1)
        self._faiss.omp_set_num_threads(self._threads)
        if (
            self._centred_nd is None
            and self._knn is self._faiss.knn
            and 4 * self._vectors.count * self._vectors.dim <= _CENTRED_BYTES
        ):
            self._centred_nd = np.concatenate([block_md for _, block_md in self._centred_blocks()])
        distance_bc = np.full((len(centred_bd), c), np.inf, np.float32)
        row_bc = np.full((len(centred_bd), c), -1, np.int64)
        for start, block_md in self._centred_blocks():
            near_bc, index_bc = self._knn(centred_bd, block_md, min(c, len(block_md)))
            if start == 0 and near_bc.shape == distance_bc.shape:
                distance_bc, row_bc = near_bc, index_bc
                continue
            both_b2, rows_b2 = np.hstack([distance_bc, near_bc]), np.hstack([row_bc, index_bc + start])
            order_bc = np.argsort(both_b2, axis=1, kind="stable")[:, :c]
            distance_bc, row_bc = np.take_along_axis(both_b2, order_bc, 1), np.take_along_axis(rows_b2, order_bc, 1)
        return distance_bc, row_bc, norm_b

    def _by_candidates(
        self, batch: Batch, k: int, excluded: Sequence[np.ndarray], beyond: int
    ) -> tuple[Found, np.ndarray]:
        """What FAISS or the device proposes, in the right order, and for which queries that is proved."""
        most = min(max(len(rows) for rows in excluded), _MOST_EXCLUDED)
        c = min(self._vectors.count, k + beyond + most)
        distance_bc, row_bc, norm_b = self._candidates(batch, c)
        distance_bc = distance_bc.astype(np.float64)

        allowed_bc = row_bc >= 0  # FAISS leaves a place empty when a sum overflowed to no number
        for b in (b for b, rows in enumerate(excluded) if len(rows)):
            allowed_bc[b] &= ~np.isin(row_bc[b], excluded[b])
        masked_bc = np.where(allowed_bc, distance_bc, np.inf)
        kth_b = np.sort(masked_bc, axis=1)[:, min(k, c) - 1]
        # A candidate is compared again unless rounding can't have hidden that it is nearer than the k-th. With d the
        # k-th one's true distance and g the bound's factor: d <= sqrt(kth) + sqrt(g) (2 |x| + d), solved for d; and
        # whatever is nearer has a norm of at most |x| + d.
        root = np.sqrt(rounding(self._vectors.dim, 1.0))
        computed_b = np.sqrt(np.maximum(kth_b, 0) + rounding(self._vectors.dim, 0.0))
        reach_b = (computed_b + 2 * root * norm_b) / (1 - root) if root < 1 else np.full_like(norm_b, np.inf)
        margin_b = rounding(self._vectors.dim, 2 * norm_b + reach_b)
        pair_b, pair_c = np.nonzero(np.isfinite(masked_bc) & (masked_bc <= (kth_b + 2 * margin_b)[:, None]))
        found = nearest_of_pairs(self._vectors, batch, pair_b, row_bc[pair_b, pair_c], k)

        # Whatever was left out has a computed distance of at least the last candidate's. It is truly farther than the
        # k-th if that leaves room for rounding; if its norm is so large that the rounding is larger, it is farther by
        # the triangle inequality (|y| > |x| + d  =>  |x - y| > d).
        last_b = found.squared_bk[:, -1]
        room_b = rounding(self._vectors.dim, norm_b + (norm_b + np.sqrt(last_b)) * (1 + 1e-6))
        proved_b = distance_bc[:, -1] - room_b > last_b
        if c == self._vectors.count:
            return found, (np.isfinite(distance_bc) & (row_bc >= 0)).all(axis=1)
        # The sums of whatever could be as near must not have overflowed either.
        proved_b &= 2 * norm_b + np.sqrt(last_b) < LARGE
        return found, proved_b & np.array([len(rows) <= most for rows in excluded])

    def _in_float64(self, batch: Batch, k: int, excluded: Sequence[np.ndarray]) -> Found:
        """Everything in float64, then differences for all that its rounding can't tell apart."""
        centred_bd = batch.query_bd.astype(np.float64) - self._mean_d
        norm_b = np.linalg.norm(centred_bd, axis=1)
        upper_bk = np.full((len(batch), k), np.inf)  # of the k smallest true distances so far
        pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for block in self._vectors.slices():
            block_nd = self._vectors.at(block).astype(np.float64) - self._mean_d
            squared_n = (block_nd**2).sum(axis=1)
            squared_bn = (norm_b**2)[:, None] + squared_n - 2 * (centred_bd @ block_nd.T)
            for b, rows in enumerate(excluded):
                inside = rows[(rows >= block.start) & (rows < block.stop)]
                squared_bn[b, inside - block.start] = np.inf
            error_bn = rounding(self._vectors.dim, norm_b[:, None] + np.sqrt(squared_n), unit=2.0**-53)
            all_bn = np.hstack([upper_bk, squared_bn + error_bn])
            upper_bk = np.sort(np.partition(all_bn, k - 1, axis=1)[:, :k], axis=1)
            lower_bn = squared_bn - error_bn
            near_b, near_n = np.nonzero((lower_bn <= upper_bk[:, -1:]) & np.isfinite(squared_bn))
            pairs.append((near_b, near_n + block.start, lower_bn[near_b, near_n]))
        pair_b, row_p, lower_p = (np.concatenate(part) for part in zip(*pairs, strict=True))
        kept = lower_p <= upper_bk[pair_b, -1]
        return nearest_of_pairs(self._vectors, batch, pair_b[kept], row_p[kept], k)


def rounding(dim: int, norms: Any, unit: float = 2.0**-24) -> Any:
    """Bound on the error of a computed |x - y|^2, for `norms` = |x| + |y| after centring.

    gamma_n (|x| + |y|)^2 with gamma_n = n u / (1 - n u): any order of summation, with or without fused multiply-add
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). n = D + 8 covers the three sums and the
    rounding of the centred vectors themselves. Products below the normal numbers lose up to one of those each.
    """
    gamma = (dim + 8) * unit / (1 - (dim + 8) * unit) if (dim + 8) * unit < 1 else np.inf
    return gamma * (np.square(norms) + 2.0**-124 / unit)
