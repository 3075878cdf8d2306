"""From a bucket of published images to committed shards, and what others read in them; on a subset of gm_cifar10."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifpt.artifacts import to_numpy
from manifpt.decode import decode
from manifpt.reader import read_artifacts
from manifpt.reference import Codes, Reference, open_bundle
from manifpt.spaces import SpaceSpec, make_space
from tests.helpers.cluster import job, must
from tests.helpers.images import cifar_files, put_objects
from tests.helpers.s3 import BUCKET
from tests.helpers.weights import lite0_config, lite0_safetensors

SOURCES = {
    "chengbin_ddpm_conditional": 60,
    "chrischute_realnvp": 150,
    "duke_dcgan": 300,
    "duke_wgan_clipping": 200,
    "pclucas14_pixelcnnpp": 200,
    "pfnet_wgan_gp": 90,
}
QUERIES = sum(SOURCES.values())  # 1,000
REALS = 3000
SPACES = ("rgb", "frequency", "lite0")
ROOT = f"s3://{BUCKET}/cifar"


@pytest.fixture(scope="module")
def run(
    cifar: Path, s3: dict[str, str], cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """Index, reference and artifacts, all in the bucket; a local copy of the run and the reference."""
    folder = tmp_path_factory.mktemp("cifar")
    env = {**s3, **cluster}
    assert put_objects(cifar_files(cifar, {"real_cifar10_jpeg": REALS}), BUCKET, "cifar/reals", s3) == REALS
    assert put_objects(cifar_files(cifar, SOURCES), BUCKET, "cifar/generated", s3) == QUERIES
    weights = lite0_safetensors(folder / "lite0.safetensors")
    put_objects(iter([("lite0.safetensors", weights.read_bytes())]), BUCKET, "cifar/weights", s3)
    config = lite0_config(folder / "config.yaml", f"{ROOT}/weights/lite0.safetensors", size_px=96)
    real, generated = f"{ROOT}/real.parquet", f"{ROOT}/generated.parquet"
    must(job("index_images", "--input", f"{ROOT}/reals", "--source", "real", "--output", real, env=env))
    must(job("index_images", "--input", f"{ROOT}/generated", "--output", generated, env=env))
    arguments = ("--config", config, "--manifest", real, "--output", f"{ROOT}/reference", "--spaces", *SPACES)
    must(job("build_reference", *arguments, env=env))
    arguments = ("--manifest", generated, "--reference", f"{ROOT}/reference", "--output", f"{ROOT}/run")
    dry = must(job("compute_artifacts", *arguments, "--shard-rows", 256, "--dry-run", env=env))
    assert f"{QUERIES:,} images in 4 shards of 256; 0 shards are done." in dry
    out = must(job("compute_artifacts", *arguments, "--shard-rows", 256, env=env))
    assert f"Projected {QUERIES:,} images" in out
    for name in ("run", "reference"):
        download(f"cifar/{name}", folder / name, s3)
    return folder, env


def download(prefix: str, folder: Path, env: dict[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
    )  # fmt: skip
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        for item in page["Contents"]:
            path = folder / item["Key"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, item["Key"], str(path))


def table_of(folder: Path, space: str) -> pa.Table:
    parts = sorted((folder / "run" / "artifacts" / space).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def test_every_image_has_a_row_in_every_space(run: tuple[Path, dict[str, str]]) -> None:
    folder, _ = run
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["shards_committed"] == summary["shards"] == 4
    assert summary["rejected"] == {"images": 0, "reasons": {}}
    for space in SPACES:
        table = table_of(folder, space)
        assert table["image_id"].to_pylist() == sorted(table["image_id"].to_pylist())
        counts = {row["values"]: row["counts"] for row in table["source"].value_counts().to_pylist()}
        assert counts == SOURCES
        assert {name: found["images"] for name, found in summary["spaces"][space].items()} == SOURCES
        assert set(table["neighbor_id"].to_pylist()) <= {f"{n:05d}.jpeg" for n in range(REALS)} | {
            f"real_cifar10_jpeg/{n:05d}.jpeg" for n in range(REALS)
        }


@pytest.mark.parametrize("space", SPACES)
def test_neighbors_and_artifacts_are_those_of_float64_brute_force(
    run: tuple[Path, dict[str, str]], cifar: Path, space: str
) -> None:
    """1,000 real generated images against NumPy, in each space; the embeddings made anew from the bundle."""
    folder, _ = run
    spec = _spec(folder, space)
    reference = Reference(Codes(open_bundle(str(folder / "reference")), spec.code_key), spec, threads=2)
    reference_nd = reference.embeddings_of(slice(None))
    queries = dict(cifar_files(cifar, SOURCES))
    table = table_of(folder, space)
    view = reference.space.spec.view
    views_bchw = np.stack([view.of(decode(queries[image_id])) for image_id in table["image_id"].to_pylist()])
    codes = make_space(spec, threads=2).encode(views_bchw)
    query_bd = reference.space.embed(codes).reshape(len(table), -1)

    nearest_b, ties_b = brute_force(query_bd, reference_nd)
    ids = np.array(reference.codes.image_ids.to_pylist())
    stored_b = np.array(table["neighbor_id"].to_pylist())
    differing = stored_b != ids[nearest_b]
    assert not (differing & ~ties_b).any()
    assert ties_b.mean() < 0.01, "too many ties: the comparison would show little"

    expected = (query_bd.astype(np.float64) - reference_nd[nearest_b].astype(np.float64))[~differing]
    stored = to_numpy(table["artifact"]).reshape(len(table), -1)[~differing]
    assert stored.dtype == np.float16
    # float16 rounding is half a unit in the last place; the network's own rounding differs a little by batch.
    slack = 1e-4 * np.abs(query_bd).max() if space == "lite0" else 1e-6
    assert (np.abs(stored - expected) <= np.abs(expected) * 2.0**-11 + 2.0**-24 + slack).all()
    distance_b = np.sqrt((expected**2).sum(axis=1))
    np.testing.assert_allclose(
        table["distance"].to_numpy()[~differing], distance_b, rtol=1e-3 if space == "lite0" else 1e-5
    )


def brute_force(query_bd: np.ndarray, reference_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest rows [B], and whether the second is as near to within float32's rounding of the embeddings themselves."""
    nearest_b, ties_b = [], []
    for x_d in query_bd.astype(np.float64):
        squared_n = ((reference_nd - x_d) ** 2).sum(axis=1)
        first = int(squared_n.argmin())
        nearest_b.append(first)
        ties_b.append(np.partition(squared_n, 1)[1] - squared_n[first] <= 1e-5 * squared_n[first])
    return np.array(nearest_b), np.array(ties_b)


