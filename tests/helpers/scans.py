"""A small attributor of the shipped sample, without one of its generators, and a bucket that fills in waves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt.attributor.train import train_attributor
from manifpt.config import ArtifactsConfig, IndexConfig, ReferenceConfig, ScanConfig, TrainConfig
from manifpt.runs import build_reference, compute_artifacts, index_images
from tests.helpers.images import sample_files, write_files
from tests.helpers.runs import trained_without_ray, without_ray

HIDDEN = "vae"
TRAINED = {"real": 160, "gan": 160, "flow": 160, "diffusion": 160}


def make_attributor(folder: Path) -> None:
    """`reference` and `attributor` of the sample but for `HIDDEN`; of every source, the first images."""
    write_files(sample_files("reference", {"real": 400}), folder / "reals")
    write_files(sample_files("query", dict(TRAINED)), folder / "train")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        trained_without_ray(patch)
        for name in ("reals", "train"):
            index_images(IndexConfig(input=(str(folder / name),), output=str(folder / f"{name}.parquet")))
        reference, run = str(folder / "reference"), str(folder / "run")
        build_reference(ReferenceConfig(manifest=str(folder / "reals.parquet"), output=reference, spaces=("rgb",)))
        compute_artifacts(ArtifactsConfig(manifest=str(folder / "train.parquet"), reference=reference, output=run))
        output = str(folder / "attributor")
        train_attributor(TrainConfig(artifacts=run, space="rgb", output=output, network="head", epochs=6))


def new_files(count: int, start: int = 0, sources: tuple[str, ...] = tuple(TRAINED)) -> Iterator[tuple[str, bytes]]:
    """`count` images of each source that training hasn't seen, after the first `start` such; flat names."""
    most = {source: TRAINED.get(source, 0) + start + count for source in sources}
    seen: dict[str, int] = {}
    for name, data in sample_files("query", most):
        source = name.partition("/")[0]
        seen[source] = seen.get(source, 0) + 1
        if source in sources and seen[source] > TRAINED.get(source, 0) + start:
            yield name.replace("/", "-"), data


def config_of(folder: Path, output: Path, *inputs: Path, **changes: object) -> ScanConfig:
    """Of a scan with what `make_attributor` made."""
    fields = {
        "input": tuple(str(path) for path in inputs) or (str(folder / "bucket"),),
        "attributor": str(folder / "attributor"),
        "reference": str(folder / "reference"),
        "output": str(output),
    }
    return ScanConfig(**(fields | changes))  # type: ignore[arg-type]


def attributions(output: Path) -> pa.Table:
    """Every row that was ever written, by shard."""
    parts = sorted((output / "attributions").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(path).replace_schema_metadata(None) for path in parts])
