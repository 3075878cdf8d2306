"""Small run folders made by the project's own functions, without Ray; most of them without images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt import cluster, distributed, pipeline
from manifpt.alterations import NONE
from manifpt.artifacts import artifact_table, parquet_bytes, tensor_column, to_numpy
from manifpt.attributor.examples import Part
from manifpt.attributor.features import FeatureStatistics
from manifpt.attributor.openset import OpenSet
from manifpt.attributor.spectrum import spectrum_size
from manifpt.config import IndexConfig, ReferenceConfig
from manifpt.estimates import Estimate
from manifpt.monitoring.attributing import Attributing, commit_attributions
from manifpt.plan import Plan, publish_plan
from manifpt.projecting import Projecting
from manifpt.reader import ArtifactReader
from manifpt.runs import build_reference, index_images
from manifpt.shards import commit_shard, part_path, tally
from manifpt.spaces import SpaceSpec
from manifpt.stages import Encoder, Shard, commit_artifacts, commit_codes, decode_rows
from tests.helpers.images import sample_files, write_files
from tests.helpers.workers import LoneWorker

SHAPE = (3, 4, 4)


def rows_of(sources: Mapping[str, int], **columns: Sequence[Any]) -> pa.Table:
    """A manifest's rows, every source's images one after the other, with what a shard adds."""
    names = [source for source, count in sources.items() for _ in range(count)]
    ids = [f"{source}/{n:04d}.png" for source, count in sources.items() for n in range(count)]
    count = len(ids)
    table = {
        "image_id": ids,
        "uri": [f"/nowhere/{name}" for name in ids],
        "container": pa.nulls(count, pa.string()),
        "offset": pa.nulls(count, pa.int64()),
        "size_bytes": pa.array([100] * count, pa.int64()),
        "source": names,
        "split": pa.nulls(count, pa.string()),
        "content_hash": [hashlib.sha256(name.encode()).hexdigest() for name in ids],
        "neighbor_id": ["real/0.png"] * count,
        "distance": pa.array([1.0] * count, pa.float32()),
        "twin": pa.nulls(count, pa.string()),
    }
    return pa.table(table | {name: pa.array(values) for name, values in columns.items()})


def artifacts_of(rows: pa.Table, shape: tuple[int, ...] = SHAPE, gap: float = 3.0) -> np.ndarray:
    """float16 [N, *shape], of each image always the same; sources differ in one coordinate each."""
    found = []
    for image_id, source in zip(rows["image_id"].to_pylist(), rows["source"].to_pylist(), strict=True):
        seed = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:4], "big")
        artifact = np.random.default_rng(seed).standard_normal(int(np.prod(shape)))
        artifact[hashlib.sha256(source.encode()).digest()[0] % len(artifact)] += gap
        found.append(artifact)
    return np.reshape(found, (len(found), *shape)).astype(np.float16)


def openset_of(
    labels: int, features: int = 512, threshold: float = 1e9, temperature: float = 1.0, shape: tuple[int, ...] = SHAPE
) -> OpenSet:
    """Of a bundle that was never trained: labels whose features lie apart, by distance; nothing is called unknown."""
    mean_sf = np.random.default_rng(0).standard_normal((labels, features))
    numbers = spectrum_size(shape)
    spectra = (np.zeros((labels, numbers)), np.tile(np.eye(numbers), (labels, 1, 1)))
    known = FeatureStatistics(np.full(labels, 30.0), mean_sf, np.eye(features), *spectra)
    return OpenSet(known, known.axes(), temperature, "distance", {}, threshold)


def make_run(
    folder: Path,
    rows: pa.Table,
    shard_rows: int = 16,
    spaces: tuple[str, ...] = ("rgb",),
    estimate: Estimate | None = None,
    reference_digest: str = "r" * 64,
    artifacts: Callable[[pa.Table], np.ndarray] = artifacts_of,
    shards: int | None = None,
    alter: str = NONE,
    manifest_digest: str = "m",
    reference_uri: str = "nowhere",
) -> Path:
    """A run; finished, unless it has fewer `shards` than its plan."""
    specs = tuple(SpaceSpec(name=name, kind=name, height_px=4, width_px=4) for name in spaces)
    plan = Plan(
        task="artifacts", manifest_uri="m.parquet", manifest_digest=manifest_digest, rows=len(rows),
        shard_rows=shard_rows, spaces=specs, reference_uri=reference_uri, reference_digest=reference_digest,
        inline=spaces, decoder="d", estimate=estimate or Estimate(), alter=alter,
    )  # fmt: skip
    publish_plan(plan, str(folder))
    for shard in range(plan.shards if shards is None else shards):
        of_shard = rows.slice(plan.rows_of(shard).start, len(plan.rows_of(shard)))
        found, parts = artifacts(of_shard), {}
        for spec in specs:
            metadata = {
                "space": spec.name, "shape": list(found.shape[1:]), "dtype": "float16", "store": "inline",
                "reference_digest": plan.reference_digest, "plan_digest": plan.digest, "spec": spec.identity(),
                "estimate": plan.estimate.identity(),
            }  # fmt: skip
            flat = found.reshape(len(of_shard), -1)
            parts[part_path("artifacts", spec.name, shard)] = artifact_table(of_shard, flat, found.shape[1:], metadata)
        commit_shard(str(folder), shard, parts, [], {})
    if shards is None:
        (folder / "_SUCCESS").write_bytes(b"")
    return folder


def rewritten(part: Path, artifacts: np.ndarray | None = None, metadata: Mapping[str, str] | None = None) -> None:
    """A part with other artifacts or metadata, and else as it was; its commit says so."""
    table = pq.read_table(part)
    known = dict(table.schema.metadata)
    if artifacts is not None:
        table = table.set_column(table.column_names.index("artifact"), "artifact", tensor_column(artifacts))
    known |= {f"manifpt.{name}".encode(): value.encode() for name, value in (metadata or {}).items()}
    data = parquet_bytes(table.replace_schema_metadata(known))
    part.write_bytes(data)
    run, shard = part.parents[2], part.stem.removeprefix("part-")
    commit = json.loads((run / f"commits/{shard}.json").read_text())
    commit["parts"][str(part.relative_to(run))]["sha256"] = hashlib.sha256(data).hexdigest()
    (run / f"commits/{shard}.json").write_text(json.dumps(commit))


def sample_reference(folder: Path, reals: int, sources: Mapping[str, int]) -> str:
    """Images of the sample: a reference of some, and `queries.parquet` of others; to be called without Ray.

    Returns:
        The reference.
    """
    write_files(sample_files("reference", {"real": reals}), folder / "reals")
    write_files(sample_files("query", dict(sources)), folder / "queries")
    for name in ("reals", "queries"):
        index_images(IndexConfig(input=(str(folder / name),), output=str(folder / f"{name}.parquet")))
    build_reference(ReferenceConfig(manifest=str(folder / "reals.parquet"), output=str(folder / "reference")))
    return str(folder / "reference")


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Runs, scans and references then compute in this process, stage by stage."""

    def run(
        plan: Plan, output: str, shards: Sequence[int], most_actors: int | None = None, gpu: bool = False
    ) -> Iterator[dict[str, Any]]:
        stages: list[Callable[[Shard], Shard]] = []
        commit = {"artifacts": commit_artifacts, "reference": commit_codes, "attributions": commit_attributions}
        if plan.task == "attributions":
            stages = [Attributing(plan)]
        elif plan.task == "artifacts":
            stages = [Projecting(plan, share=share) for share in range(plan.reference_shards)]
        for number in shards:
            shard = Encoder(plan.spaces)(decode_rows(plan, number))
            for stage in stages:
                shard = stage(shard)
            done = commit[plan.task](plan, output, shard)
            yield done | {"tally": tally(done, plan.task)}

    patch.setattr(cluster, "connect", lambda: None)
    patch.setattr(cluster, "on_one_node", lambda: True)
    patch.setattr(pipeline, "run", run)


