"""Mean and covariance of sets of features, which can be added to and merged.

Legend: N images, F features, K rows of a root; K <= F.

A covariance S is held as a *root* R [K, F] with S = R^T R: a set's centred rows over sqrt(N - 1), or where N > F the
triangle of their QR decomposition. So 30 images of 2,048 features need no matrix of 2,048 x 2,048. Roots also merge
without a loss of digits: stacked, they are a root of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import finite

__all__ = ["Moments", "Scatter", "moments_of"]


@dataclass(frozen=True, slots=True)
class Moments:
    """A Gaussian.

    Attributes:
        mean_f: float64 [F].
        root_kf: float64 [K, F]; the covariance is root^T root.
    """

    mean_f: np.ndarray
    root_kf: np.ndarray


@dataclass(frozen=True, slots=True)
class Scatter:
    """Mean and scatter of the images added so far; 8 F min(N, F) bytes.

    Attributes:
        count: N.
        mean_f: float64 [F].
        root_kf: float64 [K, F]; root^T root is the sum of the outer products of the centred rows.
    """

    count: int
    mean_f: np.ndarray
    root_kf: np.ndarray

    @classmethod
    def of(cls, features: int) -> Scatter:
        """The state before any block, of F features."""
        return cls(0, np.zeros(features), np.empty((0, features)))

    def add(self, block_nf: np.ndarray) -> Scatter:
        """The state with float [N, F] more images.

        Raises:
            ConfigError: a number that is not finite.
        """
        rows_nf = finite(block_nf)
        if not len(rows_nf):
            return self
        # From the first row on: what is constant is then centred to zero exactly, and large offsets cost no digits.
        from_first_nf = rows_nf - rows_nf[0]
        shift_f = from_first_nf.mean(axis=0)
        return self.merged(Scatter(len(rows_nf), rows_nf[0] + shift_f, _triangle(from_first_nf - shift_f)))

    def merged(self, other: Scatter) -> Scatter:
        """The state of the images of both (Chan, Golub and LeVeque 1983, eq. 2.1; as a row of the root, for all F)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        gap_f = other.mean_f - self.mean_f
        between_f = gap_f * math.sqrt(self.count * other.count / count)
        root_kf = _triangle(np.concatenate([self.root_kf, other.root_kf, between_f[None]]))
        return Scatter(count, self.mean_f + gap_f * (other.count / count), root_kf)

    def moments(self) -> Moments:
        """Mean and unbiased covariance.

        Raises:
            ConfigError: fewer than two images.
        """
        if self.count < 2:
            raise ConfigError(f"A covariance needs two images or more, and there are {self.count}; add images.")
        return Moments(self.mean_f, self.root_kf / math.sqrt(self.count - 1))


def _triangle(rows_nf: np.ndarray) -> np.ndarray:
    """At most F rows with the same scatter; the rows themselves where they are no more."""
    if len(rows_nf) <= rows_nf.shape[1]:
        return rows_nf
    (root_kf,) = linalg.qr(rows_nf, mode="r", check_finite=False)
    triangle_ff: np.ndarray = root_kf[: rows_nf.shape[1]]
    return triangle_ff


def moments_of(features_nf: np.ndarray) -> Moments:
    """Mean and unbiased covariance of a set.

    Args:
        features_nf: float [N, F], N at least 2.

    Raises:
        ConfigError: fewer rows, or numbers that are not finite.
    """
    return Scatter.of(features_nf.shape[1]).add(features_nf).moments()
