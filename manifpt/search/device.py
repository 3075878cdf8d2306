"""Squared distances by one float32 GEMM on a GPU: the candidates of a flat search where FAISS has no GPU code.

Legend: B queries, N reference rows, D dimensions, c candidates.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["DeviceIndex"]

_PRODUCT_BYTES = 1 << 30  # of one block of queries


class DeviceIndex:
    """What of FAISS's index a flat search needs: `add` and `search`."""

    def __init__(self, dim: int, device: str = "cuda") -> None:
        """Args:
        dim: D.
        device: of the reference.
        """
        self._device = device
        self._parts: list[torch.Tensor] = []
        self._reference_nd = torch.empty((0, dim), device=device)
        self._square_n = torch.empty(0, device=device)

    def add(self, rows_md: np.ndarray) -> None:
        """More rows: float32 [M, D]."""
        self._parts.append(torch.from_numpy(np.ascontiguousarray(rows_md)).to(self._device))

    @torch.inference_mode()
    def search(self, query_bd: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
        """The c nearest: squared distances float32 [B, c], ascending, and rows int64 [B, c].

        |x|^2 + |y|^2 - 2 x.y in float32; the product must not be of TF32, whose error `rounding` does not bound.
        """
        if self._parts:
            self._reference_nd = torch.cat([self._reference_nd, *self._parts])
            self._square_n = self._reference_nd.square().sum(1)
            self._parts = []
        assert not torch.backends.cuda.matmul.allow_tf32
        step = max(1, _PRODUCT_BYTES // (4 * len(self._reference_nd)))
        distances, rows = [], []
        for query in torch.from_numpy(np.ascontiguousarray(query_bd)).split(step):
            query = query.to(self._device)
            apart_bn = torch.addmm(self._square_n, query, self._reference_nd.T, alpha=-2)
            near = apart_bn.topk(c, dim=1, largest=False)
            distances.append((near.values + query.square().sum(1, keepdim=True)).cpu())
            rows.append(near.indices.cpu())
        return torch.cat(distances).numpy(), torch.cat(rows).numpy()
