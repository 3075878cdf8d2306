"""The soft projection in closed form: what of x a Gaussian model of the reals takes for noise.

Legend: B queries, N reference images, D dimensions, M images of a block, T dimensions of a tile.

Let the reals be Gaussian with mean mu and covariance C, and let x be one of them plus noise of standard deviation
sigma. The posterior mean of the real (Tweedie: x + sigma^2 times the score of the noisy reals) is x* = x - r with

    r(x) = sigma^2 (C + sigma^2 I)^-1 (x - mu),

so directions in which reals hardly vary pass, and those in which they vary much are taken out: a whitening that stops
at sigma. The nearest real is the crudest estimate of the same point. Own derivation; not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manifpt.errors import ConfigError
from manifpt.projection import Projection, Rows, projection_without_sample

__all__ = ["Moments", "SoftProjector", "check_dims", "moments_of"]

_MOST_DIMS = 16_384  # the matrix takes 8 D^2 bytes, 2 GiB, and twice that while it is inverted
_DIGITS_LEFT = 10.0  # of what is left when a real is taken out, times the rounding
_BLOCK_BYTES = 64 << 20
_TILE_DIMS = 4_096


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and scatter of some images; those of two disjoint sets merge into those of both.

    Attributes:
        count: images.
        mean_d: float64 [D].
        scatter_dd: float64 [D, D], sum of (y - mean)(y - mean)^T; of a tile, its rows and columns.
    """

    count: int
    mean_d: np.ndarray
    scatter_dd: np.ndarray

    def merged(self, other: Moments) -> Moments:
        """Of both (Chan, Golub and LeVeque 1979, updating formulae)."""
        count = self.count + other.count
        if not count:
            return self
        shift_d = other.mean_d - self.mean_d
        weight = self.count * other.count / count
        scatter_dd = self.scatter_dd + other.scatter_dd + weight * np.outer(shift_d, shift_d)
        return Moments(count, self.mean_d + shift_d * (other.count / count), scatter_dd)


def moments_of(blocks: Callable[[], Iterator[np.ndarray]], dim: int, tile_dims: int = _TILE_DIMS) -> Moments:
    """Mean and scatter, in a stream over blocks, one tile of the matrix after the other.

    All in float64: directions in which reals hardly vary are those that pass, and float32 products would leave nothing
    but rounding of them.

    Args:
        blocks: the images anew at each call, float32 [M, D].
        dim: D.
        tile_dims: T; 2 T^2 numbers are held besides the result.
    """
    count, mean_d = 0, np.zeros(dim)
    for block_md in blocks():
        count += len(block_md)
        mean_d += (block_md.mean(axis=0, dtype=np.float64) - mean_d) * (len(block_md) / count)
    scatter_dd = np.zeros((dim, dim))
    tiles = [slice(start, min(start + tile_dims, dim)) for start in range(0, dim, tile_dims)]
    for row in tiles:
        for column in (tile for tile in tiles if tile.start >= row.start):
            for block_md in blocks():
                left, right = (torch.from_numpy(block_md[:, t] - mean_d[t]) for t in (row, column))
                scatter_dd[row, column] += (left.T @ right).numpy()
            scatter_dd[column, row] = scatter_dd[row, column].T
    return Moments(count, mean_d, scatter_dd)


def check_dims(dim: int) -> None:
    """Raises:
    ConfigError: D is too large for a matrix D x D.
    """
    if dim > _MOST_DIMS:
        raise ConfigError(
            f"A soft projection holds a matrix of {dim:,} x {dim:,} numbers: choose a space of at most "
            f"{_MOST_DIMS:,}, such as rgb with --size-px 64."
        )


class SoftProjector:
    """x* = x - sigma^2 (C + sigma^2 I)^-1 (x - mu), C and mu of the reference (normalised by N)."""

    def __init__(
        self,
        embeddings_of: Callable[[Rows], np.ndarray],
        count: int,
        dim: int,
        sigma: float,
        device: str = "cpu",
    ) -> None:
        """Args:
            embeddings_of: reference rows -> float32 [M, D].
            count: N.
            dim: D.
            sigma: in the embedding's units.
            device: of the products for queries.

        Raises:
            ConfigError: D is too large for a matrix D x D, or sigma too small for the precision of the covariance.
        """
        check_dims(dim)
        step = max(1, _BLOCK_BYTES // (4 * dim))

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, count, step):
                yield embeddings_of(slice(start, min(start + step, count)))

        moments = moments_of(blocks, dim)
        self._embeddings_of, self._count, self._sigma, self._mean_d = embeddings_of, count, sigma, moments.mean_d
        matrix_dd = torch.from_numpy(moments.scatter_dd)
        del moments  # a matrix less in memory
        matrix_dd /= count
        matrix_dd.diagonal().add_(sigma**2)
        # Of the inverse, relative to what it is largest: the trace is at least the largest eigenvalue.
        self._rounding = np.finfo(np.float64).eps * float(matrix_dd.diagonal().sum()) / sigma**2
        factor_dd, failed = torch.linalg.cholesky_ex(matrix_dd)
        del matrix_dd
        if failed:
            raise ConfigError(f"--sigma {sigma} is below the rounding of the covariance: choose a larger one.")
        self._inverse_dd = torch.cholesky_inverse(factor_dd).to(device)

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]. Reals that a query must not see are taken out of mean and covariance."""
        centred_bd = torch.from_numpy(embeddings_bd - self._mean_d).to(self._inverse_dd.device)
        artifact_bd = (self._sigma**2 * (centred_bd @ self._inverse_dd)).float().cpu().numpy()
        lacking_b = np.zeros(len(embeddings_bd), bool)
        for b, rows in enumerate(excluded or ()):
            if len(rows) >= self._count:
                lacking_b[b], artifact_bd[b] = True, np.nan
            elif len(rows):
                artifact_bd[b] = self._without(embeddings_bd[b], rows)
        return projection_without_sample(artifact_bd, lacking_b)

    def _without(self, query_d: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The residual of one query, as if the reference had never held some rows.

        With R rows out, mu' is the mean of the rest, and N C' = N C - U U^T, the columns of U being the R centred rows
        and sqrt(N - R) (mu' - mu). So (C' + sigma^2 I)^-1 is a change of rank R + 1 (Woodbury). C' keeps the
        normaliser N.

        Raises:
            ConfigError: nothing but rounding would be left of it.
        """
        out_rd = self._embeddings_of(rows).astype(np.float64)
        left = self._count - len(rows)
        mean_d = (self._count * self._mean_d - out_rd.sum(axis=0)) / left
        change_ud = np.vstack([out_rd - self._mean_d, left**0.5 * (mean_d - self._mean_d)]) / self._count**0.5
        change, query = (torch.from_numpy(x).to(self._inverse_dd.device) for x in (change_ud, query_d - mean_d))
        solved_d = self._inverse_dd @ query
        solved_du = self._inverse_dd @ change.T
        inner_uu = torch.eye(len(change), dtype=torch.float64, device=change.device) - change @ solved_du
        if float(torch.linalg.eigvalsh(inner_uu)[0]) < _DIGITS_LEFT * self._rounding:
            raise ConfigError(
                f"--sigma {self._sigma} is too small to leave a real image of the reference out: choose a larger one."
            )
        solved_d += solved_du @ torch.linalg.solve(inner_uu, change @ solved_d)
        return (self._sigma**2 * solved_d).float().cpu().numpy()