def trained_without_ray(patch: pytest.MonkeyPatch) -> None:
    """`train_attributor` then trains in this process."""

    class Reading(LoneWorker):
        def __init__(self, columns: dict[str, np.ndarray], folder: Path) -> None:
            super().__init__(folder)
            self._columns = columns

        def columns(self) -> dict[str, np.ndarray]:
            return self._columns

    def rows(parts: Mapping[str, Sequence[Part]], space: str, task_cpus: float) -> dict[str, np.ndarray]:
        found = [
            (ArtifactReader(run, space).read(part.shard, part.place_n), part)
            for run, of in parts.items()
            for part in of
        ]
        return {
            "artifact": np.concatenate([to_numpy(table["artifact"]) for table, _ in found]),
            "label": np.concatenate([part.label_n for _, part in found]),
            "row": np.concatenate([part.row_n for _, part in found]),
        }

    def workers(train: Callable[..., None], job: Any, output: str, shares: Any, columns: dict[str, np.ndarray]) -> None:
        train(Reading(columns, Path(output) / "checkpoints"), job)

    patch.setattr(cluster, "cluster", lambda: (1.0, 0.0, 1))
    patch.setattr(pipeline, "artifact_rows", rows)
    patch.setattr(distributed, "run_workers", workers)


def resealed(bundle: Path) -> None:
    """Lets a bundle's config name its files as they are now: what someone does who changes them on purpose."""
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["files"] = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in config["files"]}
    path.write_text(json.dumps(config))
