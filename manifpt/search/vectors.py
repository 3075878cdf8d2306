"""The reference's embeddings as a search sees them: held in memory where they fit, made again where they don't.

Legend: N reference rows, D dimensions, B queries, P pairs of a query and a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manifpt.errors import ConfigError

if TYPE_CHECKING:  # torch costs seconds, and small references do without
    import torch

    from manifpt.search.device import DeviceRows

__all__ = [
    "LARGE",
    "Batch",
    "Found",
    "Rows",
    "Vectors",
    "joined",
    "nearer",
    "nearest_of_pairs",
    "pairwise",
    "sum_by_halves",
]

Rows = np.ndarray | slice

_HELD_BYTES = 4 << 30  # beyond, an actor keeps codes only, and embeds the few rows that it compares
_BLOCK_BYTES = 8 << 20  # larger ones come fresh from the system each time, which costs more than the work
_BLOCK_ROWS = 64
_PAIR_BYTES = 16 << 20  # of gathered rows at a time: what caches like
_FLOAT32 = np.finfo(np.float32)
LARGE = 2.0**60  # squares of such norms, and sums of a few of them, are float32 numbers


@dataclass(frozen=True, slots=True)
class Found:
    """The k nearest rows of B queries.

    Attributes:
        row_bk: int64 [B, k], nearest first, ties to the smallest row; -1 where there is none.
        squared_bk: float64 [B, k], squared Euclidean; infinite where there is none.
    """

    row_bk: np.ndarray
    squared_bk: np.ndarray


def joined(parts: Sequence[Found]) -> Found:
    """Queries in parts, together again."""
    return Found(np.concatenate([part.row_bk for part in parts]), np.concatenate([part.squared_bk for part in parts]))


class Batch:
    """B queries, which go to a device once: to one, as a process has one GPU.

    Attributes:
        query_bd: float32 [B, D].
    """

    def __init__(self, query_bd: np.ndarray) -> None:
        self.query_bd = query_bd
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.query_bd)

    def on(self, device: str) -> torch.Tensor:
        """The same numbers there."""
        if self._on_device is None:
            import torch

            self._on_device = torch.from_numpy(np.ascontiguousarray(self.query_bd)).to(device)
        return self._on_device


class Vectors:
    """float32 [N, D], by row.

    Attributes:
        on_device: the same rows on a device, where pairs are then compared; see `hold_on`.
    """

    def __init__(self, embeddings_of: Callable[[Rows], np.ndarray], count: int, dim: int) -> None:
        """Args:
        embeddings_of: rows -> float32 [M, D]; deterministic.
        count: N, at least 1.
        dim: D.

        Raises:
            ConfigError: an embedding is no finite number.
        """
        self.count, self.dim = count, dim
        held = np.empty((count, dim), np.float32) if 4 * count * dim <= _HELD_BYTES else None
        for block in self.slices():
            embeddings_md = embeddings_of(block)
            if not np.isfinite(embeddings_md).all():
                raise ConfigError(
                    "The reference holds embeddings that are no finite numbers: its network or the weights are broken. "
                    "Build it again, which leaves such images out."
                )
            if held is not None:
                held[block] = embeddings_md
        self._held = held
        self._embeddings_of = embeddings_of if held is None else None
        self.on_device: DeviceRows | None = None
        self._is_held_on: bool | None = None

    def hold_on(self, device: str) -> bool:
        """Whether a device holds the rows too from now on: those that are not too large for it. Decided once."""
        if self._is_held_on is None:
            from manifpt.search.device import device_rows

            blocks = (self.at(block) for block in self.slices())
            self.on_device = device_rows(blocks, self.count, self.dim, device)
            self._is_held_on = self.on_device is not None
        return self._is_held_on

    def release(self) -> None:
        """Lets go of what a device holds, for good."""
        self.on_device, self._is_held_on = None, False

    def at(self, rows: Rows) -> np.ndarray:
        """float32 [M, D]."""
        if self._embeddings_of is not None:
            return self._embeddings_of(rows)
        assert self._held is not None
        return self._held[rows]

    def slices(self, rows: slice | None = None) -> Iterator[slice]:
        """All rows, or a range of them, in blocks of a few MiB."""
        rows = rows or slice(0, self.count)
        step = max(_BLOCK_ROWS, _BLOCK_BYTES // (4 * self.dim))
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))

    def pair_distances(self, batch: Batch, pair_b: np.ndarray, row_p: np.ndarray) -> np.ndarray:
        """Squared distances of pairs from differences in float32: float32 [P]; `bounds` says how good they are."""
        if self.on_device is not None:
            return self.on_device.pair_distances(batch.on(self.on_device.device), pair_b, row_p)
        query_bd, squared_p = batch.query_bd, np.empty(len(pair_b), np.float32)
        if self._held is not None:
            pairwise(query_bd, pair_b, self._held, row_p, squared_p)
            return squared_p
        for part, near_md, inverse_p in self._gathered(row_p):
            pairwise(query_bd, pair_b[part], near_md, inverse_p, squared_p[part])
        return squared_p

    def exact_pair_distances(self, batch: Batch, pair_b: np.ndarray, row_p: np.ndarray) -> np.ndarray:
        """Squared distances of pairs from differences in float64, the same bits on every device: float64 [P]."""
        if self.on_device is not None:
            return self.on_device.exact_pair_distances(batch.on(self.on_device.device), pair_b, row_p)
        squared_p = np.empty(len(pair_b), np.float64)
        for part, near_md, inverse_p in self._gathered(row_p):
            difference_pd = batch.query_bd[pair_b[part]].astype(np.float64) - near_md[inverse_p]
            squared_p[part] = sum_by_halves(np.square(difference_pd, out=difference_pd))
        return squared_p

    def _gathered(self, row_p: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        step = max(1, _PAIR_BYTES // (8 * self.dim))
        for start in range(0, len(row_p), step):
            part = slice(start, start + step)
            unique, inverse_p = np.unique(row_p[part], return_inverse=True)
            yield part, self.at(unique), inverse_p

    def bounds(self, rough_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the true squared distances are at least and at most, given those of `pair_distances`: float64 [P].

        Differences have one rounding each and are squared and summed in any order: gamma_{D+2} of the true value
        (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), a little more of the computed one.
        Squares below the normal numbers lose up to one of those each; an overflow only tells that the value is large.
        """
        rough_p = rough_p.astype(np.float64)
        gamma = (self.dim + 3) * 2.0**-24 / (1 - (self.dim + 3) * 2.0**-24)
        if not 0 <= gamma < 0.5:  # too many terms: the float32 sum tells nothing
            return np.zeros_like(rough_p), np.full_like(rough_p, np.inf)
        error, lost = gamma / (1 - gamma), self.dim * float(_FLOAT32.tiny)
        return np.minimum(rough_p, float(_FLOAT32.max)) * (1 - error) - lost, rough_p * (1 + error) + lost


