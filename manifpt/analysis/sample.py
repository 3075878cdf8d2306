"""The images that an analysis looks at: artifacts and embeddings of a run, and reals of its reference, in one space.

Legend: B images, N reals, S labels, D dimensions.

A label has at most 1,000 images here, and the reference lends as many reals: so memory grows with the number of
generators, and not with the number of shards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.artifacts import to_numpy
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples, read_rows
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.estimates.residual import projected_in
from manifpt.reader import ArtifactReader, read_plan
from manifpt.reference import Codes, Reference, open_bundle
from manifpt.spaces import SpaceSpec

__all__ = ["MOST_IMAGES", "Sample", "embeddings_known", "few", "open_sample"]

MOST_IMAGES = 1000


@dataclass(frozen=True)
class Sample:
    """Rows of a run in one space; what is large is read when it is asked for.

    Attributes:
        run: its folder.
        examples: the rows that were chosen.
        row_b: int64 [B], those of the examples that are looked at.
        labels: S names.
        label_b: int64 [B].
        image_ids: B names.
        seed: of the reals that are drawn.
    """

    run: str
    examples: Examples
    row_b: np.ndarray
    labels: tuple[str, ...]
    label_b: np.ndarray
    image_ids: tuple[str, ...]
    seed: int

    def of_rows(self, row_b: np.ndarray) -> Sample:
        """Other rows of the examples, int64 [B]."""
        image_ids = self.examples.table["image_id"].take(pa.array(row_b)).to_pylist()
        found = replace(self, row_b=row_b, label_b=self.examples.label_n[row_b], image_ids=tuple(image_ids))
        if "_reference" in self.__dict__:  # once opened, for all
            found.__dict__["_reference"] = self._reference
        return found

    def at_most(self, images: int) -> Sample:
        """So many rows of each label; what isn't looked at isn't read."""
        return self.of_rows(self.row_b[few(self.label_b, self.image_ids, images)])

    def first_of_groups(self) -> np.ndarray:
        """int64 [M]: places of one image of each group and label, and of all that are of none."""
        group = self.examples.group
        if group is None:
            return np.arange(len(self.row_b))
        seen: set[tuple[int, str]] = set()
        found = []
        names = self.examples.table[group].take(pa.array(self.row_b)).to_pylist()
        for place, (label, name) in enumerate(zip(self.label_b.tolist(), names, strict=True)):
            if name in (None, "") or (label, str(name)) not in seen:
                found.append(place)
            seen.add((label, str(name)))
        return np.array(found, np.int64)

    @property
    def in_reference_b(self) -> np.ndarray:
        """bool [B], whether the reference holds the very image, which was left out when it was projected."""
        twins = self.examples.table["twin"].take(pa.array(self.row_b)).to_pylist()
        return np.array([twin == "left_out" for twin in twins], bool)

    @property
    def spec(self) -> SpaceSpec:
        """Of the space."""
        return self.examples.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an artifact: (D,) or (3, H, W)."""
        return self.examples.shape

    @functools.cached_property
    def _tables(self) -> pa.Table:
        """Neighbour and artifact of the B images, in their order."""
        reader = ArtifactReader(self.run, self.spec.name)
        shard_b, place_b = (self.examples.table[name].to_numpy()[self.row_b] for name in ("shard", "place"))
        tables, orders = [], []
        for shard in np.unique(shard_b):
            of_shard = np.flatnonzero(shard_b == shard)
            table = reader.read(int(shard), place_b[of_shard])
            tables.append(table.select(["neighbor_id", "artifact"]).replace_schema_metadata(None))
            orders.append(of_shard)
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(orders))))

    @functools.cached_property
    def artifact_bd(self) -> np.ndarray:
        """float32 [B, D]."""
        column = self._tables["artifact"]
        parts = [to_numpy(chunk).reshape(len(chunk), -1).astype(np.float32) for chunk in column.chunks]
        return np.concatenate(parts)

    @property
    def distance_b(self) -> np.ndarray:
        """float32 [B], Euclidean."""
        return np.asarray(self.examples.table["distance"].take(pa.array(self.row_b)).to_numpy())

    @functools.cached_property
    def _reference(self) -> Reference:
        plan = read_plan(self.run)
        bundle = open_bundle(plan.reference_uri)
        if bundle.digest != plan.reference_digest:
            raise ConfigError(f"The reference {plan.reference_uri} is not the one of the run {self.run}; restore it.")
        return Reference(Codes(bundle, self.spec.code_key), bundle.spaces[self.spec.name])

    @functools.cached_property
    def real_nd(self) -> np.ndarray:
        """float32 [N, D], embeddings of reals drawn from the reference."""
        count = len(self._reference.codes.array)
        drawn_n = np.random.default_rng(self.seed).permutation(count)[:MOST_IMAGES]
        return self._reference.embeddings_of(np.sort(drawn_n))

    @functools.cached_property
    def embedding_bd(self) -> np.ndarray:
        """float32 [B, D], phi(x) = a(x) + phi(x*), as exact as the artifacts are stored; see `embeddings_known`."""
        if self.examples.estimate.name == "none":
            return self.artifact_bd
        rows = pc.index_in(self._tables["neighbor_id"].combine_chunks(), value_set=self._reference.codes.image_ids)
        return self.artifact_bd + self._reference.embeddings_of(rows.to_numpy())


def embeddings_known(estimate: Estimate, spec: SpaceSpec) -> bool:
    """Whether a run's artifacts tell the embeddings: those of projections that are samples, or nothing."""
    return estimate.name in ("nearest", "random", "none") and projected_in(spec, estimate) is spec


def few(label_b: np.ndarray, image_ids: Sequence[str], most: int) -> np.ndarray:
    """int64: at most so many rows of each label, evenly over its images in order of their ids."""
    kept = []
    for label in np.unique(label_b):
        of_label = np.flatnonzero(label_b == label)
        of_label = of_label[np.argsort(np.array(image_ids, object)[of_label], kind="stable")]
        kept.append(of_label[np.linspace(0, len(of_label) - 1, min(most, len(of_label))).round().astype(int)])
    return np.sort(np.concatenate(kept))


def open_sample(run: str, space: str, choice: Choice, group_column: str | None = None) -> Sample:
    """The rows of a run in one space that an analysis looks at.

    Args:
        run, space: of a finished run.
        choice: of labels; sides don't matter.
        group_column: as of `Choice`.

    Raises:
        ConfigError: no such run or space, or no image that is left.
    """
    examples = read_rows(run, space, group_column).chosen(choice)
    image_ids = examples.table["image_id"].to_pylist()
    row_b = few(examples.label_n, image_ids, MOST_IMAGES)
    return Sample(
        run=run, examples=examples, row_b=row_b, labels=examples.labels, label_b=examples.label_n[row_b],
        image_ids=tuple(image_ids[row] for row in row_b), seed=choice.seed,
    )  # fmt: skip
