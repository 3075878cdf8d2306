"""Inner products and squared distances of all pairs of two sets of vectors, a tile at a time.

Legend: N M rows of two sets, or of a tile of them; F features; P pairs.

A tile's distances come from one matrix product, |x|^2 + |y|^2 - 2 x.y, whose rounding is relative to the norms: it
would hide that a generator copies. So the pairs whose rounding could matter are computed again from differences. All
distances are then good to `TOLERANCE`, and equal rows are 0 apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifpt.errors import ConfigError
from manifpt.search.flat import rounding

__all__ = ["TOLERANCE", "Tile", "finite", "squared_of_pairs", "tiles"]

TOLERANCE = 2.0**-30  # relative, of a tile's squared distances
_TILE_ROWS = 1024  # a tile of float64 numbers takes 8 MiB
_PAIR_BYTES = 16 << 20  # of differences at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of one set by rows of the other.

    Attributes:
        one, other: which rows.
        inner_nm: float64 [N, M], x.y.
        squared_nm: float64 [N, M], |x - y|^2, not below 0 and good to `TOLERANCE`.
    """

    one: slice
    other: slice
    inner_nm: np.ndarray
    squared_nm: np.ndarray


def tiles(one_nf: np.ndarray, other_mf: np.ndarray) -> Iterator[Tile]:
    """All pairs, in tiles of at most 1024 x 1024; computed in float64.

    Memory is that of a few tiles, and of the rows of two in float64.

    Args:
        one_nf, other_mf: float [N, F] and [M, F].

    Raises:
        ConfigError: a number that is not finite.
    """
    for start in range(0, len(one_nf), _TILE_ROWS):
        one = slice(start, min(start + _TILE_ROWS, len(one_nf)))
        rows_nf = finite(one_nf[one])
        # Distances don't change under a shift, and their rounding shrinks with the norms.
        shift_f = rows_nf.mean(axis=0)
        centred_nf = rows_nf - shift_f
        norm_n = np.linalg.norm(centred_nf, axis=1)
        for first in range(0, len(other_mf), _TILE_ROWS):
            other = slice(first, min(first + _TILE_ROWS, len(other_mf)))
            others_mf = finite(other_mf[other])
            centred_mf = others_mf - shift_f
            norm_m = np.linalg.norm(centred_mf, axis=1)
            product_nm = centred_nf @ centred_mf.T
            squared_nm = (norm_n**2)[:, None] + norm_m**2 - 2 * product_nm
            error_nm = rounding(rows_nf.shape[1], norm_n[:, None] + norm_m, unit=2.0**-53)
            near_n, near_m = np.nonzero(error_nm >= TOLERANCE / 2 * squared_nm)
            squared_nm[near_n, near_m] = squared_of_pairs(rows_nf, near_n, others_mf, near_m)
            inner_nm = product_nm + (rows_nf @ shift_f)[:, None] + centred_mf @ shift_f
            yield Tile(one, other, inner_nm, squared_nm)


def squared_of_pairs(one_nf: np.ndarray, row_p: np.ndarray, other_mf: np.ndarray, other_p: np.ndarray) -> np.ndarray:
    """Squared distances of some pairs, by differences in float64: the same for a pair whatever the others are.

    `manifpt.search.Vectors` does that for float32 rows, which here may be float64.

    Args:
        one_nf, other_mf: float [N, F] and [M, F].
        row_p, other_p: int64 [P], their rows.

    Returns:
        squared_p: float64 [P].
    """
    squared_p = np.empty(len(row_p))
    step = max(1, _PAIR_BYTES // (8 * max(1, one_nf.shape[1])))
    for start in range(0, len(row_p), step):
        part = slice(start, start + step)
        difference_pf = one_nf[row_p[part]].astype(np.float64) - other_mf[other_p[part]]
        squared_p[part] = np.square(difference_pf, out=difference_pf).sum(axis=1)
    return squared_p


def finite(features_nf: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """The features in float64, or in another dtype.

    Raises:
        ConfigError: one is no finite number.
    """
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        rows_nf = np.ascontiguousarray(features_nf, dtype)
    if not np.isfinite(rows_nf).all():
        raise ConfigError(
            "A feature or a spectrum is no finite number: the network that made it is broken; train it again."
        )
    return rows_nf
