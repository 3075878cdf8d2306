"""The sliced Wasserstein distance: the mean over directions of the exact one-dimensional distance along them.

Legend: N images, F features, L directions.

In one dimension W1 needs sorted numbers only. A state keeps each image's place along each direction, so nothing is
approximated but the mean over all directions: 1,000 images and 128 directions take 512 kB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import wasserstein_distance

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import finite

__all__ = ["Slices", "directions", "sliced_wasserstein"]


@dataclass(frozen=True, slots=True)
class Slices:
    """Where the images added so far lie along some directions.

    Attributes:
        features: F.
        seed: of the directions; sets of two seeds can't be compared.
        place_nl: float32 [N, L], in any order of images. 4 N L bytes.
    """

    features: int
    seed: int
    place_nl: np.ndarray

    @classmethod
    def of(cls, features: int, seed: int, count: int = 128) -> Slices:
        """The state before any block, of L = `count` directions; the error of their mean falls as 1 / sqrt(L)."""
        return cls(features, seed, np.empty((0, count), np.float32))

    def add(self, block_nf: np.ndarray) -> Slices:
        """The state with float [N, F] more images.

        Raises:
            ConfigError: a number that is not finite.
        """
        direction_lf = directions(self.features, self.seed, self.place_nl.shape[1])
        place_nl = (finite(block_nf) @ direction_lf.T).astype(np.float32)
        return replace(self, place_nl=np.concatenate([self.place_nl, place_nl]))

    def merged(self, other: Slices) -> Slices:
        """The state of the images of both."""
        assert (self.features, self.seed) == (other.features, other.seed)
        return replace(self, place_nl=np.concatenate([self.place_nl, other.place_nl]))


def directions(features: int, seed: int, count: int) -> np.ndarray:
    """Unit vectors, uniform on the sphere: float64 [L, F]."""
    drawn_lf = np.random.default_rng(seed).standard_normal((count, features))
    unit_lf: np.ndarray = drawn_lf / np.linalg.norm(drawn_lf, axis=1, keepdims=True)
    return unit_lf


def sliced_wasserstein(one: Slices, other: Slices) -> float:
    """The mean of W1 along the directions (Bonneel et al. 2015, section 2.3, with p = 1), of sets of any two sizes.

    A place along a direction is 1-Lipschitz, so this is never above W1.

    Returns:
        In the unit of the vectors.

    Raises:
        ConfigError: a set without images.
    """
    assert (one.features, one.seed) == (other.features, other.seed)
    if not len(one.place_nl) or not len(other.place_nl):
        raise ConfigError("A distance of sets needs an image or more in each; add images.")
    pairs = zip(one.place_nl.T, other.place_nl.T, strict=True)
    return float(np.mean([wasserstein_distance(one_n, other_m) for one_n, other_m in pairs]))
