"""Equal embeddings are searched once: a reference full of copies is as small as what is distinct in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from manifpt.search.vectors import Batch, Found, Rows, Vectors

__all__ = ["DistinctSearch", "Search", "distinct_rows", "without_copies"]


class Search(Protocol):
    """The k nearest of N rows, exactly or not; see `FlatSearch`, `PrunedSearch`, `ApproximateSearch`."""

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """Nearest rows of float32 [B, D], nearest first; `excluded[b]` are rows that query b must not find."""
        ...


def distinct_rows(content_of: Callable[[Rows], np.ndarray], blocks: Sequence[slice]) -> np.ndarray:
    """For each row, the first one that has the very same content: int64 [N]."""
    first: dict[bytes, int] = {}
    same_as = []
    for block in blocks:
        for number, row in enumerate(np.ascontiguousarray(content_of(block)), block.start):
            same_as.append(first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), number))
    return np.array(same_as, np.int64)


def without_copies(vectors: Vectors, content_of: Callable[[Rows], np.ndarray]) -> tuple[Vectors, np.ndarray | None]:
    """The distinct rows, and what `distinct_rows` says of all; the same vectors and None where all are distinct."""
    same_as = distinct_rows(content_of, list(vectors.slices()))
    rows = np.unique(same_as)
    if len(rows) == vectors.count:
        return vectors, None
    return Vectors(lambda part: vectors.at(rows[part]), len(rows), vectors.dim), same_as


class DistinctSearch:
    """Any search over the distinct rows, told as rows of the whole reference; equal ones in ascending order."""

    def __init__(self, inner: Search, vectors: Vectors, same_as: np.ndarray) -> None:
        """Args:
        inner: over `vectors`.
        vectors: the rows `np.unique(same_as)`, in that order.
        same_as: int64 [N], see `distinct_rows`.
        """
        self._inner, self._vectors = inner, vectors
        _, self._place_n = np.unique(same_as, return_inverse=True)
        self._rows = np.argsort(self._place_n, kind="stable")  # by place, ascending in each
        self._starts = np.searchsorted(self._place_n[self._rows], np.arange(vectors.count + 1))

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """See `Search`. The k nearest distinct ones hold the k nearest rows, since each stands for one or more."""
        none = np.empty(0, np.int64)
        excluded = excluded or [none] * len(query_bd)
        # A place stands for its smallest row, which decides ties; so one of which rows are excluded is looked at apart.
        touched = [np.unique(self._place_n[rows]) if len(rows) else none for rows in excluded]
        near = self._inner.search(query_bd, k, touched)
        found = Found(np.full((len(query_bd), k), -1, np.int64), np.full((len(query_bd), k), np.inf))
        lengths_b = [len(places) for places in touched]
        pair_b = np.repeat(np.arange(len(query_bd)), lengths_b)
        places_p = np.concatenate([*touched, none])
        apart_p = np.empty(0)
        if len(places_p):
            apart_p = self._vectors.exact_pair_distances(Batch(query_bd), pair_b, places_p)
        for b, (places, apart) in enumerate(zip(touched, np.split(apart_p, np.cumsum(lengths_b)), strict=False)):
            known = near.row_bk[b] >= 0
            rows, squared = self._rows_of(
                np.r_[near.row_bk[b][known], places], np.r_[near.squared_bk[b][known], apart], excluded[b]
            )
            order = np.lexsort((rows, squared))[:k]
            found.row_bk[b, : len(order)], found.squared_bk[b, : len(order)] = rows[order], squared[order]
        return found

    def _rows_of(self, places: np.ndarray, squared: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows of some places but the excluded ones, and what the places are away."""
        members = [self._rows[self._starts[place] : self._starts[place + 1]] for place in places]
        rows = np.concatenate([*members, np.empty(0, np.int64)])
        squared = np.repeat(squared, [len(member) for member in members])
        allowed = ~np.isin(rows, excluded)
        return rows[allowed], squared[allowed]
