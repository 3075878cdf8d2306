"""The k nearest of a set of vectors among others that come in blocks, exact and the same for any order of the blocks.

Legend: B queries, N rows seen so far, M of one block, F features, k neighbours.

Both sets come in shards, each pair of shards is looked at once, and what is left of it is B x k numbers, which `merged`
joins. Each look is a flat search of `manifpt.search`: float64 differences decide, ties go to the smallest row. So any
sharding gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from manifpt.metrics.tiles import finite
from manifpt.search import Found, Vectors
from manifpt.search.flat import FlatSearch
from manifpt.search.vectors import nearer

__all__ = ["Nearest"]


@dataclass(frozen=True, slots=True)
class Nearest:
    """What is nearest to some queries among the blocks added so far.

    Attributes:
        query_bf: float32 [B, F].
        own_b: int64 [B], the row that is the query itself and that it must not find; -1 where it is none.
        found: the k nearest so far.
    """

    query_bf: np.ndarray
    own_b: np.ndarray
    found: Found

    @classmethod
    def to(cls, query_bf: np.ndarray, k: int, own_b: np.ndarray | None = None) -> Nearest:
        """The state before any block.

        Args:
            query_bf: float [B, F]; compared as float32, as embeddings are stored.
            k: how many neighbours, at least 1.
            own_b: see `Nearest`; None: no query is among the rows.

        Raises:
            ConfigError: a number that is not finite.
        """
        query_bf = finite(query_bf, np.float32)
        own_b = np.full(len(query_bf), -1) if own_b is None else own_b
        return cls(query_bf, own_b, Found(np.full((len(query_bf), k), -1), np.full((len(query_bf), k), np.inf)))

    def add(self, block_mf: np.ndarray, row_m: np.ndarray) -> Nearest:
        """The state with one more block.

        Args:
            block_mf: float [M, F]; compared as float32.
            row_m: int64 [M], the number of each row, not below 0; no other block has it.

        Raises:
            ConfigError: a number that is not finite.
        """
        if not len(block_mf) or not len(self.query_bf):
            return self
        order_m = np.argsort(row_m)  # of rows that are equally far, the search takes the first
        block_mf, row_m = finite(block_mf, np.float32)[order_m], row_m[order_m]
        place_b = np.searchsorted(row_m, self.own_b)
        is_here_b = row_m[np.minimum(place_b, len(row_m) - 1)] == self.own_b
        excluded = [
            np.array([place] if is_here else [], np.int64) for place, is_here in zip(place_b, is_here_b, strict=True)
        ]
        search = FlatSearch(Vectors(lambda rows: block_mf[rows], *block_mf.shape))
        found = search.search(self.query_bf, self.found.row_bk.shape[1], excluded)
        numbered = Found(np.where(found.row_bk < 0, -1, row_m[found.row_bk]), found.squared_bk)
        return self.merged(replace(self, found=numbered))

    def merged(self, other: Nearest) -> Nearest:
        """The state of the blocks of both; the queries are the same, and no block was added to both."""
        return replace(self, found=nearer(self.found, other.found)[0])
