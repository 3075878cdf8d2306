"""Artifacts back from a run folder, shard by shard; lazy ones are made again from the image and its neighbour.

Legend: B images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.alterations import NONE, altered_as
from manifpt.artifacts import in_format, tensor_column
from manifpt.decode import content_hash, decode
from manifpt.documents import Kinds, json_of, object_of
from manifpt.errors import BadImage, ConfigError
from manifpt.estimates import Estimate
from manifpt.estimates.residual import artifacts_of, projected_in
from manifpt.fetch import fetch
from manifpt.plan import Plan
from manifpt.reference import Reference, held_codes, open_bundle
from manifpt.shards import committed_shards, part_path, read_commit, read_part
from manifpt.spaces import SpaceSpec, make_space
from manifpt.storage import join, normalize, store_of

__all__ = ["ArtifactReader", "finished_shards", "image_of_run", "read_artifacts", "read_plain_plan", "read_plan"]

_PLAN: Kinds = {
    "task": str, "manifest_uri": str, "manifest_digest": str, "rows": int, "shard_rows": int, "spaces": list,
    "reference_uri": str, "reference_digest": str, "dtype": str, "inline": list, "decoder": str,
}  # fmt: skip
_OPTIONAL: Kinds = {"projection": str, "reference_shards": int, "alter": str}


def read_plan(output: str) -> Plan:
    """The plan of a run folder.

    Raises:
        ConfigError: there is none, or a damaged one.
    """
    try:
        data = store_of(output).read(join(output, "plan.json"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no run at {output}; make one with jobs/compute_artifacts.py.") from error
    where = f"The plan of {output}"
    document = object_of(json_of(data, where), where, _PLAN)
    object_of(document, where, {name: kind for name, kind in _OPTIONAL.items() if name in document})
    if document["task"] != "artifacts":
        raise ConfigError(
            f"{output} has no artifacts (its task is {document['task']!r}): name a run of compute_artifacts."
        )
    if document["shard_rows"] < 1 or document["rows"] < 0:
        raise ConfigError(f"{where} is damaged (rows or shard_rows): make the run again.")
    for name in ("manifest_uri", "reference_uri", "attributor_uri"):
        if document.get(name):  # "" where there is none
            normalize(document[name])  # refuses what is no place, before storage is asked for it
    fields = {name: document[name] for name in Plan.__dataclass_fields__ if name in document}
    fields["spaces"] = tuple(SpaceSpec.from_json(spec) for spec in document["spaces"])
    fields["inline"] = tuple(document["inline"])
    fields["estimate"] = Estimate.from_json(document.get("estimate"))
    return Plan(**fields)


def read_plain_plan(output: str) -> Plan:
    """The plan of a run of images as they are.

    Raises:
        ConfigError: there is none, or the run altered its images: what is said of them holds for no other.
    """
    plan = read_plan(output)
    if plan.alter != NONE:
        raise ConfigError(
            f"{output} altered its images first (--alter {plan.alter}), and only train_attributor takes such a run, as "
            f"--altered-artifacts: name the run without --alter."
        )
    return plan


def finished_shards(output: str, plan: Plan) -> list[int]:
    """Numbers of a run's shards, all of which are done.

    Raises:
        ConfigError: they aren't, or too many images were rejected.
    """
    shards = sorted(committed_shards(output))
    if len(shards) < plan.shards or store_of(output).stat(join(output, "_SUCCESS")) is None:
        raise ConfigError(
            f"{output} has {len(shards)} of {plan.shards} shards, or was not ended: end it first with "
            f"jobs/compute_artifacts.py, the same command again."
        )
    return shards


def read_artifacts(output: str, space: str, threads: int = 1, device: str = "cpu") -> Iterator[pa.Table]:
    """A finished run's shards in order, each with its `artifact` column, whether it was stored or not.

    Args:
        output: the run folder.
        space: one of the run's.
        threads, device: for the network of a lazy space.

    Raises:
        ConfigError: no such run or space; one that isn't finished, or a shard that is damaged; an image of a lazy
            shard that is gone or changed.
    """
    reader = ArtifactReader(output, space, threads, device)
    for shard in finished_shards(output, reader.plan):
        yield reader.read(shard)


class ArtifactReader:
    """Shards of one run and space, in any order."""

    def __init__(self, output: str, space: str, threads: int = 1, device: str = "cpu") -> None:
        """See `read_artifacts`."""
        self.plan = plan = read_plan(output)
        if space not in (spec.name for spec in plan.spaces):
            known = ", ".join(spec.name for spec in plan.spaces)
            raise ConfigError(f"The run {output} has no space {space!r}; it has {known}.")
        self._output, self._space = output, space
        self._again = None if space in plan.inline else _Again(plan, space, threads, device)

    def read(self, shard: int, places: np.ndarray | None = None) -> pa.Table:
        """A shard's rows, or those at some places, with their `artifact` column."""
        commit = read_commit(self._output, shard)
        table = read_part(self._output, part_path("artifacts", self._space, shard), commit=commit)
        if places is not None:
            table = table.take(pa.array(places))
        return table if self._again is None else self._again.made(table)


