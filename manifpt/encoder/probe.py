"""How well features tell classes apart, without training anything.

Legend: B images, N of the bank, M queries, D features, s side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manifpt.encoder.network import TwinNetwork
from manifpt.errors import BadImage
from manifpt.fetch import fetch
from manifpt.isolated import IsolatedDecoder
from manifpt.learning import autocast
from manifpt.spaces import SpaceSpec

__all__ = ["Probe", "Probing", "knn_accuracy", "standardized"]

_TEMPERATURE = 0.07
_BLOCK = 1024
_BATCH = 256


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


def standardized(images_bchw: torch.Tensor, pixels: SpaceSpec) -> torch.Tensor:
    """float [B, 3, s, s] in [0, 1], as `NetworkSpace` will give it to the trained backbone."""
    mean, std = (images_bchw.new_tensor(values).view(1, 3, 1, 1) for values in (pixels.mean, pixels.std))
    return ((images_bchw - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class Probe:
    """Labelled images, of which the first `bank` vote on the others.

    Attributes:
        records: of the manifest.
        label_n: int64 [N], from 0.
        bank: how many.
    """

    records: Sequence[dict[str, Any]]
    label_n: np.ndarray
    bank: int


class Probing:
    """The probe's images, decoded once."""

    def __init__(self, probe: Probe, pixels: SpaceSpec, device: str) -> None:
        views, kept = [], []
        with IsolatedDecoder() as decode:  # one that ends its process would end each training worker after another
            for number, data in enumerate(fetch(list(probe.records))):
                try:
                    if isinstance(data, BadImage):
                        continue
                    views.append(pixels.view.of(decode(data)))
                    kept.append(number)
                except BadImage:
                    continue
        self._is_bank = np.array(kept, np.int64) < probe.bank
        self._label_n, self._pixels, self._device = probe.label_n[kept], pixels, device
        self._views_nchw = np.stack(views) if views else np.empty((0, 3, 1, 1), np.uint8)

    def accuracy(self, network: TwinNetwork) -> float | None:
        """Of the features as they are now; None where too few images are left."""
        if not self._is_bank.any() or self._is_bank.all():
            return None
        network.eval()
        features = []
        with torch.inference_mode(), autocast(self._device):
            for start in range(0, len(self._views_nchw), _BATCH):
                images = torch.from_numpy(self._views_nchw[start : start + _BATCH]).to(self._device).float() / 255
                features.append(network.backbone(standardized(images, self._pixels)).float().cpu().numpy())
        found_nd, bank = np.concatenate(features), self._is_bank
        return knn_accuracy(found_nd[bank], self._label_n[bank], found_nd[~bank], self._label_n[~bank])
