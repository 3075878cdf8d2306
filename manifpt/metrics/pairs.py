"""Sums of functions of two vectors over all pairs of members of several sets, from pairs of blocks.

Legend: N M rows of two blocks, F features, S sets (sources, or the reals), K functions.

MMD and energy distance are made of such sums alone. One tile of inner products and distances serves all functions and
all pairs of sets; what is left of it is K x S x S numbers, which add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import tiles

__all__ = ["PairFunction", "PairSums"]

_OWN_ROWS = 1024  # of a block's pairs with itself, computed at a time for both orders


class PairFunction(Protocol):
    """A symmetric function of two vectors; equal ones have equal parameters."""

    def __call__(self, inner_nm: np.ndarray, squared_nm: np.ndarray) -> np.ndarray:
        """Its values, float64 [N, M], from the inner products and the squared distances."""
        ...


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over the ordered pairs of different images added so far.

    Attributes:
        functions: K of them.
        total_kss: float64 [K, S, S], symmetric.
        pairs_ss: int64 [S, S].
    """

    functions: tuple[PairFunction, ...]
    total_kss: np.ndarray
    pairs_ss: np.ndarray

    @classmethod
    def of(cls, functions: tuple[PairFunction, ...], sets: int) -> PairSums:
        """The state before any block, for S sets."""
        return cls(functions, np.zeros((len(functions), sets, sets)), np.zeros((sets, sets), np.int64))

    def add(self, one_nf: np.ndarray, set_n: np.ndarray, other_mf: np.ndarray, set_m: np.ndarray) -> PairSums:
        """The state with all pairs of two blocks of different images; each two blocks are added once.

        Args:
            one_nf, other_mf: float [N, F] and [M, F].
            set_n, set_m: int64 [N] and [M], the set of each row.

        Raises:
            ConfigError: a number that is not finite.
        """
        total_kss, member_sn, member_sm = self.total_kss.copy(), self._members(set_n), self._members(set_m)
        for tile in tiles(one_nf, other_mf):
            for place, function in enumerate(self.functions):
                values_nm = function(tile.inner_nm, tile.squared_nm)
                total_ss = member_sn[:, tile.one] @ values_nm @ member_sm[:, tile.other].T
                total_kss[place] += total_ss + total_ss.T
        pairs_ss = np.outer(member_sn.sum(axis=1), member_sm.sum(axis=1)).astype(np.int64)
        return replace(self, total_kss=total_kss, pairs_ss=self.pairs_ss + pairs_ss + pairs_ss.T)

    def add_own(self, block_nf: np.ndarray, set_n: np.ndarray) -> PairSums:
        """The state with all pairs within one block; each block is added once.

        Args:
            block_nf: float [N, F].
            set_n: int64 [N], the set of each row.

        Raises:
            ConfigError: a number that is not finite.
        """
        state = self
        for start in range(0, len(block_nf), _OWN_ROWS):
            own, after = slice(start, start + _OWN_ROWS), slice(start + _OWN_ROWS, None)
            state = state._add_square(block_nf[own], set_n[own])
            state = state.add(block_nf[own], set_n[own], block_nf[after], set_n[after])
        return state

    def _add_square(self, block_nf: np.ndarray, set_n: np.ndarray) -> PairSums:
        total_kss, member_sn = self.total_kss.copy(), self._members(set_n)
        for tile in tiles(block_nf, block_nf):
            is_own_nm = np.arange(len(block_nf))[tile.one, None] == np.arange(len(block_nf))[tile.other]
            for place, function in enumerate(self.functions):
                values_nm = np.where(is_own_nm, 0, function(tile.inner_nm, tile.squared_nm))
                total_ss = member_sn[:, tile.one] @ values_nm @ member_sn[:, tile.other].T
                total_kss[place] += (total_ss + total_ss.T) / 2  # of all tiles together; so rounding is symmetric too
        count_s = member_sn.sum(axis=1).astype(np.int64)
        pairs_ss = np.outer(count_s, count_s) - np.diag(count_s)
        return replace(self, total_kss=total_kss, pairs_ss=self.pairs_ss + pairs_ss)

    def merged(self, other: PairSums) -> PairSums:
        """The state of the pairs of both, none of which was added to both."""
        assert self.functions == other.functions
        return replace(self, total_kss=self.total_kss + other.total_kss, pairs_ss=self.pairs_ss + other.pairs_ss)

    def mean(self, function: PairFunction) -> np.ndarray:
        """Mean of one of the functions over the pairs of different images of two sets, float64 [S, S].

        Raises:
            ConfigError: two sets without a pair, such as a set of one image and itself.
        """
        if not self.pairs_ss.all():
            one, other = np.argwhere(self.pairs_ss == 0)[0]
            raise ConfigError(f"The sets {one} and {other} have no pair of images; each set needs 2 images or more.")
        return self.total_kss[self.functions.index(function)] / self.pairs_ss

    def _members(self, set_n: np.ndarray) -> np.ndarray:
        """float64 [S, N], 1 where a row is a set's."""
        return (np.arange(len(self.pairs_ss))[:, None] == set_n).astype(np.float64)
