"""How an artifact's power is spread over spatial frequencies: what a generator's up-sampling shows in, whatever the
network learned.

Legend: B artifacts, C channels, H W pixels, R rings, K = C R numbers.

Of an artifact as an image: one in `frequency` is a spectrum itself, and its rings are those of that picture.

An attributor's features keep what tells the sources of its training apart; a new source may differ in none of that.
Twelve rings a channel are few enough to know each label's own spread, and see every frequency.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["spectrum_of", "spectrum_size"]

_RINGS = 12
_LEAST_POWER = 1e-12  # of an artifact that is zero, as a copy's is


def spectrum_of(artifacts: torch.Tensor) -> torch.Tensor:
    """The logarithm of an artifact's mean power in each ring of spatial frequencies, channel by channel.

    Rings are as wide as each other, from 0 to the largest frequency; the innermost holds the mean. Those without a
    frequency, as small images have them, are left out. A vector has one number: the logarithm of its mean square.

    Args:
        artifacts: float32 [B, C, H, W] or [B, D].

    Returns:
        float32 [B, K], finite where the artifacts are below 1e15.
    """
    if artifacts.ndim == 2:
        power_bk = artifacts.square().mean(dim=1, keepdim=True)
    else:
        height_px, width_px = (int(n) for n in artifacts.shape[-2:])
        share_fr = torch.from_numpy(_shares(height_px, width_px)).to(artifacts.device)
        parts_bchw2 = torch.view_as_real(torch.fft.rfft2(artifacts, norm="ortho"))
        power_bcf = parts_bchw2.square().sum(dim=-1).flatten(2)  # abs() would take a root, and most of the time
        power_bk = (power_bcf @ share_fr).flatten(1)
    return torch.log(power_bk + _LEAST_POWER)


def spectrum_size(shape: Sequence[int]) -> int:
    """K for artifacts of a shape, `(C, H, W)` or `(D,)`."""
    if len(shape) == 1:
        return 1
    return shape[0] * _shares(shape[1], shape[2]).shape[1]


@functools.cache
def _shares(height_px: int, width_px: int) -> np.ndarray:
    """float32 [F, R]: what each of the F frequencies of a real image's transform adds to the mean of each ring."""
    row_h, column_w = np.fft.fftfreq(height_px), np.fft.rfftfreq(width_px)
    radius_hw = np.hypot(row_h[:, None], column_w)
    ring_hw = np.minimum((radius_hw / (radius_hw.max() or 1.0) * _RINGS).astype(np.int64), _RINGS - 1)
    # All but the first column, and of an even width the last, stand for their mirror images too.
    is_own_mirror_w = (column_w == 0) | (2 * np.arange(len(column_w)) == width_px)
    count_hw = np.broadcast_to(np.where(is_own_mirror_w, 1.0, 2.0), ring_hw.shape)
    weight_fr = (ring_hw.ravel()[:, None] == np.arange(_RINGS)) * count_hw.ravel()[:, None]
    weight_fr = weight_fr[:, weight_fr.any(axis=0)]
    return np.asarray(weight_fr / weight_fr.sum(axis=0), np.float32)
