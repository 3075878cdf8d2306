"""A real image is never projected onto itself, however it gets among the queries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from tests.helpers.cluster import job, must
from tests.helpers.images import encoded, picture, write_files


def test_leave_one_out_for_reals_and_zero_for_copies(tmp_path: Path, cluster: dict[str, str]) -> None:
    reals = {f"real/{seed:02d}.png": encoded(picture(seed=seed), "PNG") for seed in range(30)}
    reals["real/zz_twin_of_05.bmp"] = encoded(picture(seed=5), "BMP")  # the same pixels in another file
    write_files(iter(reals.items()), tmp_path / "reals")
    queries = {
        "real/05.png": reals["real/05.png"],  # a file with the same pixels, elsewhere
        "real/new.png": encoded(picture(seed=99), "PNG"),
        "gan/copy.png": encoded(picture(seed=7), "PNG"),  # a generator that memorised
        "gan/own.png": encoded(picture(seed=98), "PNG"),
    }
    write_files(iter(queries.items()), tmp_path / "queries")
    for name in ("reals", "queries"):
        must(job("index_images", "--input", tmp_path / name, "--output", tmp_path / f"{name}.parquet"))
    reference = tmp_path / "reference"
    build = ("--manifest", tmp_path / "reals.parquet", "--output", reference, "--shard-rows", "16")
    must(job("build_reference", *build, env=cluster))
    common = ("--reference", reference, "--spaces", "rgb")
    must(
        job(
            "compute_artifacts",
            "--manifest",
            tmp_path / "queries.parquet",
            *common,
            "--output",
            tmp_path / "run",
            env=cluster,
        )
    )
    rows = {row["image_id"]: row for row in pq.read_table(tmp_path / "run/artifacts/rgb").to_pylist()}
    assert rows["real/05.png"]["distance"] > 1
    assert rows["real/05.png"]["neighbor_id"] not in {"real/05.png", "real/zz_twin_of_05.bmp"}
    assert (rows["gan/copy.png"]["distance"], rows["gan/copy.png"]["neighbor_id"]) == (0, "real/07.png")
    found = json.loads((tmp_path / "run/summary.json").read_text())["spaces"]["rgb"]
    assert (found["real"]["left_out"], found["gan"]["copies"]) == (1, 1)

    # The same with the reference in two parts, each in actors of its own, and by looking at everything.
    parts = ("--manifest", tmp_path / "queries.parquet", *common, "--reference-shards", 2, "--projection", "flat")
    must(job("compute_artifacts", *parts, "--output", tmp_path / "in-parts", env=cluster))
    part = "artifacts/rgb/part-00000.parquet"
    assert (tmp_path / "in-parts" / part).read_bytes() == (tmp_path / "run" / part).read_bytes()

    # The reference's own images as queries: under a source that does not say that they are real, and under other ids.
    for name, root in (("self", tmp_path / "reals"), ("other_root", tmp_path)):
        must(job("index_images", "--input", root, "--source", "photos", "--output", tmp_path / f"{name}.parquet"))
        arguments = ("--manifest", tmp_path / f"{name}.parquet", *common, "--output", tmp_path / name)
        must(job("compute_artifacts", *arguments, "--max-rejected", "50%", env=cluster))
        table = pq.read_table(tmp_path / name / "artifacts/rgb")
        ours = [row for row in table.drop_columns("artifact").to_pylist() if f"{tmp_path}/reals/" in row["uri"]]
        assert len(ours) == len(reals)
        assert min(row["distance"] for row in ours) > 1
        assert {row["twin"] for row in ours} == {"left_out"}
        for path in (tmp_path / name).glob("*.parquet"):
            path.unlink()  # the next root is the folder above
        shutil.rmtree(tmp_path / name)