def _spec(folder: Path, space: str) -> SpaceSpec:
    from dataclasses import replace

    spec = open_bundle(str(folder / "reference")).spaces[space]
    return replace(spec, weights=str(folder / "lite0.safetensors")) if spec.kind == "network" else spec


def test_frequency_is_the_formula(run: tuple[Path, dict[str, str]], cifar: Path) -> None:
    """The stored artifact against the paper's formula, written out, from the two image files."""
    folder, _ = run
    queries = dict(cifar_files(cifar, SOURCES))
    reals = dict(cifar_files(cifar, {"real_cifar10_jpeg": REALS}))

    def phi(data: bytes) -> np.ndarray:
        image_chw = decode(data).transpose(2, 0, 1) / 255.0
        return np.stack([np.log(np.abs(np.fft.fftshift(np.fft.fft2(channel))) + 1e-12) for channel in image_chw])

    table = table_of(folder, "frequency").slice(0, 50)
    for row, stored in zip(table.drop_columns("artifact").to_pylist(), to_numpy(table["artifact"]), strict=True):
        neighbor = row["neighbor_id"] if "/" in row["neighbor_id"] else f"real_cifar10_jpeg/{row['neighbor_id']}"
        expected = phi(queries[row["image_id"]]) - phi(reals[neighbor])
        np.testing.assert_allclose(stored, expected, rtol=2.0**-10, atol=1e-5)
        assert row["distance"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_duckdb_polars_and_pandas_read_the_shards(run: tuple[Path, dict[str, str]], space: str) -> None:
    folder, _ = run
    part = folder / "run" / "artifacts" / space / "part-00001.parquet"
    table = pq.read_table(part)
    expected = to_numpy(table["artifact"]).astype(np.float32).reshape(len(table), -1)
    shape = [1280] if space == "lite0" else [3, 32, 32]

    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(part).metadata.items()}
    assert metadata["manifpt.space"] == space
    assert json.loads(metadata["manifpt.shape"]) == shape
    assert metadata["manifpt.dtype"] == "float16"
    assert metadata["manifpt.reference_digest"] == open_bundle(str(folder / "reference")).digest

    connection = duckdb.connect()
    query = "select image_id, source, neighbor_id, distance, artifact from read_parquet(?) order by image_id"
    rows = connection.execute(query, [str(part)]).fetchall()
    assert [row[0] for row in rows] == table["image_id"].to_pylist()
    np.testing.assert_array_equal(np.array(rows[0][4], np.float32).reshape(-1), expected[0])
    found = dict(
        connection.execute("select key::varchar, value::varchar from parquet_kv_metadata(?)", [str(part)]).fetchall()
    )
    assert found["manifpt.space"] == space

    frame = pl.read_parquet(part)
    assert frame["neighbor_id"].to_list() == table["neighbor_id"].to_pylist()
    np.testing.assert_array_equal(frame["artifact"].to_numpy().astype(np.float32).reshape(len(table), -1), expected)

    pandas = pd.read_parquet(part)
    assert pandas["distance"].tolist() == table["distance"].to_pylist()
    np.testing.assert_array_equal(np.stack(pandas["artifact"]).astype(np.float32), expected)


def test_lazy_shards_give_the_same_artifacts(run: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, env = run
    arguments = ("--manifest", f"{ROOT}/generated.parquet", "--reference", f"{ROOT}/reference", "--shard-rows", 256)
    must(job("compute_artifacts", *arguments, "--output", f"{ROOT}/lazy", "--store", "lazy", env=env))
    for name, value in env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("manifpt.storage._s3", __import__("functools").cache(_fresh_s3))
    for space in SPACES:
        lazy = list(read_artifacts(f"{ROOT}/lazy", space, threads=2))
        inline = list(read_artifacts(f"{ROOT}/run", space))
        for one, other in zip(lazy, inline, strict=True):
            assert one["neighbor_id"] == other["neighbor_id"]
            made, stored = to_numpy(one["artifact"]), to_numpy(other["artifact"])
            if space == "lite0":  # another number of threads rounds otherwise
                np.testing.assert_allclose(made.astype(np.float32), stored.astype(np.float32), atol=5e-3)
            else:
                np.testing.assert_array_equal(made, stored)


def _fresh_s3() -> object:
    from manifpt.storage_s3 import S3Store

    return S3Store()
