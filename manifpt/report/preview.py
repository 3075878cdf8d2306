"""`preview.png`: for a few images of every source, x, its projection x* and the artifact, in each space.

Legend: H W pixels, D dimensions.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from manifpt.alterations import altered_as
from manifpt.decode import decode
from manifpt.errors import BadImage, ConfigError, StorageError
from manifpt.fetch import fetch
from manifpt.log import event
from manifpt.manifest import records
from manifpt.plan import Plan
from manifpt.report.drawing import literal
from manifpt.report.text import plain
from manifpt.shards import committed_shards, part_path, read_part
from manifpt.spaces import SpaceSpec
from manifpt.spaces.pixels import log_spectrum, pixels
from manifpt.storage import join, store_of

__all__ = ["artifact_picture", "draw_preview", "listed_images", "pixels_of", "spectrum_picture"]

_ROWS_A_SOURCE = 3
_MOST_SOURCES = 8
_LABEL_LINE, _LABEL_LINES = 18, 3
_MOST_SHARDS = 64  # sources are often contiguous in a manifest, so several shards are looked at

_X_STAR = {"nearest": "x*, nearest real", "random": "x*, some real"}

Example = dict[str, Any]


def draw_preview(plan: Plan, output: str) -> None:
    """Draws and publishes the picture. One that can't be drawn does not spoil a run: the log says so and it goes on."""
    try:
        examples = _examples(plan, output)
        if examples:
            store_of(output).write(join(output, "preview.png"), _png(plan, examples))
    except (OSError, ValueError, KeyError, ConfigError, StorageError) as error:
        event("no_preview", error=error)


