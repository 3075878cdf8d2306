"""Estimates of the projection x*, behind the seam `manifpt.projection.Projector`. A new one is one file, its fields in
`spec.ESTIMATES` and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from manifpt.errors import ConfigError
from manifpt.estimates.spec import ESTIMATES, Estimate
from manifpt.projection import Projector
from manifpt.spaces import SpaceSpec

if TYPE_CHECKING:
    from manifpt.reference import Reference

__all__ = ["ESTIMATES", "Estimate", "check_estimate", "make_projector"]


def check_estimate(estimate: Estimate, spec: SpaceSpec, dim: int) -> None:
    """Whether an estimate can be had in a space; a worker finds out too, but late.

    Args:
        estimate: it.
        spec: of the space in which x* is sought.
        dim: D.

    Raises:
        ConfigError: the estimate is for images, and the space has none; or it can't be had at this size.
    """
    if estimate.name in ("blur", "denoiser") and spec.kind != "rgb":
        raise ConfigError(
            f"--estimate {estimate.name} works on pixels, not on the space {spec.name!r}: choose rgb or ycbcr, or a "
            f"frequency space with --residual-first."
        )
    if estimate.name == "soft":
        from manifpt.estimates.gaussian import check_dims  # torch costs seconds

        check_dims(dim)
    if estimate.name == "denoiser":
        from manifpt.estimates.denoiser import check_pixels

        check_pixels(estimate.weights, spec)


def make_projector(estimate: Estimate, reference: Reference, device: str = "cpu") -> Projector:
    """The projector of an estimate over one reference.

    Args:
        estimate: it.
        reference: in the space in which x* is sought.
        device: for what multiplies matrices.

    Raises:
        ConfigError: the estimate is for images, and the space has none; or it can't be had at this size.
    """
    check_estimate(estimate, reference.space.spec, int(np.prod(reference.shape)))
    return _MAKERS[estimate.name](estimate, reference, device)


def _mean(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.neighbors import MeanProjector

    return MeanProjector(reference.projector, estimate.neighbors)


def _hull(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.neighbors import HullProjector

    return HullProjector(reference.projector, estimate.neighbors, estimate.ridge)


def _soft(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.gaussian import SoftProjector

    count, dim = len(reference.codes.array), int(np.prod(reference.shape))
    return SoftProjector(reference.embeddings_of, count, dim, estimate.sigma, device)


def _denoiser(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.denoiser import DenoiserProjector

    return DenoiserProjector(estimate.weights, estimate.weights_sha256, reference.space.spec, device)


def _none(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.controls import NoneControl

    return NoneControl()


def _random(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.controls import RandomControl

    return RandomControl(reference.embeddings_of, len(reference.codes.array), estimate.seed)


def _blur(estimate: Estimate, reference: Reference, device: str) -> Projector:
    from manifpt.estimates.controls import BlurControl

    channels, height_px, width_px = reference.shape
    return BlurControl((channels, height_px, width_px), estimate.sigma)


_MAKERS: dict[str, Callable[[Estimate, Reference, str], Projector]] = {
    "nearest": lambda estimate, reference, device: reference.projector,
    "mean": _mean,
    "hull": _hull,
    "soft": _soft,
    "denoiser": _denoiser,
    "none": _none,
    "random": _random,
    "blur": _blur,
}
