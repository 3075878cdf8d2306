"""The images that a training is to see, and on which side each.

Legend: N rows, S labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from manifpt.attributor.splits import SIDES, TEST, assign_splits
from manifpt.config import RowsConfig
from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.manifest import REAL

__all__ = ["Choice", "choice_of", "drawn", "read_labels", "sides", "wanted"]

_LIKE_SIDES = {*SIDES, "val", "valid", "dev"}
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


def wanted(table: pa.Table, choice: Choice, group: str | None) -> tuple[pa.Table, dict[str, int]]:
    """Without what the choice leaves out, without reals of which the reference holds a copy, and without what the
    manifest's own split lets leak.

    The distance of a real copy says nothing of a real that is new; a copy that a generator made is its own doing.

    Raises:
        ConfigError: a group that the manifest's own split cuts.
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
    if not choice.is_test and _is_split(table):
        _refuse_cut_groups(table, group)
        keep(~_is_leaked(table), "identical images on two sides of the manifest's own split")
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


def _is_split(table: pa.Table) -> bool:
    """Whether the manifest itself names a side for every image."""
    own = set(pc.unique(table["split"]).to_pylist())
    return bool(own) and own <= set(SIDES)


def _refuse_cut_groups(table: pa.Table, group: str | None) -> None:
    """Raises:
    ConfigError: images of one group lie on two sides.
    """
    if group is None:
        return
    sides: dict[str, str] = {}
    for value, side in zip(table[group].to_pylist(), table["split"].to_pylist(), strict=True):
        if value not in (None, "") and sides.setdefault(str(value), side) != side:
            raise ConfigError(
                f"The manifest's own split has images of {group} {str(value)!r} on {sides[str(value)]} and {side}: "
                f"what is learnt on one side would be asked for on the other. Mend the split, or index the images "
                f"again without --split and --split-column for a new one that keeps groups whole."
            )


def _is_leaked(table: pa.Table) -> np.ndarray:
    """bool [N]: images of which another side has the same pixels; of the sides that have some, the last keeps them."""
    side_n = np.array([SIDES.index(split) for split in table["split"].to_pylist()])
    pixels = table["content_hash"].to_pylist()
    last: dict[str, int] = {}
    for value, side in zip(pixels, side_n.tolist(), strict=True):
        last[value] = max(side, last.get(value, side))
    return side_n < np.array([last[value] for value in pixels], np.int64)


def sides(table: pa.Table, label_n: np.ndarray, labels: Sequence[str], choice: Choice, group: str | None) -> np.ndarray:
    """int8 [N]: the manifest's own split where it names one for every image, else a new one.

    Raises:
        ConfigError: a label that lacks a side, and as of `assign_splits`.
    """
    if choice.is_test:
        return np.full(len(label_n), TEST, np.int8)
    if _is_split(table):
        _refuse_cut_groups(table, group)
        if _is_leaked(table).any():  # the split became whole only when images without a side were left out
            raise ConfigError(
                "The manifest's own split has identical images on two sides, and images without a side that "
                "--min-images, --most-images or --labels left out: leave them out of the manifest, or index the images "
                "again without --split and --split-column."
            )
        side_n = np.array([SIDES.index(split) for split in table["split"].to_pylist()], np.int8)
        for side, name in enumerate(SIDES):
            lacking = set(range(len(labels))) - set(label_n[side_n == side].tolist())
            if lacking:
                raise ConfigError(
                    f"By the manifest's own split, {labels[min(lacking)]} has no image to {_USES[name]}: index the "
                    f"images again without --split and --split-column for a new split, or leave it out with --labels."
                )
        return side_n
    names = {str(name) for name in pc.unique(table["split"]).to_pylist()}
    if names & _LIKE_SIDES:
        hint = "a split names train, validation or test for every image; a new one is drawn"
        event("split_not_used", names=", ".join(sorted(names)), hint=hint)
    keys: list[list[Any]] = [table["content_hash"].to_pylist()]
    if group:
        keys.append([None if v in (None, "") else str(v) for v in table[group].to_pylist()])
    return assign_splits(label_n, keys, table["image_id"].to_pylist(), choice.seed, sources=labels)
