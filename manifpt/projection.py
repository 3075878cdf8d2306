"""The projection x* of an image onto the reference: its nearest real image, proved exact.

Legend: B queries, N reference images, D dimensions.

What is returned is the nearest of all N float32 embeddings by float64 differences, for every query, with ties going to
the smallest image id; `manifpt.search` says how it is found without looking at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from manifpt.search import Choice, Found, Rows, make_search
from manifpt.search.vectors import nearer

__all__ = ["NearestProjector", "Projection", "Projector", "Rows", "nearer_of", "norms", "projection_of",
           "projection_without_sample"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Projection:
    """Where B images come to lie on the reference.

    Attributes:
        neighbor_b: int64 [B], row of the reference image that is x*; -1 where x* is no sample, or there is none.
        distance_b: float32 [B], Euclidean, between x and x*.
        second_b: float32 [B], Euclidean, to the nearest real that is farther than the nearest, since a reference may
            hold one real twice; infinite where there is none or it isn't known.
        artifact_bd: float32 [B, D], phi(x) - phi(x*); NaN where there is no x*.
        first_b: float32 [B], to the nearest real; None: it is x*.
        lacking_b: bool [B], where the reference has nothing that x may be projected onto; None: where `neighbor_b` < 0.
    """

    neighbor_b: np.ndarray
    distance_b: np.ndarray
    second_b: np.ndarray
    artifact_bd: np.ndarray
    first_b: np.ndarray | None = None
    lacking_b: np.ndarray | None = None

    @property
    def near_copy_b(self) -> np.ndarray:
        """bool [B], whether the nearest real is a re-encoded or retouched copy of x.

        It is then less than half as far as the next one; of independent images the ratio is near one. Such an
        image is marked, not kept out, since only a person can tell which it is.
        """
        first_b = self.distance_b if self.first_b is None else self.first_b
        return (first_b < _NEAR_COPY * self.second_b) & np.isfinite(self.second_b)

    @property
    def is_lacking_b(self) -> np.ndarray:
        """bool [B], where there is no x*."""
        return self.neighbor_b < 0 if self.lacking_b is None else self.lacking_b


_NEAR_COPY = 0.5
_MOST_COPIES = 512  # of one real in a reference, beyond which the next one isn't sought


def projection_without_sample(artifact_bd: np.ndarray, lacking_b: np.ndarray | None = None) -> Projection:
    """A projection whose x* = x - a is no image of the reference: float32 [B, D], and bool [B] where there is none."""
    count = len(artifact_bd)
    unknown_b = np.full(count, np.inf, np.float32)
    lacking_b = np.zeros(count, bool) if lacking_b is None else lacking_b
    return Projection(np.full(count, -1), norms(artifact_bd), unknown_b, artifact_bd, unknown_b, lacking_b)


def norms(artifact_bd: np.ndarray) -> np.ndarray:
    """float32 [B, D] -> float32 [B], Euclidean, summed in float64."""
    return np.sqrt(np.einsum("bd,bd->b", artifact_bd, artifact_bd, dtype=np.float64)).astype(np.float32)


class Projector(Protocol):
    """The seam for estimates of the projection."""

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; `excluded[b]` holds reference rows that query b must not use."""
        ...


