"""Which artifacts a training sees: rows of a run with a label and a side. Reads everything of the shards but the
artifacts.

Legend: N rows, S labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from manifpt.attributor.splits import SIDES, TEST, assign_splits
from manifpt.config import RowsConfig
from manifpt.documents import check_columns, json_of, parquet_errors
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.manifest import REAL
from manifpt.plan import Plan
from manifpt.reader import read_plain_plan, read_plan
from manifpt.shards import committed_shards, part_path
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of

__all__ = ["Choice", "Examples", "Part", "RunRows", "choice_of", "drawn", "read_labels", "read_rows", "select_examples"]

# With what `fetch` needs: a baseline looks at the image itself.
_COLUMNS = ["image_id", "uri", "container", "offset", "size_bytes", "source", "split", "content_hash", "twin",
            "distance"]  # fmt: skip
_KINDS = {"offset": pa.int64(), "size_bytes": pa.int64(), "distance": pa.float32()}
_GROUP = "latent_group"
_WHERE_KEPT = ["went_through_jpeg"]  # the codec audit's
_SAID = ("min_images", "most_images", "group_column", "seed")
_USES = {"train": "train on", "validation": "choose by (validation)", "test": "test on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which rows, and on which side each.

    Attributes:
        labels: by source, what it is called; None: it is left out. Sources that aren't named keep their name.
        min_images: a label with fewer is left out.
        most_images: of a label, drawn by image id; None: all.
        group_column: rows that share a value lie on one side; None: `latent_group`, where the shards have it.
        seed: of the sides.
        image_ids: those to choose among; None: all of the run.
        is_test: all images are to test on; one label is enough.
    """

    labels: Mapping[str, str | None]
    min_images: int = 1
    most_images: int | None = None
    group_column: str | None = None
    seed: int = 0
    image_ids: pa.Array | None = None
    is_test: bool = False

    def facts(self) -> dict[str, Any]:
        """What of it a user says, as an attributor's `config.json` keeps it to find its test images again."""
        return {"labels": dict(self.labels)} | {name: getattr(self, name) for name in _SAID}

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Choice:
        """The inverse of `facts`."""
        return Choice(labels=facts["labels"], **{name: facts[name] for name in _SAID})


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
        """SHA-256 of everything that training depends on but the recipe."""
        facts = [self.spec.identity(), self.estimate.identity(), self.reference_digest, list(self.labels)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for image_id, label, side in zip(
            self.table["image_id"].to_pylist(), self.label_n.tolist(), self.side_n.tolist(), strict=True
        ):
            digest.update(f"{image_id}\0{label}\0{side}\n".encode())
        return digest.hexdigest()


def choice_of(config: RowsConfig) -> Choice:
    """The choice that a command's flags make.

    Raises:
        ConfigError: no images at most, or a label map that can't be read.
    """
    if config.most_images is not None and config.most_images < 1:
        raise ConfigError(f"--most-images must be at least 1, not {config.most_images}.")
    return Choice(
        labels=read_labels(config.labels),
        min_images=config.min_images,
        most_images=config.most_images,
        group_column=config.group_column,
    )


def read_labels(path: str | None) -> dict[str, str | None]:
    """A label map from YAML: `source: label`, or `source: null` to leave one out.

    Raises:
        ConfigError: no such file, or no map.
    """
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Can't read --labels {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, str | None) for k, v in found.items()
    ):
        raise ConfigError(f"--labels {path} must map sources to labels (text), or to null to leave a source out.")
    return found


