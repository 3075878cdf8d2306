"""Estimates of the projection through the job, on some of the shipped digits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from manifpt.artifacts import to_numpy
from manifpt.config import ReferenceConfig
from manifpt.decode import decode
from manifpt.estimates import Estimate
from manifpt.estimates.controls import BlurControl
from manifpt.indexing import IndexOptions, index
from manifpt.manifest import write_manifest
from manifpt.planning import plan_reference
from manifpt.reader import read_artifacts, read_plan
from manifpt.reference import finish_bundle
from manifpt.spaces.pixels import log_spectrum
from manifpt.stages import Encoder, commit_codes, decode_rows
from tests.helpers.cluster import job, must
from tests.helpers.images import sample_files, write_files

SOURCES = {"real": 12, "gan": 20, "diffusion": 20}
QUERIES = sum(SOURCES.values())
RUNS: dict[str, tuple[list[object], Estimate]] = {
    "soft": (["--estimate", "soft", "--sigma", 0.05], Estimate(name="soft", sigma=0.05)),
    "mean": (["--estimate", "mean", "--neighbors", 4], Estimate(name="mean", neighbors=4)),
    "blur": (
        ["--estimate", "blur", "--residual-first", "--spaces", "frequency"],
        Estimate(name="blur", sigma=1.0, residual_first=True),
    ),
    "none": (["--estimate", "none", "--spaces", "rgb"], Estimate(name="none")),
}


def build(folder: Path, name: str, size_px: int | None) -> str:
    """A reference of the reals, without Ray."""
    config = ReferenceConfig(manifest=str(folder / "reals.parquet"), output=str(folder / name), size_px=size_px)
    plan, output = plan_reference(config)
    for shard in range(plan.shards):
        commit_codes(plan, output, Encoder(plan.spaces)(decode_rows(plan, shard)))
    finish_bundle(plan, output)
    return output


@pytest.fixture(scope="module")
def folder(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of 148 reals, and a run by each estimate."""
    folder = tmp_path_factory.mktemp("estimates")
    for n, (name, data) in enumerate(sample_files("reference", {"real": 148})):
        assert write_files(iter([(f"real/{n}-{Path(name).name}", data)]), folder / "reals") == 1
    assert write_files(sample_files("query", SOURCES), folder / "queries") == QUERIES
    for name in ("reals", "queries"):
        write_manifest(index([str(folder / name)], IndexOptions(), Counter()), str(folder / f"{name}.parquet"))
    output = build(folder, "reference", 16)
    for name, (flags, _) in RUNS.items():
        arguments = ("--manifest", folder / "queries.parquet", "--reference", output, "--output", folder / name)
        out = must(job("compute_artifacts", *arguments, "--dtype", "float32", *flags, env=cluster))
        assert f"Projected {QUERIES} images" in out
    return folder


def rows_of(folder: Path, run: str, space: str) -> dict[str, dict[str, Any]]:
    (table,) = read_artifacts(str(folder / run), space)
    artifact = to_numpy(table["artifact"])
    rows = table.drop_columns(["artifact"]).to_pylist()
    return {row["image_id"]: row | {"artifact": a} for row, a in zip(rows, artifact, strict=True)}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_says_what_its_projection_is(folder: Path, name: str) -> None:
    estimate = RUNS[name][1]
    plan = read_plan(str(folder / name))
    assert plan.estimate.identity() == estimate.identity()
    assert plan.inline == tuple(spec.name for spec in plan.spaces)
    assert json.loads((folder / name / "plan.json").read_text())["estimate"] == estimate.identity()
    for spec in plan.spaces:
        table = pq.read_table(folder / name / "artifacts" / spec.name)
        assert len(table) == table["neighbor_id"].null_count == QUERIES, "x* is no image of the reference"
        assert np.isfinite(to_numpy(table["artifact"])).all()
        metadata = pq.read_schema(folder / name / "artifacts" / spec.name / "part-00000.parquet").metadata
        assert json.loads(metadata[b"manifpt.estimate"]) == estimate.identity()
        assert metadata[b"manifpt.store"] == b"inline"


