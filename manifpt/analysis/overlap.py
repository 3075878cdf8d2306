"""How a generator's images lie among the reals, in one space: precision and recall, distances of distributions, bounds.

Legend: N reals, M images of a generator, D dimensions.

Everything here compares two sets. What each number means, and whose it is, stands in the metric's own file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.energy import NegativeDistance, energy_distance
from manifpt.metrics.frechet import frechet_distance
from manifpt.metrics.mmd import CubicKernel, GaussianKernel, median_distance, squared_mmd
from manifpt.metrics.moments import Moments, moments_of
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.pairs import PairFunction, PairSums
from manifpt.metrics.prdc import Balls
from manifpt.metrics.sliced import Slices, sliced_wasserstein
from manifpt.metrics.wasserstein import MeanNorm, wasserstein_bound
from manifpt.search import Found

__all__ = ["Reals", "overlap"]

_NEIGHBORS = 5  # of precision and recall's balls: Naeem et al. 2020's choice
_BANDWIDTH_ROWS = 500


@dataclass(frozen=True, slots=True)
class Reals:
    """What all comparisons with the same reals share.

    Attributes:
        real_nd: float32 [N, D].
        found: of each its nearest others.
        kernels: cubic, Gaussian and negative distance.
        sums: of the kernels, over pairs of reals.
        moments: their Gaussian.
        slices: where they lie along random directions.
    """

    real_nd: np.ndarray
    found: Found
    kernels: tuple[PairFunction, ...]
    sums: PairSums
    moments: Moments
    slices: Slices

    @classmethod
    def of(cls, real_nd: np.ndarray, seed: int) -> Reals:
        """Args:
            real_nd: float32 [N, D].
            seed: of directions.

        Raises:
            ConfigError: too few reals, or reals that are all equal.
        """
        if len(real_nd) <= _NEIGHBORS:
            raise ConfigError(
                f"The reference has {len(real_nd)} images, and precision and recall need more than {_NEIGHBORS}."
            )
        dims = real_nd.shape[1]
        kernels = (
            CubicKernel(dims),
            GaussianKernel(median_distance(real_nd[:: -(-len(real_nd) // _BANDWIDTH_ROWS)])),
            NegativeDistance(),
        )
        count = len(real_nd)
        return cls(
            real_nd=real_nd,
            found=_nearest_others(real_nd),
            kernels=kernels,
            sums=PairSums.of(kernels, 2).add_own(real_nd, np.zeros(count, np.int64)),
            moments=moments_of(real_nd),
            slices=Slices.of(dims, seed).add(real_nd),
        )


def overlap(reals: Reals, embedding_md: np.ndarray, distance_m: np.ndarray | None) -> dict[str, Any]:
    """One source against the reals.

    Args:
        reals: N of the reference.
        embedding_md: float32 [M, D].
        distance_m: float [M], to the nearest of the whole reference; None: not known, since the artifacts are of
            another projection. The bound then has one side only.

    Returns:
        By metric; `{"images": M}` alone where there are too few.
    """
    count, found = len(embedding_md), {"images": len(embedding_md)}
    if count <= _NEIGHBORS:
        return found
    rows_n, rows_m = np.arange(len(reals.real_nd)), np.arange(count)
    balls = Balls.of(reals.found, _nearest_others(embedding_md))
    of_set_n, of_set_m = np.zeros(len(rows_n), np.int64), np.ones(count, np.int64)
    sums = PairSums.of(reals.kernels, 2).add_own(embedding_md, of_set_m)
    sums = sums.add(reals.real_nd, of_set_n, embedding_md, of_set_m).merged(reals.sums)
    reverse_n = np.sqrt(Nearest.to(reals.real_nd, 1).add(embedding_md, rows_m).found.squared_bk[:, 0])
    reverse = MeanNorm().add(reverse_n)
    artifacts = None if distance_m is None else MeanNorm().add(distance_m)
    cubic, gaussian, _ = reals.kernels
    return found | {
        **asdict(balls.add(reals.real_nd, rows_n, embedding_md, rows_m).result()),
        "kid": float(squared_mmd(sums, cubic)[0, 1]),
        "mmd_gaussian": float(squared_mmd(sums, gaussian)[0, 1]),
        "energy_distance": float(energy_distance(sums)[0, 1]),
        "frechet_distance": frechet_distance(reals.moments, moments_of(embedding_md)),
        "sliced_wasserstein": sliced_wasserstein(
            reals.slices, Slices.of(reals.slices.features, reals.slices.seed).add(embedding_md)
        ),
        "mean_artifact_norm": None if artifacts is None else artifacts.result(),
        "mean_reverse_norm": reverse.result(),
        "wasserstein_bound": reverse.result() if artifacts is None else wasserstein_bound(artifacts, reverse),
    }


def _nearest_others(rows_nd: np.ndarray) -> Found:
    own_n = np.arange(len(rows_nd))
    return Nearest.to(rows_nd, _NEIGHBORS, own_n).add(rows_nd, own_n).found
