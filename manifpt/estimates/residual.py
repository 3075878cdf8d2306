"""Residual first, transform second: in `frequency`, the spectrum of x - x* instead of a difference of two spectra.

The order matters: the log-spectrum of an image is mostly its content, which x* has otherwise; a difference of pixels
takes content out before the logarithm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from manifpt.estimates.spec import Estimate
from manifpt.spaces import SpaceSpec
from manifpt.spaces.pixels import log_spectrum

__all__ = ["artifacts_of", "projected_in"]


def projected_in(spec: SpaceSpec, estimate: Estimate) -> SpaceSpec:
    """The space in which x* is sought: the pixels of a frequency space whose residual comes first, else the space."""
    return replace(spec, kind="rgb") if estimate.residual_first and spec.kind == "frequency" else spec


def artifacts_of(residual_bd: np.ndarray, spec: SpaceSpec, estimate: Estimate) -> np.ndarray:
    """float32 [B, D], x - x* in the space of `projected_in` -> float32 [B, D], what the space's shards hold."""
    if projected_in(spec, estimate) is spec:
        return residual_bd
    shape = (-1, 3, spec.view.height_px or 0, spec.view.width_px or 0)
    return log_spectrum(residual_bd.reshape(shape)).reshape(residual_bd.shape)