class _Again:
    """Makes lazy artifacts again: the same code as in the pipeline, on the same images."""

    def __init__(self, plan: Plan, name: str, threads: int, device: str) -> None:
        bundle = open_bundle(plan.reference_uri)
        if bundle.digest != plan.reference_digest:
            raise ConfigError(f"The reference {plan.reference_uri} is not the one of this run; lazy artifacts need it.")
        self._dtype, self._alter = plan.dtype, plan.alter
        self._spec, self._estimate = bundle.spaces[name], plan.estimate
        sought_in = projected_in(self._spec, plan.estimate)
        self._space = make_space(sought_in, threads, device)
        self._reference = Reference(held_codes(bundle, sought_in.code_key), sought_in, threads)

    def made(self, table: pa.Table) -> pa.Table:
        """The table with its artifacts."""
        records = table.select(["image_id", "uri", "container", "offset", "size_bytes", "content_hash"]).to_pylist()
        shape = self._reference.shape
        views = [self._view(row, data) for row, data in zip(records, fetch(records), strict=True)]
        if not views:
            return table.append_column("artifact", tensor_column(np.empty((0, *shape), self._dtype)))
        embeddings = self._space.embed(self._space.encode(np.stack(views)))
        rows = pc.index_in(table["neighbor_id"].combine_chunks(), value_set=self._reference.codes.image_ids)
        neighbors_bd = self._reference.embeddings_of(rows.to_numpy())
        residual_bd = embeddings.reshape(len(views), -1) - neighbors_bd
        artifact = in_format(artifacts_of(residual_bd, self._spec, self._estimate), self._dtype, self._spec.name)
        return table.append_column("artifact", tensor_column(artifact.reshape(-1, *shape)))

    def _view(self, row: dict[str, Any], data: bytes | BadImage) -> np.ndarray:
        image_hwc = image_of_run(row, data)
        return self._space.spec.view.of(altered_as(image_hwc, self._alter, row["image_id"]))


def image_of_run(row: dict[str, Any], data: bytes | BadImage) -> np.ndarray:
    """An image that a run has seen, read again: uint8 [H, W, 3].

    Args:
        row: with its `uri`, and the `content_hash` that the run found.
        data: what `fetch` returned.

    Raises:
        ConfigError: it is gone, or another one.
    """
    try:
        if isinstance(data, BadImage):
            raise data
        image_hwc = decode(data)
    except BadImage as bad:
        raise ConfigError(
            f"{row['uri']} can't be read any more ({bad.reason.value}): compute its artifacts again, inline."
        ) from bad
    if content_hash(image_hwc) != row["content_hash"]:
        raise ConfigError(f"{row['uri']} was changed since the run: compute its artifacts again.")
    return image_hwc