def _examples(plan: Plan, output: str) -> list[dict[str, Example]]:
    """A picture row each: by space, the shard's row with the pixels of x and x*."""
    shards = sorted(committed_shards(output))
    chosen: dict[str, list[dict[str, Example]]] = {}
    for shard in shards[:: -(-len(shards) // _MOST_SHARDS)]:
        labels = _part(output, plan.spaces[0].name, shard, ["image_id", "source"])
        picked = [
            (source, image_id)
            for source in pc.unique(labels["source"]).to_pylist()
            for image_id in labels.filter(pc.equal(labels["source"], source))["image_id"].to_pylist()[
                : _ROWS_A_SOURCE - len(chosen.get(source, ()))
            ]
        ]
        parts = {spec.name: _part(output, spec.name, shard) for spec in plan.spaces} if picked else {}
        for source, image_id in picked:
            by_space = {name: _example(table, image_id) for name, table in parts.items()}
            chosen.setdefault(source, []).append({name: example for name, example in by_space.items() if example})
    examples = [row for source in sorted(chosen)[:_MOST_SOURCES] for row in chosen[source]]
    _attach_pixels(plan, [example for row in examples for example in row.values()])
    return examples


def _part(output: str, space: str, shard: int, columns: list[str] | None = None) -> pa.Table:
    return read_part(output, part_path("artifacts", space, shard), columns)


def _example(table: pa.Table, image_id: str) -> Example | None:
    row = table.filter(pc.equal(table["image_id"], image_id))
    if not len(row):
        return None  # rejected in this space only
    example: Example = records(row)[0]
    if "artifact" in row.column_names:
        example["artifact"] = row["artifact"].combine_chunks().to_numpy_ndarray()[0].astype(np.float32)
    return example


def _attach_pixels(plan: Plan, examples: list[Example]) -> None:
    ids = sorted({example["neighbor_id"] or "" for example in examples})
    x_star = pixels_of(listed_images(plan.reference_uri, ids))
    x = pixels_of(list({example["image_id"]: example for example in examples}.values()))
    x = {image_id: altered_as(image_hwc, plan.alter, image_id) for image_id, image_hwc in x.items()}
    for example in examples:
        example["x"], example["x*"] = x.get(example["image_id"]), x_star.get(example["neighbor_id"])


def listed_images(reference_uri: str, image_ids: list[str]) -> list[dict[str, Any]]:
    """Where some images of a reference are, as `reference.parquet` says it."""
    uri = join(reference_uri, "reference.parquet")
    with store_of(uri).open(uri) as stream:
        wanted = pc.field("image_id").isin(pa.array(image_ids, pa.string()))
        rows: list[dict[str, Any]] = pq.read_table(stream, filters=wanted).to_pylist()
    return rows


def pixels_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] by image id; without those that can't be read any more."""
    found = {}
    for row, data in zip(rows, fetch(rows), strict=True):
        try:
            if isinstance(data, bytes):
                found[row["image_id"]] = decode(data)
        except BadImage:
            continue
    return found


def _png(plan: Plan, examples: list[dict[str, Example]]) -> bytes:
    columns = 3 * len(plan.spaces)
    figure = Figure(figsize=(1.25 * columns + 1.2, 1.32 * len(examples) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(examples), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for row, by_space in zip(axes, examples, strict=True):
        source = next(iter(by_space.values()))["source"]
        row[0].set_ylabel(_label(source), fontsize=9, rotation=0, ha="right", va="center")
        for number, spec in enumerate(plan.spaces):
            if spec.name in by_space:
                _draw(row[3 * number : 3 * number + 3], spec, by_space[spec.name])
    for number, spec in enumerate(plan.spaces):
        for offset, title in enumerate(
            (f"{spec.name}: x", _X_STAR.get(plan.estimate.name, "x*, no sample"), "artifact")
        ):
            axes[0][3 * number + offset].set_title(title, fontsize=8)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def _label(source: str) -> str:
    """In up to three lines, so that long names that begin alike can be told apart."""
    lines = textwrap.wrap(plain(source, _LABEL_LINE * _LABEL_LINES), _LABEL_LINE)
    return "\n".join(literal(line, _LABEL_LINE) for line in lines)


def _draw(cells: Any, spec: SpaceSpec, example: Example) -> None:
    for cell, key in zip(cells, ("x", "x*"), strict=False):
        if example[key] is not None:
            _show(cell, _seen(example[key], spec))
    cells[2].set_xlabel(f"|a| = {example['distance']:.2f}", fontsize=7)
    artifact = example.get("artifact")
    if artifact is None:
        cells[2].text(0.5, 0.5, "lazy", ha="center", va="center", fontsize=8)
    elif artifact.ndim == 3:
        _show(cells[2], artifact_picture(artifact))
    else:
        cells[2].plot(artifact, linewidth=0.3, color="black")
        cells[2].set_box_aspect(1)


def _seen(image_hwc: np.ndarray, spec: SpaceSpec) -> np.ndarray:
    """An image as its space sees it: a spectrum in `frequency`, pixels elsewhere."""
    if spec.kind != "frequency":
        return image_hwc
    return spectrum_picture(pixels(image_hwc.transpose(2, 0, 1)[None], spec.color)[0])


def artifact_picture(artifact_chw: np.ndarray) -> np.ndarray:
    """float [3, H, W] -> [H, W, 3] in [0, 1]: grey is zero, and each artifact has its own scale."""
    return (0.5 + artifact_chw / (2 * max(np.abs(artifact_chw).max(), 1e-12))).transpose(1, 2, 0)


def spectrum_picture(pixels_chw: np.ndarray) -> np.ndarray:
    """Pixels or a residual, float [3, H, W] -> log spectrum, [H, W, 3] in [0, 1]."""
    spectrum_hwc = log_spectrum(pixels_chw[None])[0].transpose(1, 2, 0)
    low, high = np.percentile(spectrum_hwc, (1, 100))
    return ((spectrum_hwc - low) / max(high - low, 1e-12)).clip(0, 1)


def _show(cell: Any, image_hwc: np.ndarray) -> None:
    cell.imshow(image_hwc, interpolation="nearest")