def sum_by_halves(terms_pd: Any) -> Any:
    """Sums of rows, float64 [P, D] -> [P], of NumPy or torch; what it is given is lost.

    Halves are added to halves: an order of its own, the same for every row and on every device, whatever else is asked
    with it. Else equal rows are told apart by the last bit, and a GPU's distances from a CPU's.
    """
    width = terms_pd.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms_pd[:, : width - half] += terms_pd[:, half:width]
        width = half
    return terms_pd[:, 0]


def pairwise(query_bd: np.ndarray, pair_b: np.ndarray, near_md: np.ndarray, row_p: np.ndarray, out: np.ndarray) -> None:
    """Squared distances of pairs by differences in float32, into float32 `out` [P]; all arrays C-contiguous."""
    import faiss

    pair_b, row_p = np.ascontiguousarray(pair_b, np.int64), np.ascontiguousarray(row_p, np.int64)
    pointer = faiss.swig_ptr
    faiss.pairwise_indexed_L2sqr(  # type: ignore[attr-defined]
        near_md.shape[1],
        len(pair_b),
        pointer(query_bd),
        pointer(pair_b),
        pointer(near_md),
        pointer(row_p),
        pointer(out),
    )


def nearest_of_pairs(vectors: Vectors, batch: Batch, pair_b: np.ndarray, row_p: np.ndarray, k: int) -> Found:
    """The k nearest of each query among its candidates, proved.

    float32 differences leave a few contenders whose order rounding could have changed; float64 differences decide.

    Args:
        vectors: the reference.
        batch: the queries.
        pair_b, row_p: int64 [P], candidates, each pair once; they must hold the k nearest.
        k: how many.
    """
    if vectors.on_device is not None:  # which has float64 differences of all in less time
        return vectors.on_device.nearest_of_pairs(batch.on(vectors.on_device.device), pair_b, row_p, k)
    lower_p, upper_p = vectors.bounds(vectors.pair_distances(batch, pair_b, row_p))
    kept = np.flatnonzero(lower_p <= kth_smallest(pair_b, upper_p, len(batch), k)[pair_b])
    pair_b, row_p = pair_b[kept], row_p[kept]
    squared_p = vectors.exact_pair_distances(batch, pair_b, row_p)
    order = np.lexsort((row_p, squared_p, pair_b))
    rank_p = _rank_in_group(pair_b[order])
    first = rank_p < k
    found = Found(np.full((len(batch), k), -1, np.int64), np.full((len(batch), k), np.inf))
    where = pair_b[order][first], rank_p[first]
    found.row_bk[where] = row_p[order][first]
    found.squared_bk[where] = squared_p[order][first]
    return found


def nearer(one: Found, other: Found) -> tuple[Found, np.ndarray]:
    """The k nearest of two parts, and each one's place in both parts side by side: int64 [B, k]."""
    row_b2 = np.hstack([one.row_bk, other.row_bk])
    squared_b2 = np.hstack([one.squared_bk, other.squared_bk])
    key_b2 = np.where(row_b2 < 0, np.iinfo(np.int64).max, row_b2)  # what isn't there comes last
    place_bk = np.lexsort((key_b2, squared_b2), axis=1)[:, : one.row_bk.shape[1]]
    return Found(np.take_along_axis(row_b2, place_bk, 1), np.take_along_axis(squared_b2, place_bk, 1)), place_bk


def kth_smallest(pair_b: np.ndarray, value_p: np.ndarray, queries: int, k: int) -> np.ndarray:
    """The k-th smallest value of each query, float64 [B]; infinite where it has fewer."""
    order = np.lexsort((value_p, pair_b))
    is_kth = _rank_in_group(pair_b[order]) == k - 1
    out = np.full(queries, np.inf)
    out[pair_b[order][is_kth]] = value_p[order][is_kth]
    return out


def _rank_in_group(sorted_b: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values."""
    starts = np.flatnonzero(np.r_[True, sorted_b[1:] != sorted_b[:-1]]) if len(sorted_b) else np.empty(0, np.int64)
    return np.arange(len(sorted_b)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_b)]))
