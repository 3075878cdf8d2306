"""Searches on a GPU: pairs compared by their differences, and the candidates of a flat search by one float32 GEMM.

What is proved on the host is proved of what is computed here: errors are bounded for any order of summation, and
float64 distances have the same bits on every device (`vectors.sum_by_halves`).

Legend: B queries, N reference rows, D dimensions, P pairs of a query and a row, k neighbours, c candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from manifpt.search.basis import in_float32
from manifpt.search.distinct import Search
from manifpt.search.vectors import Batch, Found, joined, sum_by_halves

__all__ = ["DeviceIndex", "DeviceRows", "InHalves", "device_index", "device_rows"]

_HELD_BYTES = 4 << 30  # of a device that others use too
_SHARE = 8  # and at most so much of what is free: a flat search doubles it, other spaces and jobs come
_PRODUCT_BYTES = 256 << 20  # of one block of queries
_PAIR_BYTES = 256 << 20  # of differences at a time
_ROWS = 4_096  # whose squares are summed at a time


def device_rows(blocks: Iterable[np.ndarray], count: int, dim: int, device: str) -> DeviceRows | None:
    """All rows on a device, where they take no more than their share of it; see `DeviceRows`."""
    if 4 * count * dim > min(_HELD_BYTES, free_bytes(device) // _SHARE):
        return None
    try:
        return DeviceRows(blocks, count, dim, device)
    except torch.cuda.OutOfMemoryError:  # other actors took it since
        return None


def device_index(rows: DeviceRows, mean_d: np.ndarray) -> DeviceIndex | None:
    """See `DeviceIndex`; None where the device has no room for it."""
    try:
        return DeviceIndex(rows, mean_d)
    except torch.cuda.OutOfMemoryError:
        return None


def free_bytes(device: str) -> int:
    """Of this process's GPU now; of the CPU, which only tests name, as if all were free."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 1 << 62


class DeviceRows:
    """float32 [N, D] on a device: what `Vectors` does there.

    Attributes:
        device: where.
        rows_nd: float32 [N, D].
    """

    def __init__(self, blocks: Iterable[np.ndarray], count: int, dim: int, device: str) -> None:
        """Args:
        blocks: float32 [M, D], all rows in order.
        count: N.
        dim: D.
        device: where they will be.
        """
        self.device, start = device, 0
        self.rows_nd = torch.empty((count, dim), device=device)
        for block_md in blocks:
            self.rows_nd[start : start + len(block_md)] = torch.from_numpy(np.ascontiguousarray(block_md))
            start += len(block_md)

    def pair_distances(self, query_bd: torch.Tensor, pair_b: np.ndarray, row_p: np.ndarray) -> np.ndarray:
        """See `Vectors`: of queries on this device, float32 [P]."""
        return self._squared(query_bd, *self._placed(pair_b, row_p), torch.float32).cpu().numpy()

    def exact_pair_distances(self, query_bd: torch.Tensor, pair_b: np.ndarray, row_p: np.ndarray) -> np.ndarray:
        """See `Vectors`: of queries on this device, float64 [P]."""
        return self._squared(query_bd, *self._placed(pair_b, row_p), torch.float64).cpu().numpy()

    @torch.inference_mode()
    def nearest_of_pairs(self, query_bd: torch.Tensor, pair_b: np.ndarray, row_p: np.ndarray, k: int) -> Found:
        """See `manifpt.search.vectors.nearest_of_pairs`; float64 differences of all pairs decide."""
        of_b, row = self._placed(pair_b, row_p)
        squared = self._squared(query_bd, of_b, row, torch.float64)
        order = row.argsort()
        for key in (squared, of_b):
            order = order[key[order].argsort(stable=True)]
        of_b, row, squared = of_b[order], row[order], squared[order]
        counts_b = torch.bincount(of_b, minlength=len(query_bd))
        rank = torch.arange(len(of_b), device=self.device) - (counts_b.cumsum(0) - counts_b)[of_b]
        first = rank < k
        row_bk = torch.full((len(query_bd), k), -1, device=self.device)
        squared_bk = torch.full((len(query_bd), k), torch.inf, dtype=torch.float64, device=self.device)
        row_bk[of_b[first], rank[first]] = row[first]
        squared_bk[of_b[first], rank[first]] = squared[first]
        return Found(row_bk.cpu().numpy(), squared_bk.cpu().numpy())

    def _placed(self, pair_b: np.ndarray, row_p: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        of_b, row = (torch.from_numpy(np.ascontiguousarray(ids, np.int64)) for ids in (pair_b, row_p))
        return of_b.to(self.device), row.to(self.device)

    @torch.inference_mode()
    def _squared(
        self, query_bd: torch.Tensor, of_b: torch.Tensor, row: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        step = max(1, _PAIR_BYTES // (8 * self.rows_nd.shape[1]))
        squared = torch.empty(len(row), dtype=dtype, device=self.device)
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            difference_pd = query_bd[of_b[part]].to(dtype).sub_(self.rows_nd[row[part]]).square_()
            squared[part] = sum_by_halves(difference_pd) if dtype == torch.float64 else difference_pd.sum(1)
        return squared


class DeviceIndex:
    """What a flat search needs of an index."""

    @torch.inference_mode()
    def __init__(self, rows: DeviceRows, mean_d: np.ndarray) -> None:
        """Args:
        rows: the reference.
        mean_d: float32 [D], taken from rows and queries before they are multiplied.
        """
        in_float32()
        self._device = rows.device
        self._mean_d = torch.from_numpy(mean_d).to(rows.device)
        self._centred_nd = rows.rows_nd - self._mean_d
        self._square_n = torch.cat([part_md.square().sum(1) for part_md in self._centred_nd.split(_ROWS)])

    @torch.inference_mode()
    def search(self, batch: Batch, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The c nearest: squared distances float32 [B, c], ascending, rows int64 [B, c]; and |x - mean|, float64 [B].

        |x|^2 + |y|^2 - 2 x.y in float32.
        """
        in_float32()
        step = max(1, _PRODUCT_BYTES // (4 * len(self._centred_nd)))
        distances, rows, norms = [], [], []
        for query in batch.on(self._device).split(step):
            query = query - self._mean_d
            apart_bn = torch.addmm(self._square_n, query, self._centred_nd.T, alpha=-2)
            near = apart_bn.topk(c, dim=1, largest=False)
            distances.append((near.values + query.square().sum(1, keepdim=True)).cpu())
            rows.append(near.indices.cpu())
            norms.append(torch.linalg.vector_norm(query, dim=1, dtype=torch.float64).cpu())
        return torch.cat(distances).numpy(), torch.cat(rows).numpy(), torch.cat(norms).numpy()


class InHalves:
    """A search on a device that other actors fill too: where memory lacks, half of the queries at a time."""

    def __init__(self, inner: Search) -> None:
        """Args:
        inner: whose answer to a query doesn't depend on what is asked with it.
        """
        self._inner = inner

    def search(self, query_bd: np.ndarray, k: int, excluded: Sequence[np.ndarray] | None = None) -> Found:
        """See `Search`.

        Raises:
            torch.cuda.OutOfMemoryError: there is no room for one query either.
        """
        try:
            return self._inner.search(query_bd, k, excluded)
        except torch.cuda.OutOfMemoryError:
            if len(query_bd) < 2:
                raise
        torch.cuda.empty_cache()  # after the error, which holds what its frames held
        halves = slice(len(query_bd) // 2), slice(len(query_bd) // 2, None)
        return joined([self.search(query_bd[half], k, excluded[half] if excluded else None) for half in halves])
