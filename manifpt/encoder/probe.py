"""How well features tell classes apart, without training anything.

Legend: N images of the bank, M queries, D features.
"""

from __future__ import annotations

import numpy as np

__all__ = ["knn_accuracy"]

_TEMPERATURE = 0.07
_BLOCK = 1024


def knn_accuracy(
    bank_nd: np.ndarray, label_n: np.ndarray, query_md: np.ndarray, label_m: np.ndarray, neighbors: int = 200
) -> float:
    """Share of queries whose class the nearest of the bank tell.

    Cosine similarity; each of the nearest votes for its class with weight exp(similarity / 0.07) (Wu et al. 2018,
    section 3.4, whose k = 200 is the usual one since).

    Args:
        bank_nd, query_md: float [N, D], [M, D].
        label_n, label_m: int64 [N], [M], from 0.
        neighbors: k, or all of the bank where it has fewer.
    """
    bank_nd, query_md = _directions(bank_nd), _directions(query_md)
    nearest, right = min(neighbors, len(bank_nd)), 0
    for start in range(0, len(query_md), _BLOCK):
        similarity_mn = query_md[start : start + _BLOCK] @ bank_nd.T
        place_mk = np.argpartition(-similarity_mn, nearest - 1, axis=1)[:, :nearest]
        weight_mk = np.exp(np.take_along_axis(similarity_mn, place_mk, axis=1) / _TEMPERATURE)
        votes_ms = np.zeros((len(place_mk), int(label_n.max()) + 1))
        np.add.at(votes_ms, (np.arange(len(place_mk))[:, None], label_n[place_mk]), weight_mk)
        right += int((votes_ms.argmax(1) == label_m[start : start + _BLOCK]).sum())
    return right / len(query_md)


def _directions(features_nd: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features_nd, axis=1, keepdims=True)
    return features_nd / np.maximum(lengths, np.finfo(np.float32).tiny)
