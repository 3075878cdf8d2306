"""Precision, recall, density and coverage: do generated images lie among the reals, and reals among the generated?

Legend: N reals, M generated images, or those of one block; F features; k neighbours.

A set's manifold is estimated by balls: around each member, as far as its k-th nearest other member.

The paper relates its fingerprint to precision; its exact wording isn't known to us. What follows is our derivation:
with the nearest real as projection, F_G = {0} if and only if every generated image is one of the reals, the estimate
of the manifold. Each then lies in that real's ball, so precision is 1. Recall may be as low as it likes: a generator
that copies one real has F_G = {0} too. And precision of 1 doesn't make a fingerprint zero, since balls have an
inside; only in the limit of many reals, where they shrink to the support, do both say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import TOLERANCE, Tile, squared_of_pairs, tiles
from manifpt.search import Found

__all__ = ["Balls", "Prdc"]


@dataclass(frozen=True, slots=True)
class Prdc:
    """How two sets overlap.

    Attributes:
        precision: share of generated images that lie in a real's ball (Kynkaanniemi et al. 2019, eq. 2).
        recall: share of reals that lie in a generated image's ball (the same with the sets exchanged).
        density: mean number of real balls around a generated image, over k; above 1 where reals are dense (Naeem et al.
            2020, section 3).
        coverage: share of reals with a generated image in their ball (the same).
        k: of the balls; the values depend on it, and on N and M.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


@dataclass(frozen=True, slots=True)
class Balls:
    """Who lies in whose ball, among the pairs of blocks added so far.

    A ball is closed, as in Kynkaanniemi et al. 2019, eq. 1. The `prdc` package has open ones, which differ where a
    distance is just a radius, as happens when a generator copies. Such a tie is decided by float64 differences, so it
    doesn't depend on how the sets are cut.

    Attributes:
        real_n: float64 [N], squared radii of the reals' balls.
        generated_m: float64 [M], of the generated images'.
        balls_m: int64 [M], real balls in which a generated image lies.
        is_recalled_n: bool [N], whether a real lies in a generated image's ball.
        is_covered_n: bool [N], whether a generated image lies in a real's ball.
        k: neighbours that the radii are made of.
    """

    real_n: np.ndarray
    generated_m: np.ndarray
    balls_m: np.ndarray
    is_recalled_n: np.ndarray
    is_covered_n: np.ndarray
    k: int

    @classmethod
    def of(cls, real: Found, generated: Found) -> Balls:
        """The state before any pair of blocks.

        Args:
            real: the k nearest other reals of all N.
            generated: the k nearest other generated images of all M.

        Raises:
            ConfigError: a set of k images or fewer.
        """
        k = real.row_bk.shape[1]
        assert generated.row_bk.shape[1] == k
        radii = real.squared_bk[:, -1], generated.squared_bk[:, -1]
        for name, squared_n in zip(("real", "generated"), radii, strict=True):
            if not len(squared_n) or not np.isfinite(squared_n).all():
                raise ConfigError(
                    f"{len(squared_n)} {name} images have no balls of {k} neighbours; add images or lower k."
                )
        count, others = len(radii[0]), len(radii[1])
        return cls(*radii, np.zeros(others, np.int64), np.zeros(count, bool), np.zeros(count, bool), k)

    def add(self, real_nf: np.ndarray, row_n: np.ndarray, generated_mf: np.ndarray, row_m: np.ndarray) -> Balls:
        """The state with the pairs of one block of each set; each pair of blocks is added once.

        Args:
            real_nf, generated_mf: float32 [N, F] and [M, F], as their neighbours were searched.
            row_n, row_m: int64 [N] and [M], places in `real_n` and `generated_m`.

        Raises:
            ConfigError: a number that is not finite.
        """
        balls_m = self.balls_m.copy()
        is_recalled_n, is_covered_n = self.is_recalled_n.copy(), self.is_covered_n.copy()
        for tile in tiles(real_nf, generated_mf):
            real, generated = row_n[tile.one], row_m[tile.other]
            sides = real_nf[tile.one], generated_mf[tile.other]
            is_in_real_nm = _is_within(tile, *sides, self.real_n[real][:, None])
            is_in_generated_nm = _is_within(tile, *sides, self.generated_m[generated][None])
            balls_m[generated] += is_in_real_nm.sum(axis=0)
            is_covered_n[real] |= is_in_real_nm.any(axis=1)
            is_recalled_n[real] |= is_in_generated_nm.any(axis=1)
        return replace(self, balls_m=balls_m, is_recalled_n=is_recalled_n, is_covered_n=is_covered_n)

    def merged(self, other: Balls) -> Balls:
        """The state of the pairs of both, none of which was added to both."""
        return replace(
            self,
            balls_m=self.balls_m + other.balls_m,
            is_recalled_n=self.is_recalled_n | other.is_recalled_n,
            is_covered_n=self.is_covered_n | other.is_covered_n,
        )

    def result(self) -> Prdc:
        """The four numbers, once all pairs are in."""
        return Prdc(
            precision=float(np.mean(self.balls_m > 0)),
            recall=float(np.mean(self.is_recalled_n)),
            density=float(np.mean(self.balls_m) / self.k),
            coverage=float(np.mean(self.is_covered_n)),
            k=self.k,
        )


def _is_within(tile: Tile, one_nf: np.ndarray, other_mf: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """Whether distances are at most some radii, whose squares broadcast to [N, M]: bool [N, M], exact."""
    squared_nm = np.broadcast_to(squared, tile.squared_nm.shape)
    is_within_nm = tile.squared_nm <= squared_nm
    unsure_n, unsure_m = np.nonzero(np.abs(tile.squared_nm - squared_nm) <= 2 * TOLERANCE * squared_nm)
    exact_p = squared_of_pairs(one_nf, unsure_n, other_mf, unsure_m)
    is_within_nm[unsure_n, unsure_m] = exact_p <= squared_nm[unsure_n, unsure_m]
    return is_within_nm