@pytest.mark.parametrize("name", list(RUNS))
def test_a_picture_is_drawn(folder: Path, name: str) -> None:
    """A row for three images of each source; something is drawn in it."""
    picture_hwc = imread(folder / name / "preview.png")
    assert picture_hwc.shape[0] > 9 * 100
    assert picture_hwc[..., :3].std() > 0.05


def pixels_of(folder: Path, image_id: str) -> np.ndarray:
    """float32 [3, 16, 16], as the space sees it."""
    view = read_plan(str(folder / "none")).spaces[0].view
    return view.of(decode((folder / "queries" / image_id).read_bytes())).astype(np.float32) / np.float32(255)


def test_what_is_stored_is_what_the_estimates_say(folder: Path) -> None:
    none, mean = (rows_of(folder, name, "rgb") for name in ("none", "mean"))
    blur = rows_of(folder, "blur", "frequency")
    real_nd = np.stack(
        [
            read_plan(str(folder / "none")).spaces[0].view.of(decode(path.read_bytes())).reshape(-1)
            for path in sorted((folder / "reals").rglob("*.png"))
        ]
    ).astype(np.float64) / 255  # fmt: skip
    control = BlurControl((3, 16, 16), 1.0)
    for image_id in list(none)[::5]:
        pixels_chw = pixels_of(folder, image_id)
        np.testing.assert_array_equal(none[image_id]["artifact"], pixels_chw)
        nearest_k = ((real_nd - pixels_chw.reshape(-1)) ** 2).sum(axis=1).argsort()[:4]
        expected_d = pixels_chw.reshape(-1) - real_nd[nearest_k].mean(axis=0)
        np.testing.assert_allclose(mean[image_id]["artifact"].reshape(-1), expected_d, atol=1e-6)
        residual_chw = control.project(pixels_chw.reshape(1, -1)).artifact_bd.reshape(1, 3, 16, 16)
        np.testing.assert_array_equal(blur[image_id]["artifact"], log_spectrum(residual_chw)[0])


def test_a_soft_projection_tells_more_of_a_generator_than_of_a_real(folder: Path) -> None:
    """Held-out reals are near the reals; what generators leave passes the whitening."""
    rows = rows_of(folder, "soft", "rgb").values()
    distance = {source: np.mean([r["distance"] for r in rows if r["source"] == source]) for source in SOURCES}
    assert distance["real"] < min(distance["gan"], distance["diffusion"])


@pytest.mark.slow
def test_a_denoiser_of_the_reference_is_trained_found_again_and_projects(
    folder: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    reference = build(folder, "native", None)  # enlarged digits of 16 px are learned more slowly than a test may last
    arguments = ("--reference", reference, "--space", "rgb", "--output", tmp_path / "denoiser")
    first = job("train_denoiser", *arguments, "--images", 4800, env=cluster)
    assert must(first).startswith("Trained in") and "denoiser_step step=150 steps=150" in first.stderr
    facts = json.loads((tmp_path / "denoiser" / "config.json").read_text())
    assert facts["variance_left"]["0.05"] < 0.9, "on reals that it has not seen"
    again = job("train_denoiser", *arguments, "--images", 4800, env=cluster)
    assert must(again).startswith("Was trained before")
    other = job("train_denoiser", *arguments, "--images", 640, env=cluster)
    assert other.returncode == 2 and "holds another denoiser: images_seen differs" in other.stderr
    run = ("--manifest", folder / "queries.parquet", "--reference", reference, "--output", tmp_path / "run")
    flags = ("--spaces", "rgb", "--estimate", "denoiser", "--denoiser", tmp_path / "denoiser")
    assert f"Projected {QUERIES} images" in must(job("compute_artifacts", *run, *flags, env=cluster))
    assert read_plan(str(tmp_path / "run")).estimate.weights_sha256 == facts["weights_sha256"]
