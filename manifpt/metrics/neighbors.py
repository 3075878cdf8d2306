"""The k nearest of a set of vectors among others that come in blocks, exact and the same for any order of the blocks.

Legend: B queries, N rows seen so far, M of one block, F features, k neighbours, P pairs.

`manifpt.search` makes an index of a whole reference once, for many queries. Here both sets come in shards, each pair of
shards is looked at once, and what is left of it is B x k numbers, which `merged` joins. Tiles only propose; float64
differences decide, ties go to the smallest row. So any sharding gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from manifpt.metrics.tiles import TOLERANCE, squared_of_pairs, tiles
from manifpt.search import Found
from manifpt.search.vectors import first_of_pairs, nearer

__all__ = ["Nearest"]


@dataclass(frozen=True, slots=True)
class Nearest:
    """What is nearest to some queries among the blocks added so far.

    Attributes:
        query_bf: float [B, F].
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
            query_bf: float [B, F].
            k: how many neighbours, at least 1.
            own_b: see `Nearest`; None: no query is among the rows.
        """
        own_b = np.full(len(query_bf), -1) if own_b is None else own_b
        return cls(query_bf, own_b, Found(np.full((len(query_bf), k), -1), np.full((len(query_bf), k), np.inf)))

    def add(self, block_mf: np.ndarray, row_m: np.ndarray) -> Nearest:
        """The state with one more block.

        Args:
            block_mf: float [M, F].
            row_m: int64 [M], the number of each row, not below 0; no other block has it.

        Raises:
            ConfigError: a number that is not finite.
        """
        row_bk, squared_bk = self.found.row_bk.copy(), self.found.squared_bk.copy()
        k = row_bk.shape[1]
        for tile in tiles(self.query_bf, block_mf):
            queries, rows_m = tile.one, row_m[tile.other]
            squared_bm = np.where(rows_m == self.own_b[queries, None], np.inf, tile.squared_nm)
            reach_b = squared_bk[queries, -1]
            if len(rows_m) >= k:
                kth_b = np.partition(squared_bm, k - 1, axis=1)[:, k - 1]
                reach_b = np.minimum(reach_b, kth_b * (1 + 2 * TOLERANCE))
            pair_b, pair_m = np.nonzero((squared_bm * (1 - TOLERANCE) <= reach_b[:, None]) & np.isfinite(squared_bm))
            exact_p = squared_of_pairs(self.query_bf[queries], pair_b, block_mf[tile.other], pair_m)
            of_tile = first_of_pairs(pair_b, rows_m[pair_m], exact_p, len(squared_bm), k)
            best, _ = nearer(Found(row_bk[queries], squared_bk[queries]), of_tile)
            row_bk[queries], squared_bk[queries] = best.row_bk, best.squared_bk
        return replace(self, found=Found(row_bk, squared_bk))

    def merged(self, other: Nearest) -> Nearest:
        """The state of the blocks of both; the queries are the same, and no block was added to both."""
        return replace(self, found=nearer(self.found, other.found)[0])