class NearestProjector:
    """x* = argmin over the reference of |phi(x) - phi(y)|^2 (paper section 3; k = 1)."""

    def __init__(
        self,
        embeddings_of: Callable[[Rows], np.ndarray],
        count: int,
        dim: int,
        threads: int = 1,
        choice: Choice | None = None,
        compact: Callable[[Any], Any] = lambda embeddings_bd: embeddings_bd,
        codes: np.ndarray | None = None,
    ) -> None:
        """Embeds the reference once and makes it ready for search.

        Args:
            embeddings_of: reference rows -> float32 [M, D]. Must be deterministic: it may be called again.
            count: N, at least 1; rows in ascending order of image id.
            dim: D.
            threads: CPU threads for the search.
            choice: of a search; None: flat.
            compact, codes: see `manifpt.search.make_search`.

        Raises:
            ConfigError: an embedding of the reference is no finite number.
        """
        self.embeddings_of = embeddings_of
        self.count = count
        self.search = make_search(
            embeddings_of, count, dim, choice=choice or Choice(), compact=compact, threads=threads, codes=codes
        )

    def project(self, embeddings_bd: np.ndarray, excluded: Sequence[np.ndarray] | None = None) -> Projection:
        """Projects float32 [B, D]; see `Projector`."""
        query_bd = np.ascontiguousarray(embeddings_bd, np.float32)
        found = self.nearest(query_bd, 2, excluded)
        if not len(query_bd):
            return Projection(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32), query_bd)
        near_bd = self.embeddings_of(np.maximum(found.row_bk[:, 0], 0))
        return projection_of(query_bd, self.with_next(query_bd, found, excluded), near_bd)

    def nearest(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """The k nearest of float32 [B, D], exact; row -1 and an infinite distance where there are fewer.

        Raises:
            ValueError: a query is no finite number.
        """
        if not np.isfinite(query_bd).all():
            raise ValueError("an embedding is no finite number: the network or its weights are broken")
        if not len(query_bd):
            return Found(np.empty((0, k), np.int64), np.empty((0, k)))
        return self.search.search(query_bd, k, excluded)

    def with_next(self, query_bd: np.ndarray, found: Found, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """The nearest and the nearest that is farther than it, of k = 2: copies of a real are equally far.

        Args:
            query_bd: float32 [B, D].
            found: their k >= 2 nearest.
            excluded: as it was for `found`.
        """
        row_b2, squared_b2 = found.row_bk[:, :2].copy(), found.squared_bk[:, :2].copy()
        left_b, k = np.arange(len(query_bd)), found.row_bk.shape[1]
        while True:
            farther_bk = found.squared_bk > found.squared_bk[:, :1]  # also what isn't there, which is infinitely far
            next_b = farther_bk.argmax(1)
            rows = np.arange(len(left_b))
            row_b2[left_b, 1], squared_b2[left_b, 1] = found.row_bk[rows, next_b], found.squared_bk[rows, next_b]
            tied_b = ~farther_bk.any(1)
            row_b2[left_b[tied_b], 1], squared_b2[left_b[tied_b], 1] = -1, np.inf
            left_b = left_b[tied_b & (found.row_bk[:, 0] >= 0)]
            if not len(left_b) or k >= min(_MOST_COPIES, self.count):
                return Found(row_b2, squared_b2)
            k = min(8 * k, _MOST_COPIES, self.count)
            found = self.nearest(query_bd[left_b], k, [excluded[b] for b in left_b.tolist()] if excluded else None)


def projection_of(query_bd: np.ndarray, found: Found, near_bd: np.ndarray) -> Projection:
    """A projection from what a search for two neighbours found.

    Args:
        query_bd: float32 [B, D].
        found: of k = 2, the second farther than the first.
        near_bd: float32 [B, D], the nearest's embeddings; anything where there is none.
    """
    neighbor_b = found.row_bk[:, 0]
    artifact_bd = query_bd - near_bd
    artifact_bd[neighbor_b < 0] = np.nan
    distance_b, second_b = np.sqrt(found.squared_bk).astype(np.float32).T
    return Projection(neighbor_b, distance_b, second_b, artifact_bd)


def nearer_of(one: Found, one_codes: np.ndarray, other: Found, other_codes: np.ndarray) -> tuple[Found, np.ndarray]:
    """The nearest and the next of two parts of a reference, each as of `with_next`, and the code of each one's nearest,
    [B, ...]."""
    found, place_bk = nearer(one, other)
    is_other_b = (place_bk[:, 0] >= 2).reshape(-1, *[1] * (one_codes.ndim - 1))
    row_b4 = np.hstack([one.row_bk, other.row_bk])
    squared_b4 = np.hstack([one.squared_bk, other.squared_bk])
    squared_b4[squared_b4 <= found.squared_bk[:, :1]] = np.inf
    next_b = squared_b4.argmin(1)[:, None]
    next_squared_b = np.take_along_axis(squared_b4, next_b, 1)
    next_row_b = np.where(np.isfinite(next_squared_b), np.take_along_axis(row_b4, next_b, 1), -1)
    both = Found(np.hstack([found.row_bk[:, :1], next_row_b]), np.hstack([found.squared_bk[:, :1], next_squared_b]))
    return both, np.where(is_other_b, other_codes, one_codes)
