"""Which artifacts a training sees: rows of a run with a label and a side. Reads everything of the shards but the
artifacts.

Legend: N rows, S labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.attributor.choice import Choice, sides, wanted
from manifpt.documents import check_columns, json_of, parquet_errors
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.plan import Plan
from manifpt.reader import finished_shards, read_plain_plan, read_plan
from manifpt.shards import part_path
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of

__all__ = ["Examples", "Part", "RunRows", "read_rows", "select_examples"]

# With what `fetch` needs: a baseline looks at the image itself.
_COLUMNS = ["image_id", "uri", "container", "offset", "size_bytes", "source", "split", "content_hash", "twin",
            "distance"]  # fmt: skip
_KINDS = {"offset": pa.int64(), "size_bytes": pa.int64(), "distance": pa.float32()}
_GROUP = "latent_group"
_OWN = ("label", "shard", "place")  # columns that examples add
_WHERE_KEPT = ["went_through_jpeg"]  # the codec audit's


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one shard that a side takes.

    Attributes:
        shard: its number.
        place_n: int32 [n], rows of its table.
        label_n: int64 [n].
        row_n: int64 [n], rows of `Examples`.
    """

    shard: int
    place_n: np.ndarray
    label_n: np.ndarray
    row_n: np.ndarray


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows of a run in one space.

    Attributes:
        run: its folder.
        spec, shape, estimate: of its artifacts.
        reference_digest: of its reference.
        dtype, projection: how artifacts are stored, and whether neighbours are exact; of `Plan`.
        labels: S names, sorted.
        table: N rows by `image_id`, so that two runs on the same images have the same rows: with `source`,
            `content_hash`, `shard`, `place` and the group column.
        label_n: int64 [N].
        side_n: int8 [N], of `manifpt.attributor.splits`.
        left_out: images by reason.
        group: the column whose equal values stay together, if there is one.
    """

    run: str
    spec: SpaceSpec
    shape: tuple[int, ...]
    estimate: Estimate
    reference_digest: str
    dtype: str
    projection: str
    labels: tuple[str, ...]
    table: pa.Table
    label_n: np.ndarray
    side_n: np.ndarray
    left_out: dict[str, int]
    group: str | None

    def parts(self, side: int) -> list[Part]:
        """A side's rows, shard by shard."""
        row_n = np.flatnonzero(self.side_n == side)
        all_shard_n, all_place_n = self.table["shard"].to_numpy(), self.table["place"].to_numpy()
        row_n = row_n[np.lexsort((all_place_n[row_n], all_shard_n[row_n]))]
        shard_n, place_n = all_shard_n[row_n], all_place_n[row_n]
        cuts = np.flatnonzero(np.diff(shard_n)) + 1
        return [
            Part(int(shard_n[rows[0]]), place_n[rows], self.label_n[row_n[rows]], row_n[rows])
            for rows in np.split(np.arange(len(row_n)), cuts)
            if len(rows)
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that training depends on but the recipe.

        An image is its pixels: a folder that is sampled again often has the old names. How rows are cut into shards
        changes nothing.
        """
        facts = [
            self.spec.identity(), self.estimate.identity(), self.reference_digest, self.dtype, self.projection,
            list(self.labels),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        names = (self.table[name].to_pylist() for name in ("image_id", "content_hash"))
        for image_id, pixels, label, side in zip(*names, self.label_n.tolist(), self.side_n.tolist(), strict=True):
            digest.update(f"{image_id}\0{pixels}\0{label}\0{side}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class RunRows:
    """All rows of a run in one space, without their artifacts.

    Attributes:
        run, spec, shape, estimate, reference_digest, dtype, projection: as of `Examples`.
        table: every row, by image id.
        group: as of `Examples`.
    """

    run: str
    spec: SpaceSpec
    shape: tuple[int, ...]
    estimate: Estimate
    reference_digest: str
    dtype: str
    projection: str
    table: pa.Table
    group: str | None

    def chosen(self, choice: Choice) -> Examples:
        """Rows with labels and sides.

        Raises:
            ConfigError: too few labels or images, or a group that the manifest's own split cuts.
        """
        table, left_out = wanted(self.table, choice, self.group)
        named = table["label"].to_pylist()
        labels = tuple(sorted(set(named)))
        if len(labels) < (1 if choice.is_test else 2):
            raise ConfigError(
                f"{self.run} has images of {len(labels)} label(s) ({', '.join(labels) or 'none'}): an attributor needs "
                f"two or more."
            )
        number = {label: n for n, label in enumerate(labels)}
        label_n = np.array([number[label] for label in named], np.int64)
        side_n = sides(table, label_n, labels, choice, self.group)
        return Examples(
            self.run, self.spec, self.shape, self.estimate, self.reference_digest, self.dtype, self.projection, labels,
            table, label_n, side_n, left_out, self.group,
        )  # fmt: skip


def select_examples(run: str, space: str, choice: Choice) -> Examples:
    """The rows of a run in one space, labelled and split.

    Raises:
        ConfigError: as of `read_rows` and `RunRows.chosen`.
    """
    return read_rows(run, space, choice.group_column).chosen(choice)


def read_rows(run: str, space: str, group_column: str | None = None, altered: bool = False) -> RunRows:
    """The rows of a run in one space.

    Args:
        run, space, group_column: which.
        altered: whether the run may have altered its images.

    Raises:
        ConfigError: no such run, space or column; a run that isn't finished or altered its images; shards that don't
            belong together.
    """
    if group_column in _OWN:
        raise ConfigError(f"--group-column {group_column}: examples have a column of this name already; use another.")
    plan = read_plan(run) if altered else read_plain_plan(run)
    spec = next((spec for spec in plan.spaces if spec.name == space), None)
    if spec is None:
        known = ", ".join(spec.name for spec in plan.spaces)
        raise ConfigError(f"The run {run} has no space {space!r}; it has {known}.")
    table, shape = _rows(run, plan, spec, group_column)
    group = group_column or (_GROUP if _GROUP in table.column_names else None)
    return RunRows(run, spec, shape, plan.estimate, plan.reference_digest, plan.dtype, plan.projection, table, group)


def _rows(run: str, plan: Plan, spec: SpaceSpec, group_column: str | None) -> tuple[pa.Table, tuple[int, ...]]:
    """The light columns of all committed shards, and the shape of an artifact."""
    shards = finished_shards(run, plan)
    columns = list(dict.fromkeys([*_COLUMNS, *([group_column] if group_column else [])]))
    optional = [name for name in (_GROUP, *_WHERE_KEPT) if name not in columns]

    def read(shard: int) -> tuple[pa.Table, tuple[int, ...] | None]:
        uri = join(run, part_path("artifacts", spec.name, shard))
        with store_of(uri).open(uri) as stream, parquet_errors(uri):
            file = pq.ParquetFile(stream)
            shape = _checked(file.schema_arrow.metadata or {}, plan, spec, uri)
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ConfigError(
                    f"The shards of {run} have no column {missing[0]!r}: index the images again with --keep-columns "
                    f"{missing[0]}, or leave out --group-column."
                )
            check_columns(file.schema_arrow, uri, {name: _KINDS.get(name, pa.string()) for name in _COLUMNS})
            table = file.read([*columns, *(name for name in optional if name in file.schema_arrow.names)])
            table.validate(full=True)
        place = pa.array(np.arange(len(table)), pa.int32())
        table = table.append_column("shard", pa.array(np.full(len(table), shard), pa.int32()))
        return table.append_column("place", place).replace_schema_metadata(None), shape

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, shards))
    shapes = {shape for _, shape in found if shape is not None}
    if len(shapes) != 1:
        raise ConfigError(f"The shards of {run} hold artifacts of {len(shapes)} shapes: compute them again.")
    return pa.concat_tables([table for table, _ in found]).sort_by("image_id").combine_chunks(), shapes.pop()


def _checked(metadata: Mapping[bytes, bytes], plan: Plan, spec: SpaceSpec, uri: str) -> tuple[int, ...] | None:
    """The shape that a part states; one of another run does not belong here."""

    def stated(key: str) -> str:
        return metadata.get(f"manifpt.{key}".encode(), b"").decode()

    if stated("space") != spec.name:
        raise ConfigError(f"{uri} is of space {stated('space')!r}, not {spec.name!r}: shards of two spaces are mixed.")
    if stated("reference_digest") != plan.reference_digest:
        raise ConfigError(f"{uri} was projected onto another reference than its run's: compute the artifacts again.")
    if stated("plan_digest") != plan.digest:
        raise ConfigError(f"{uri} is of another run than its folder's: compute the artifacts again.")
    shape = json_of(stated("shape").encode() or b"[]", uri)
    return tuple(int(n) for n in shape) or None
