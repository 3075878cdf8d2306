"""Pillow's antialiased bicubic resize, on any device, to the bit.

Legend: B images, H W pixels of the source, h w of the target.

A resize is evidence: another one shifts every spectrum. So this repeats Pillow's own arithmetic (Resample.c: weights in
22-bit fixed point, one pass a direction, each rounded to a byte) as two products of matrices.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from manifpt.spaces.base import crop_box

__all__ = ["resized"]

_BITS = 22  # of Pillow's weights
_SPLIT = 2_048  # weights are multiplied in two halves, so that float32 sums stay whole numbers below 2^24
_MOST_TERMS = 28  # non-zero weights of a sum for which that holds
_SUPPORT = 2.0  # of the bicubic kernel


def resized(images_bchw: torch.Tensor, height_px: int, width_px: int) -> torch.Tensor | None:
    """uint8 [B, C, H, W] -> uint8 [B, C, h, w], as `View.of` does it: the crop of `crop_box`, resampled once.

    None where the Pillow that is installed does something else with images of this size.
    """
    source_height, source_width = images_bchw.shape[2:]
    first = _first_direction(source_height, source_width, height_px, width_px)
    return None if first is None else _two_passes(images_bchw, height_px, width_px, first)


@functools.lru_cache(maxsize=256)
def _first_direction(source_height: int, source_width: int, height_px: int, width_px: int) -> str | None:
    """Which pass comes first. Pillow's rule for it changed with its versions, and so it is asked, with noise."""
    noise_hwc = np.random.default_rng(0).integers(0, 256, (source_height, source_width, 3), dtype=np.uint8)
    box = crop_box(source_height, source_width, height_px, width_px)
    image = Image.fromarray(noise_hwc).resize((width_px, height_px), Image.Resampling.BICUBIC, box=box)
    expected_chw = np.asarray(image).transpose(2, 0, 1)
    noise_bchw = torch.from_numpy(noise_hwc.transpose(2, 0, 1)[None].copy())
    for first in ("horizontal", "vertical"):
        if (_two_passes(noise_bchw, height_px, width_px, first)[0].numpy() == expected_chw).all():
            return first
    return None


def _two_passes(images_bchw: torch.Tensor, height_px: int, width_px: int, first: str) -> torch.Tensor:
    left, top, right, bottom = crop_box(images_bchw.shape[2], images_bchw.shape[3], height_px, width_px)
    wide = _weights(images_bchw.shape[3], left, right, width_px)
    high = _weights(images_bchw.shape[2], top, bottom, height_px)
    if first == "horizontal":
        return _pass(_pass(images_bchw, wide).transpose(2, 3), high).transpose(2, 3).contiguous()
    return _pass(_pass(images_bchw.transpose(2, 3), high).transpose(2, 3), wide).contiguous()


def _pass(images_bchw: torch.Tensor, weights_ww: np.ndarray | None) -> torch.Tensor:
    """Along the last axis."""
    if weights_ww is None:
        return images_bchw
    device = images_bchw.device
    if int((weights_ww != 0).sum(0).max()) > _MOST_TERMS:
        sums = (images_bchw.double() @ torch.from_numpy(weights_ww.astype(np.float64)).to(device)).long()
    else:
        high_ww, low_ww = np.divmod(weights_ww, _SPLIT)
        pixels = images_bchw.float()
        high, low = (
            (pixels @ torch.from_numpy(half_ww.astype(np.float32)).to(device)).long() for half_ww in (high_ww, low_ww)
        )
        sums = high * _SPLIT + low
    return ((sums + (1 << (_BITS - 1))) >> _BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _weights(source_px: int, start: float, stop: float, target_px: int) -> np.ndarray | None:
    """Pillow's fixed-point weights, int64 [source_px, target_px]; None where there is nothing to do."""
    first, last = np.float32(start), np.float32(stop)  # a box is single precision in Pillow
    if source_px == target_px and first == 0 and last == target_px:
        return None
    scale = float(last - first) / target_px
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    weights = np.zeros((source_px, target_px), np.int64)
    for place in range(target_px):
        centre = float(first) + (place + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(source_px, int(centre + support + 0.5))
        kernel = [_bicubic((x - centre + 0.5) / stretch) for x in range(low, high)]
        total = sum(kernel)
        fixed = [weight / total * (1 << _BITS) for weight in kernel] if total else kernel
        weights[low:high, place] = [int(value - 0.5) if value < 0 else int(value + 0.5) for value in fixed]
    return weights


def _bicubic(x: float) -> float:
    """Keys's kernel with a = -0.5."""
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0
