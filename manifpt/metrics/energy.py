"""The energy distance of sets of vectors: how much farther images of two sets are from each other than from their own.

Legend: N M rows, S sets.

It is MMD^2 with the kernel -|x - y| (Sejdinovic et al. 2013, theorem 22), has no parameter, and is 0 for equal
distributions only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifpt.metrics.mmd import squared_mmd
from manifpt.metrics.pairs import PairSums

__all__ = ["NegativeDistance", "energy_distance"]


@dataclass(frozen=True, slots=True)
class NegativeDistance:
    """-|x - y|, Euclidean."""

    def __call__(self, inner_nm: np.ndarray, squared_nm: np.ndarray) -> np.ndarray:
        """See `PairFunction`."""
        values_nm: np.ndarray = -np.sqrt(squared_nm)
        return values_nm


def energy_distance(sums: PairSums) -> np.ndarray:
    """2 E|x - y| - E|x - x'| - E|y - y'| between all sets, unbiased (Szekely and Rizzo 2013, section 2).

    Means over pairs of different images, as for MMD: of sets that are alike it is 0 on average, and may be below 0, if
    images are independent; those that were made together are nearer to each other, and make it larger. The
    energy distance of two sets as distributions, which SciPy's one-dimensional one is the square root of, also counts
    each image with itself; it is larger, by E|x - x'| / N + E|y - y'| / M.

    Args:
        sums: of all pairs, `NegativeDistance()` among their functions.

    Returns:
        energy_ss: float64 [S, S], in the unit of the vectors, symmetric, 0 on the diagonal.

    Raises:
        ConfigError: a set of fewer than 2 images.
    """
    return squared_mmd(sums, NegativeDistance())
