"""Held-out images as an attributor sees them: what a monitoring scan compares its windows with.

Legend: N images, A principal axes, K numbers of a spectrum.

Images that trained the network lie nearer to their means than any new image does, so a window would differ from them
without a drift: the baseline holds validation and test images only.

`baseline.parquet`, by `image_id`:

    image_id, side           of the run; `validation` or `test`
    label, predicted         its own, and the most probable one
    group                    what it was made together with, such as a latent, by its own label; null: with none
    is_unknown               whether the score is over the bundle's threshold
    unknown_score            float32
    distance                 float32, norm of the artifact, as in the shards
    feature                  arrow.fixed_shape_tensor float16 [A + 1]: see `openset.OpenSet.coordinates`
    spectrum                 the same of [K]: see `spectrum.spectrum_of`
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from manifpt.artifacts import tensor_column
from manifpt.attributor.choice import drawn
from manifpt.attributor.examples import Examples
from manifpt.attributor.openset import OpenSet
from manifpt.attributor.outputs import Outputs

__all__ = ["BASELINE", "as_kept", "baseline_table"]

BASELINE = "baseline.parquet"
_MOST_IMAGES = 5_000
_LARGEST = float(np.finfo(np.float16).max)


def as_kept(feature_nk: np.ndarray) -> np.ndarray:
    """Coordinates of features, or spectra, as tables keep them: float16, what is too large as the largest."""
    return feature_nk.clip(-_LARGEST, _LARGEST).astype(np.float16)


def baseline_table(examples: Examples, sides: Mapping[str, Outputs], openset: OpenSet) -> pa.Table:
    """The table that the module's docstring describes, of at most 5,000 images, drawn by image id.

    Args:
        examples: rows of the run.
        sides: by side, what the network said of all its images.
        openset: of the bundle.
    """
    tables = [_side(examples, side, outputs, openset) for side, outputs in sides.items()]
    table = pa.concat_tables(tables).sort_by("image_id").combine_chunks()
    alike_n = np.zeros(len(table), np.int8)
    return table.filter(pa.array(drawn(alike_n, table["image_id"].to_pylist(), _MOST_IMAGES)))


def _side(examples: Examples, side: str, outputs: Outputs, openset: OpenSet) -> pa.Table:
    rows = examples.table.select(["image_id", "distance"]).take(pa.array(outputs.row_b))
    score_n = openset.scores(outputs)
    feature_nk = as_kept(openset.coordinates(outputs.features_bf))
    return pa.table(
        {
            "image_id": rows["image_id"],
            "side": [side] * len(rows),
            "label": [examples.labels[n] for n in outputs.label_b],
            "predicted": [examples.labels[n] for n in outputs.predicted_b],
            "group": pa.array(_groups(examples, outputs.row_b), pa.string()),
            "is_unknown": score_n > openset.threshold,
            "unknown_score": score_n,
            "distance": rows["distance"],
            "feature": tensor_column(feature_nk),
            "spectrum": tensor_column(as_kept(outputs.spectrum_bk)),
        }
    )


def _groups(examples: Examples, row_b: np.ndarray) -> list[str | None]:
    if examples.group is None:
        return [None] * len(row_b)
    rows = examples.table.select([examples.group]).take(pa.array(row_b))
    return [None if value in (None, "") else str(value) for value in rows[examples.group].to_pylist()]
