"""Equal embeddings are searched once: a reference full of copies is as small as what is distinct in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from manifpt.search.vectors import Found, Rows

__all__ = ["DistinctSearch", "Search", "distinct_rows"]


class Search(Protocol):
    """The k nearest of N rows, exactly or not; see `FlatSearch`, `PrunedSearch`, `ApproximateSearch`."""

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """Nearest rows of float32 [B, D], nearest first; `excluded[b]` are rows that query b must not find."""
        ...


def distinct_rows(embeddings_of: Callable[[Rows], np.ndarray], blocks: Sequence[slice]) -> np.ndarray:
    """For each row, the first one that has the very same embedding: int64 [N]."""
    first: dict[bytes, int] = {}
    same_as = []
    for block in blocks:
        for number, row_d in enumerate(np.ascontiguousarray(embeddings_of(block) + np.float32(0)), block.start):
            same_as.append(first.setdefault(hashlib.blake2b(row_d, digest_size=16).digest(), number))
    return np.array(same_as, np.int64)


class DistinctSearch:
    """Any search over the distinct rows, told as rows of the whole reference; equal ones in ascending order."""

    def __init__(self, inner: Search, same_as: np.ndarray) -> None:
        """Args:
        inner: over `np.unique(same_as)`, in that order.
        same_as: int64 [N], see `distinct_rows`.
        """
        self._inner = inner
        _, self._place_n = np.unique(same_as, return_inverse=True)
        self._rows = np.argsort(self._place_n, kind="stable")  # by place, ascending in each
        self._starts = np.searchsorted(self._place_n[self._rows], np.arange(self._place_n.max() + 2))

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """See `Search`. The k nearest distinct ones hold the k nearest rows, since each stands for one or more."""
        gone = [self._wholly(rows) for rows in excluded] if excluded else None
        near = self._inner.search(query_bd, k, gone)
        found = Found(np.full((len(query_bd), k), -1, np.int64), np.full((len(query_bd), k), np.inf))
        for b in range(len(query_bd)):
            count = 0
            for place, squared in zip(near.row_bk[b], near.squared_bk[b], strict=True):
                if place < 0 or count == k:
                    break
                rows = self._rows[self._starts[place] : self._starts[place + 1]]
                if excluded is not None and len(excluded[b]):
                    rows = rows[~np.isin(rows, excluded[b])]
                rows = rows[: k - count]
                found.row_bk[b, count : count + len(rows)] = rows
                found.squared_bk[b, count : count + len(rows)] = squared
                count += len(rows)
        return found

    def _wholly(self, rows: np.ndarray) -> np.ndarray:
        """Places of which every row is excluded."""
        places, counts = np.unique(self._place_n[np.unique(rows)], return_counts=True)
        return places[counts == self._starts[places + 1] - self._starts[places]]
