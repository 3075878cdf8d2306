"""How far generated and real images are from each other at least: a bound on W1 from the norms of artifacts.

Legend: N images of a block.

The paper relates its definitions to integral probability metrics; its exact statement isn't known to us. What follows
is our derivation. Let P_G and P_R be the distributions of the generated images and of the reference, each image with
equal weight, and pi any coupling of them. For every generated x and real r, |x - r| >= min over reals r' of |x - r'|
= |a(x)|, the norm of its artifact. So

    E_pi |x - r| >= E |a(x)|   for all pi,   hence   W1(P_G, P_R) >= mean |a(x)|.

The same with the sets exchanged: W1 is at least the mean norm of the *reverse* artifacts, a real less its nearest
generated image, which the paper doesn't have. The bound is reached where the nearest reals of all generated images,
together, are distributed as the reals are; a generator that copies one real has a bound of 0 and a W1 that is not.

It holds for the nearest real alone, with a reference that has no image left out, not for other estimates of x*. And
it says W1 to the reference, not to the distribution that the reference was drawn from: the reals that aren't in it
have artifacts too. Compare a generator's mean norm with that of held-out reals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError

__all__ = ["MeanNorm", "wasserstein_bound"]


@dataclass(frozen=True, slots=True)
class MeanNorm:
    """The mean of the norms added so far.

    Attributes:
        total: their sum, in the unit of the embeddings.
        count: how many.
    """

    total: float = 0.0
    count: int = 0

    def add(self, distance_n: np.ndarray) -> MeanNorm:
        """The state with float [N] more norms, such as the column `distance` of artifact shards."""
        return MeanNorm(self.total + float(np.sum(distance_n, dtype=np.float64)), self.count + len(distance_n))

    def merged(self, other: MeanNorm) -> MeanNorm:
        """The state of the norms of both."""
        return MeanNorm(self.total + other.total, self.count + other.count)

    def result(self) -> float:
        """The mean.

        Raises:
            ConfigError: no norms.
        """
        if not self.count:
            raise ConfigError("There is no artifact to take a mean norm of; add images.")
        return self.total / self.count


def wasserstein_bound(artifacts: MeanNorm, reverse: MeanNorm) -> float:
    """What W1 of the generated images and the reference is at least, in the unit of the embeddings.

    Args:
        artifacts: distances of all generated images to their nearest reals.
        reverse: distances of all reals to their nearest generated images.

    Raises:
        ConfigError: no images on a side.
    """
    return max(artifacts.result(), reverse.result())
