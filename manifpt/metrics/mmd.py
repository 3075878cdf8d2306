"""The maximum mean discrepancy (MMD) of sets of vectors: KID's polynomial kernel, and a Gaussian one.

Legend: N M rows, F features, S sets, P pairs.

An integral probability metric: the largest difference of means that a function of norm 1 in the kernel's space can have
between two distributions (Gretton et al. 2012, lemma 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.pairs import PairFunction, PairSums
from manifpt.metrics.tiles import tiles

__all__ = ["CubicKernel", "GaussianKernel", "median_distance", "squared_mmd"]


@dataclass(frozen=True, slots=True)
class CubicKernel:
    """(x.y / F + 1)^3, the kernel of KID (Binkowski et al. 2018, section 4).

    Attributes:
        features: F.
    """

    features: int

    def __call__(self, inner_nm: np.ndarray, squared_nm: np.ndarray) -> np.ndarray:
        """See `PairFunction`."""
        cubed_nm: np.ndarray = (inner_nm / self.features + 1) ** 3
        return cubed_nm


@dataclass(frozen=True, slots=True)
class GaussianKernel:
    """exp(-|x - y|^2 / (2 bandwidth^2)).

    Its MMD is 0 for equal distributions only; the cubic kernel's is 0 wherever the first three moments are equal.

    Attributes:
        bandwidth: in the unit of the vectors, above 0; `median_distance` is the usual one.
    """

    bandwidth: float

    def __call__(self, inner_nm: np.ndarray, squared_nm: np.ndarray) -> np.ndarray:
        """See `PairFunction`."""
        values_nm: np.ndarray = np.exp(squared_nm / (-2 * self.bandwidth**2))
        return values_nm


def median_distance(sample_nf: np.ndarray) -> float:
    """The median heuristic: the median distance of two different ones of some vectors (Gretton et al. 2012, section 8).

    A bandwidth has to be known before sums begin, and values of two bandwidths can't be compared. So it is taken once,
    from one sample of all sets together; 1,000 rows are enough, and take 4 MiB of distances.

    Args:
        sample_nf: float [N, F], N at least 2.

    Raises:
        ConfigError: fewer rows, a number that is not finite, or rows that are all equal.
    """
    parts = []
    for tile in tiles(sample_nf, sample_nf):
        rows_n, rows_m = (np.arange(len(sample_nf))[side] for side in (tile.one, tile.other))
        parts.append(tile.squared_nm[rows_n[:, None] < rows_m])
    squared_p = np.concatenate(parts) if parts else np.empty(0)
    squared_p = squared_p[squared_p > 0]  # a generator that copies has many artifacts of zero
    if not len(squared_p):
        raise ConfigError("A bandwidth needs two different images; draw more, or leave out copies.")
    return float(np.median(np.sqrt(squared_p)))


def squared_mmd(sums: PairSums, kernel: PairFunction) -> np.ndarray:
    """Unbiased estimates of MMD^2 between all sets (Gretton et al. 2012, lemma 6, eq. 3).

    E k(x, x') + E k(y, y') - 2 E k(x, y), means over pairs of different images. Of sets that are alike it is 0 on
    average, so it may be below 0. KID is this of Inception features, as a mean over subsets; here nothing is drawn.

    Args:
        sums: of all pairs, the kernel among their functions.
        kernel: which.

    Returns:
        squared_ss: float64 [S, S], symmetric, 0 on the diagonal.

    Raises:
        ConfigError: a set of fewer than 2 images.
    """
    mean_ss = sums.mean(kernel)
    within_s = np.diagonal(mean_ss)
    squared_ss: np.ndarray = within_s[:, None] + within_s - 2 * mean_ss
    return squared_ss