@dataclass(frozen=True, slots=True)
class RunRows:
    """All rows of a run in one space, without their artifacts.

    Attributes:
        run, spec, shape, estimate, reference_digest: as of `Examples`.
        table: every row, by image id.
        group: as of `Examples`.
    """

    run: str
    spec: SpaceSpec
    shape: tuple[int, ...]
    estimate: Estimate
    reference_digest: str
    table: pa.Table
    group: str | None

    def chosen(self, choice: Choice) -> Examples:
        """Rows with labels and sides.

        Raises:
            ConfigError: too few labels or images.
        """
        table, left_out = _wanted(self.table, choice)
        named = table["label"].to_pylist()
        labels = tuple(sorted(set(named)))
        if len(labels) < (1 if choice.is_test else 2):
            raise ConfigError(
                f"{self.run} has images of {len(labels)} label(s) ({', '.join(labels) or 'none'}): an attributor needs "
                f"two or more."
            )
        number = {label: n for n, label in enumerate(labels)}
        label_n = np.array([number[label] for label in named], np.int64)
        side_n = _sides(table, label_n, labels, choice, self.group)
        return Examples(
            self.run, self.spec, self.shape, self.estimate, self.reference_digest, labels, table, label_n, side_n,
            left_out, self.group,
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
    plan = read_plan(run) if altered else read_plain_plan(run)
    spec = next((spec for spec in plan.spaces if spec.name == space), None)
    if spec is None:
        known = ", ".join(spec.name for spec in plan.spaces)
        raise ConfigError(f"The run {run} has no space {space!r}; it has {known}.")
    table, shape = _rows(run, plan, spec, group_column)
    group = group_column or (_GROUP if _GROUP in table.column_names else None)
    return RunRows(run, spec, shape, plan.estimate, plan.reference_digest, table, group)


def _rows(run: str, plan: Plan, spec: SpaceSpec, group_column: str | None) -> tuple[pa.Table, tuple[int, ...]]:
    """The light columns of all committed shards, and the shape of an artifact."""
    shards = sorted(committed_shards(run))
    if len(shards) < plan.shards or store_of(run).stat(join(run, "_SUCCESS")) is None:
        raise ConfigError(
            f"{run} has {len(shards)} of {plan.shards} shards, or was not ended: end it first with "
            f"jobs/compute_artifacts.py, the same command again."
        )
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


def _wanted(table: pa.Table, choice: Choice) -> tuple[pa.Table, dict[str, int]]:
    """Without what the choice leaves out, and without reals of which the reference holds a copy.

    The distance of such a real says nothing of a real that is new; a copy that a generator made is its own doing.
    """
    left_out: dict[str, int] = {}

    def keep(mask_n: np.ndarray, reason: str) -> None:
        nonlocal table
        if not mask_n.all():
            left_out[reason] = int((~mask_n).sum())
            table = table.filter(pa.array(mask_n))

    if choice.image_ids is not None:
        table = table.filter(pc.is_in(table["image_id"], value_set=choice.image_ids))
    named = [choice.labels.get(source, source) for source in table["source"].to_pylist()]
    table = table.append_column("label", pa.array(named, pa.string()))
    is_copy = [
        source == REAL and twin in ("copy", "near_copy")
        for source, twin in zip(table["source"].to_pylist(), table["twin"].to_pylist(), strict=True)
    ]
    keep(~np.array(is_copy, bool), "real near copies of the reference")
    keep(table["label"].is_valid().to_numpy(), "sources left out by the label map")
    counts = {row["values"]: row["counts"] for row in table["label"].value_counts().to_pylist()}
    few = [label for label, count in counts.items() if count < choice.min_images]
    keep(~pc.is_in(table["label"], value_set=pa.array(few, pa.string())).to_numpy(), "labels with few images")
    if choice.most_images is not None:
        label_n = np.array(table["label"].to_pylist(), dtype=object)
        keep(drawn(label_n, table["image_id"].to_pylist(), choice.most_images), "beyond the most images of a label")
    return table, left_out


def drawn(label_n: np.ndarray, image_ids: Sequence[str], most: int) -> np.ndarray:
    """bool [N]: at most so many of each label, those whose image id has the smallest hash."""
    key_n = np.array([hashlib.blake2b(image_id.encode(), digest_size=8).hexdigest() for image_id in image_ids])
    kept_n = np.zeros(len(label_n), bool)
    for label in set(label_n.tolist()):
        of_label = np.flatnonzero(label_n == label)
        kept_n[of_label[np.argsort(key_n[of_label], kind="stable")[:most]]] = True
    return kept_n


def _sides(
    table: pa.Table, label_n: np.ndarray, labels: Sequence[str], choice: Choice, group: str | None
) -> np.ndarray:
    """The manifest's own split where it names one for every image, else a new one."""
    if choice.is_test:
        return np.full(len(label_n), TEST, np.int8)
    own = set(pc.unique(table["split"]).to_pylist())
    if own and own <= set(SIDES):
        side_n = np.array([SIDES.index(split) for split in table["split"].to_pylist()], np.int8)
        for side, name in enumerate(SIDES):
            lacking = set(range(len(labels))) - set(label_n[side_n == side].tolist())
            if lacking:
                raise ConfigError(
                    f"By the manifest's own split, {labels[min(lacking)]} has no image to {_USES[name]}: index the "
                    f"images again without --split and --split-column for a new split, or leave it out with --labels."
                )
        return side_n
    keys: list[list[Any]] = [table["content_hash"].to_pylist()]
    if group:
        keys.append([None if v in (None, "") else str(v) for v in table[group].to_pylist()])
    return assign_splits(label_n, keys, table["image_id"].to_pylist(), choice.seed, sources=labels)
