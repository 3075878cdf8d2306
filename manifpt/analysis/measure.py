"""One image in a space of a run: its artifact, as the run would have stored it, and its nearest reals.

Legend: K nearest reals, at most 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from manifpt.errors import BadImage, ConfigError
from manifpt.estimates import Estimate, make_projector
from manifpt.estimates.residual import artifacts_of, projected_in
from manifpt.projection import projection_of
from manifpt.reference import Bundle, Codes, Reference
from manifpt.spaces import SpaceSpec

__all__ = ["Measured", "measure"]

_NEAREST = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """An image in a space of a run.

    Attributes:
        view_chw: uint8 [3, H, W], as the space sees it.
        artifact: in the run's number format, of the space's shape.
        distance: Euclidean, between x and x*.
        image_ids: K, of its nearest reals.
        distance_k: float64 [K], to them, ascending.
        in_reference, near_copy: as of `Findings`.
    """

    view_chw: np.ndarray
    artifact: np.ndarray
    distance: float
    image_ids: list[str]
    distance_k: np.ndarray
    in_reference: bool
    near_copy: bool


def measure(
    image_hwc: np.ndarray, image: dict[str, Any], bundle: Bundle, spec: SpaceSpec, estimate: Estimate, dtype: str
) -> Measured:
    """Projects one image onto a reference as if the reference did not hold it: whether it is real, nobody knows yet.

    Args:
        image_hwc: uint8 [H, W, 3].
        image: its facts, of `custody.read_image`.
        bundle, spec: the reference and one of its spaces, with weights to encode by.
        estimate: with the place of its weights, if it has some.
        dtype: of the run's artifacts.

    Raises:
        ConfigError: an image that the space can't see, or that the estimate can't leave out; a damaged reference.
    """
    try:
        view_chw = spec.view.of(image_hwc)
    except BadImage as bad:
        raise ConfigError(
            f"{image['uri']} can't be seen by the space {spec.name!r} ({bad.reason.value}: {bad.detail}); choose "
            f"another --image."
        ) from bad
    sought_in = projected_in(spec, estimate)
    reference = Reference(Codes(bundle, sought_in.code_key), sought_in)  # flat: one query isn't worth an index
    codes = reference.codes
    itself = np.union1d(codes.rows_with([image["content_hash"]])[0], codes.rows_at([image["uri"]], [None])[0])
    if len(itself) and estimate.name == "denoiser":
        raise ConfigError(
            f"{image['uri']} is in the reference, from which the denoiser has learned it: no artifact of it is "
            f"evidence. Choose another --image."
        )
    query_bd = reference.space.embed(reference.space.encode(view_chw[None])).reshape(1, -1)
    if not np.isfinite(query_bd).all():
        raise ConfigError(f"The embedding of {image['uri']} is no finite number; choose another --image.")
    near = reference.projector.nearest(query_bd, _NEAREST, [itself])
    if near.row_bk[0, 0] < 0:
        raise ConfigError(f"The reference {bundle.uri} holds nothing but this image: build it from more.")
    two = reference.projector.with_next(query_bd, near, [itself])
    nearest = projection_of(query_bd, two, reference.embeddings_of(two.row_bk[:, 0]))
    projected = make_projector(estimate, reference).project(query_bd, [itself])
    row_k = near.row_bk[0][near.row_bk[0] >= 0]
    with np.errstate(over="ignore"):  # told by the attributor
        artifact = artifacts_of(projected.artifact_bd, spec, estimate).astype(dtype)[0]
    return Measured(
        view_chw=view_chw,
        artifact=artifact.reshape(reference.shape),
        distance=float(projected.distance_b[0]),
        image_ids=codes.image_ids.take(pa.array(row_k)).to_pylist(),
        distance_k=np.sqrt(near.squared_bk[0][: len(row_k)]),
        in_reference=bool(len(itself)),
        near_copy=bool(nearest.near_copy_b[0]),
    )
