"""A recipe's choice of manifest rows: reference, queries, labels, caps.

Legend: N rows of a label, K rows kept of them.

No seed and no shuffling: the same images give the same choice, on every machine. What a choice needs is a row's place
among the images of its file or folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.errors import ConfigError
from manifpt.manifest import REAL
from manifpt.recipes.framing import framed_name
from manifpt.recipes.load import labels
from manifpt.recipes.schema import Part, Recipe
from manifpt.storage import join

__all__ = ["ORIGINAL", "Selected", "inputs", "select"]

ORIGINAL = "recipe_source"  # the column that keeps a row's source where `source` becomes the label


@dataclass(frozen=True, slots=True)
class Selected:
    """Manifest rows, sorted as the manifest is.

    Attributes:
        reference: real images to project onto.
        queries: images to project: `source` is the label, and `recipe_source` what it was.
        left_out: label -> why it has no rows here.
    """

    reference: pa.Table
    queries: pa.Table
    left_out: dict[str, str]


def inputs(recipe: Recipe, root: str, framed_root: str) -> list[str]:
    """What to index, in one call.

    Args:
        root: where the user's images are.
        framed_root: where the files of `framed_table` are; unused by recipes without crops.

    Returns:
        The root itself in the layout `folders`, since ids are relative to what is indexed; else one URI a file.
    """
    if recipe.images.layout == "folders":
        return [root]
    files = [join(root, source.file) for source in recipe.used if source.file]
    for part in (*recipe.real.reference, *recipe.real.queries):
        whole = [] if part.crops_px else [join(root, part.path)]
        files += whole + [join(framed_root, framed_name(part.path, crop_px)) for crop_px in part.crops_px]
    return list(dict.fromkeys(files))


def select(recipe: Recipe, rows: pa.Table) -> Selected:
    """Divides the rows of a manifest of everything that `inputs` names.

    A label's cap takes rows at equal steps, from each of its sources by turns, so that no training step and no source
    dominates. Rows of sources that the recipe doesn't know are ignored.

    Args:
        rows: all rows of the manifest, in its order, with the recipe's kept columns.

    Raises:
        ConfigError: a missing column, or no image where the reference or the queries should be.
    """
    missing = [name for name in recipe.images.keep_columns if name not in rows.column_names]
    if missing:
        raise ConfigError(f"The manifest has no column {missing[0]!r}; index with --keep-columns {missing[0]}.")
    source_n = np.array(rows["source"].to_pylist(), dtype=object)
    reference = _of_parts(recipe.real.reference, recipe, rows, source_n)
    if not len(reference):
        raise ConfigError(f"Recipe {recipe.name} finds no real image for its reference; it needs {_wanted(recipe)}.")
    chosen: list[np.ndarray] = []
    left_out = {label: source.exclude for source in recipe.sources if source.exclude for label in [source.class_label]}
    left_out = {label: reason for label, reason in left_out.items() if label not in labels(recipe).values()}
    by_label: dict[str, list[np.ndarray]] = {}
    for source, label in labels(recipe).items():
        found_n = (
            _of_parts(recipe.real.queries, recipe, rows, source_n) if source == REAL else _at(source_n, source, rows)
        )
        by_label.setdefault(label, []).append(found_n)
    for label, sources in by_label.items():
        count = sum(map(len, sources))
        if count < recipe.min_images:
            left_out[label] = f"{count} images; the recipe asks for {recipe.min_images}"
        else:
            chosen.append(_capped(sources, recipe.most_images))
    if not chosen:
        raise ConfigError(f"Recipe {recipe.name}: no label has {recipe.min_images} images; lower min_images.")
    query_n = np.sort(np.concatenate(chosen))
    queries = rows.take(pa.array(query_n))
    to_label = labels(recipe)
    label_n = pa.array([to_label[name] for name in queries["source"].to_pylist()], pa.string())
    originals = queries["source"]
    queries = queries.set_column(queries.column_names.index("source"), rows.schema.field("source"), label_n)
    return Selected(rows.take(pa.array(reference)), queries.append_column(ORIGINAL, originals), left_out)


def _wanted(recipe: Recipe) -> str:
    return ", ".join(sorted({part.path for part in recipe.real.reference}))


def _at(source_n: np.ndarray, source: str, rows: pa.Table) -> np.ndarray:
    """Row numbers of a source, in the order of its file: a manifest sorts `a#10` before `a#9`."""
    return _in_order(np.flatnonzero(source_n == source), rows)


def _in_order(number_n: np.ndarray, rows: pa.Table) -> np.ndarray:
    offset_n = np.array(pc.fill_null(rows["offset"], -1).take(pa.array(number_n)).to_pylist(), np.int64)
    return number_n[np.argsort(offset_n, kind="stable")]


def _of_parts(parts: tuple[Part, ...], recipe: Recipe, rows: pa.Table, source_n: np.ndarray) -> np.ndarray:
    found = [number_n for part in parts for number_n in _of_part(part, recipe, rows, source_n)]
    return np.sort(np.unique(np.concatenate(found))) if found else np.zeros(0, np.int64)


def _of_part(part: Part, recipe: Recipe, rows: pa.Table, source_n: np.ndarray) -> Iterator[np.ndarray]:
    is_real_n = source_n == REAL
    if recipe.images.layout == "folders":
        names, file_n = [part.path], source_n
    else:
        names = [framed_name(part.path, crop_px) for crop_px in part.crops_px] or [part.path]
        file_n = np.array([uri.rpartition("/")[2] for uri in rows["uri"].to_pylist()], dtype=object)
    for name in names:
        number_n = _in_order(np.flatnonzero(is_real_n & (file_n == name)), rows)
        if part.column is not None:
            texts = rows[part.column].take(pa.array(number_n)).to_pylist()
            number_n = number_n[[str(text or "").startswith(part.prefix or "") for text in texts]]
        place_n = np.arange(len(number_n))
        if part.every is not None:
            number_n = number_n[place_n % part.every == 0]
        if part.except_every is not None:
            number_n = number_n[place_n % part.except_every != 0]
        yield number_n


def _capped(sources: list[np.ndarray], most: int | None) -> np.ndarray:
    """At most so many row numbers, evenly from each source: a source with less than its share gives the rest away."""
    if most is None:
        return np.concatenate(sources)
    share: Counter[int] = Counter()
    order = sorted(range(len(sources)), key=lambda place: len(sources[place]))
    left = most
    for done, place in enumerate(order):
        share[place] = min(len(sources[place]), left // (len(order) - done))
        left -= share[place]
    return np.concatenate([_spread(number_n, share[place]) for place, number_n in enumerate(sources)])


def _spread(number_n: np.ndarray, count: int) -> np.ndarray:
    """So many of them, at equal steps."""
    return number_n[np.arange(count) * len(number_n) // max(count, 1)]
