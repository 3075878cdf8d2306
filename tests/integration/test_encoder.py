"""From reals to an encoder, to a space of it, to artifacts: by the jobs that users start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from manifpt.artifacts import to_numpy
from manifpt.config import IndexConfig
from manifpt.reader import read_artifacts, read_plan
from manifpt.runs import index_images
from tests.helpers.cluster import job, must
from tests.helpers.images import sample_files, write_files

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of 120 reals, one of them damaged, and of 20 queries."""
    folder = tmp_path_factory.mktemp("encoder")
    write_files(sample_files("reference", {"real": 120}), folder / "reals")
    write_files(sample_files("query", {"gan": 10, "diffusion": 10}), folder / "queries")
    next((folder / "reals").rglob("*.png")).write_bytes(b"no image")
    for name in ("reals", "queries"):
        index_images(IndexConfig(input=(str(folder / name),), output=str(folder / f"{name}.parquet")))
    return folder


@pytest.mark.slow
def test_an_encoder_is_trained_by_two_workers_and_becomes_a_space(
    folder: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("--manifest", folder / "reals.parquet", "--output", tmp_path / "encoder", "--size-px", 16)
    size = ("--epochs", 2, "--batch-size", 32, "--workers", 2)
    first = job("pretrain_encoder", *arguments, *size, env=cluster)
    assert must(first).startswith("Trained in") and "pretraining_epoch epoch=2" in first.stderr
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["images"] == 118 and config["images_an_epoch"] == 96 and len(config["loss"]) == 2
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    assert weights["conv1.weight"].shape == (64, 3, 3, 3) and not any("projector" in name for name in weights)
    assert not list((tmp_path / "encoder").rglob("*.pt*"))
    again = job("pretrain_encoder", *arguments, *size, env=cluster)
    assert must(again).startswith("Was trained before") and "pretraining_epoch" not in again.stderr
    other = job("pretrain_encoder", *arguments, "--epochs", 3, env=cluster)
    assert other.returncode == 2 and "fewer than a batch of 128" in other.stderr

    reference = ("--manifest", folder / "reals.parquet", "--output", tmp_path / "reference")
    flags = ("--spaces", "selfsupervised", "--encoder", tmp_path / "encoder")
    must(job("build_reference", *reference, *flags, env=cluster))
    run = (
        "--manifest",
        folder / "queries.parquet",
        "--reference",
        tmp_path / "reference",
        "--output",
        tmp_path / "run",
    )
    (tmp_path / "own.yaml").write_text(f"own_spaces: {{selfsupervised: {{encoder: {tmp_path / 'encoder'}}}}}")
    assert "20 images" in must(job("compute_artifacts", *run, "--config", tmp_path / "own.yaml", "--dry-run"))
    assert "Projected 20 images" in must(job("compute_artifacts", *run, env=cluster))
    assert read_plan(str(tmp_path / "run")).spaces[0].weights_sha256 == config["weights_sha256"]
    (table,) = read_artifacts(str(tmp_path / "run"), "selfsupervised")
    artifacts = to_numpy(table["artifact"])
    assert artifacts.shape == (20, 512) and np.isfinite(artifacts).all() and (table["distance"].to_numpy() > 0).all()
