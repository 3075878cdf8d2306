"""The approximate search: FAISS IVF. It runs only when it is asked for, and its recall is measured.

Legend: B queries, N reference rows, D dimensions, k neighbours, c candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from manifpt.search.vectors import Batch, Found, Vectors, nearest_of_pairs

__all__ = ["ApproximateSearch"]

_TRAINED_ROWS = 64  # a list
_CANDIDATES = 16  # beyond k
_SHARE_OF_LISTS = 16  # one list in so many is looked into
_LEAST_LISTS = 8  # but so many at least


class ApproximateSearch:
    """Looks into the lists nearest to a query. What it finds has its exact distance; what it misses, it misses."""

    def __init__(self, vectors: Vectors, threads: int = 1) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._faiss, self._threads, self._vectors = faiss, threads, vectors
        lists = max(1, min(int(4 * np.sqrt(vectors.count)), vectors.count // 39))  # FAISS wants 39 rows a list or more
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatL2(vectors.dim), vectors.dim, lists)
        self._index.cp.seed = 0
        step = max(1, vectors.count // (lists * _TRAINED_ROWS))
        self._index.train(np.ascontiguousarray(vectors.at(slice(0, vectors.count, step))))
        for block in vectors.slices():
            self._index.add(np.ascontiguousarray(vectors.at(block)))
        self._index.nprobe = max(_LEAST_LISTS, lists // _SHARE_OF_LISTS)

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """See `manifpt.search.Search`."""
        self._faiss.omp_set_num_threads(self._threads)
        most = max((len(rows) for rows in excluded), default=0) if excluded else 0
        _, row_bc = self._index.search(query_bd, min(self._vectors.count, k + _CANDIDATES + most))
        allowed_bc = row_bc >= 0
        for b, rows in enumerate(excluded or ()):
            if len(rows):
                allowed_bc[b] &= ~np.isin(row_bc[b], rows)
        pair_b, pair_c = np.nonzero(allowed_bc)
        found = nearest_of_pairs(self._vectors, Batch(query_bd), pair_b, row_bc[pair_b, pair_c], k)
        for b in np.flatnonzero(found.row_bk[:, 0] < 0).tolist():  # nothing in the lists that it may find
            row_p = np.setdiff1d(np.arange(self._vectors.count), excluded[b] if excluded else [])
            one = Batch(query_bd[b : b + 1])
            alone = nearest_of_pairs(self._vectors, one, np.zeros(len(row_p), np.int64), row_p, k)
            found.row_bk[b], found.squared_bk[b] = alone.row_bk[0], alone.squared_bk[0]
        return found
