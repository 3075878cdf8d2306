"""What bad input gets: typed rejections, exit codes, one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.cluster import job, must
from tests.helpers.images import bad_files, encoded, odd_but_good_files, picture, put_objects, write_files
from tests.helpers.s3 import BUCKET, flaky_proxy

REALS = 40


def reals() -> Iterator[tuple[str, bytes]]:
    for seed in range(REALS):
        yield f"real/{seed:03d}.png", encoded(picture(seed=100 + seed), "PNG")


def queries() -> Iterator[tuple[str, bytes]]:
    for name, data in odd_but_good_files().items():
        yield f"odd/{name}", data
    for name, (data, _) in bad_files().items():
        yield f"bad/{name}", data


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, cluster: dict[str, str]) -> Path:
    """A folder with images, manifests and a reference."""
    folder = tmp_path_factory.mktemp("bad")
    write_files(reals(), folder / "reals")
    write_files(queries(), folder / "queries")
    must(job("index_images", "--input", folder / "reals", "--output", folder / "real.parquet"))
    must(job("index_images", "--input", folder / "queries", "--output", folder / "queries.parquet"))
    must(job("build_reference", "--manifest", folder / "real.parquet", "--output", folder / "reference", env=cluster))
    return folder


def test_bad_images_are_rejected_with_a_reason_and_the_job_goes_on(workplace: Path, cluster: dict[str, str]) -> None:
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    run = workplace / "run"
    gone = workplace / "queries" / "odd" / "grey.png"
    hidden = gone.read_bytes()
    gone.unlink()  # after it was indexed
    changed = workplace / "queries" / "odd" / "cmyk.jpg"
    original = changed.read_bytes()
    changed.write_bytes(original + b"more")
    try:
        arguments = ("--manifest", workplace / "queries.parquet", "--reference", workplace / "reference")
        out = must(job("compute_artifacts", *arguments, "--output", run, "--max-rejected", "50", env=cluster))
    finally:
        gone.write_bytes(hidden)
        changed.write_bytes(original)
    assert "rejected" in out
    table = pq.read_table(run / "rejected.parquet").to_pylist()
    reasons = {row["image_id"]: row["reason"] for row in table}
    expected = {f"bad/{name}": reason for name, (_, reason) in bad_files().items()}
    assert reasons == expected | {"odd/grey.png": "missing", "odd/cmyk.jpg": "changed"}
    assert all(row["space"] is None and row["detail"] and row["source"] in {"bad", "odd"} for row in table)
    for space in ("rgb", "frequency"):
        ids = set(pq.read_table(run / "artifacts" / space / "part-00000.parquet")["image_id"].to_pylist())
        assert ids == {f"odd/{name}" for name in odd_but_good_files()} - {"odd/grey.png", "odd/cmyk.jpg"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rejected"]["images"] == len(reasons)
    assert (run / "_SUCCESS").exists()
    assert (run / "preview.png").exists()
    after = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file() and run not in path.parents}
    assert after == before, "something was written outside the run folder"


def test_too_many_rejected_is_exit_3_and_the_list_is_there(workplace: Path, cluster: dict[str, str]) -> None:
    arguments = ("--manifest", workplace / "queries.parquet", "--reference", workplace / "reference")
    run = workplace / "few"
    result = job("compute_artifacts", *arguments, "--output", run, "--max-rejected", "3", env=cluster)
    assert result.returncode == 3
    assert "error: 9 images were rejected, 3 are allowed" in result.stderr
    assert pq.read_table(run / "rejected.parquet").num_rows == 9
    assert not (run / "_SUCCESS").exists()
    must(job("compute_artifacts", *arguments, "--output", run, "--max-rejected", "50%", env=cluster))
    assert (run / "_SUCCESS").exists()


def test_the_same_from_s3_with_what_only_s3_can_do(
    workplace: Path, cluster: dict[str, str], s3: dict[str, str]
) -> None:
    """404 and 403, keys with a line feed, a reference and a run folder in a bucket."""
    with flaky_proxy(s3["AWS_ENDPOINT_URL"], 0, forbidden="/odd/alpha.png") as (endpoint, *_):
        check_bucket(workplace, {**cluster, **s3}, {**cluster, **s3, "AWS_ENDPOINT_URL": endpoint}, s3)


def check_bucket(workplace: Path, env: dict[str, str], run_env: dict[str, str], s3: dict[str, str]) -> None:
    root = f"s3://{BUCKET}/bad-input"
    put_objects(reals(), BUCKET, "bad-input/reals", s3)
    put_objects(queries(), BUCKET, "bad-input/queries", s3)
    for name in ("reals", "queries"):
        must(job("index_images", "--input", f"{root}/{name}", "--output", f"{root}/{name}.parquet", env=env))
    must(job("build_reference", "--manifest", f"{root}/reals.parquet", "--output", f"{root}/reference", env=env))
    import boto3

    client = boto3.client(
        "s3", endpoint_url=s3["AWS_ENDPOINT_URL"], aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
    )  # fmt: skip
    client.delete_object(Bucket=BUCKET, Key="bad-input/queries/odd/line\nfeed.png")
    client.put_object(Bucket=BUCKET, Key="bad-input/queries/odd/a..b.png", Body=encoded(picture(seed=77), "PNG"))
    arguments = ("--manifest", f"{root}/queries.parquet", "--reference", f"{root}/reference")
    must(job("compute_artifacts", *arguments, "--output", f"{root}/run", "--max-rejected", "50", env=run_env))

    def table(key: str) -> list[dict[str, str]]:
        import pyarrow as pa

        data = client.get_object(Bucket=BUCKET, Key=f"bad-input/run/{key}")["Body"].read()
        return pq.read_table(pa.BufferReader(data)).to_pylist()

    reasons = {row["image_id"]: row["reason"] for row in table("rejected.parquet")}
    expected = {f"bad/{name}": reason for name, (_, reason) in bad_files().items()}
    assert reasons == expected | {
        "odd/line\nfeed.png": "missing",
        "odd/a..b.png": "changed",
        "odd/alpha.png": "forbidden",
    }
    rows = {row["image_id"]: row for row in table("artifacts/rgb/part-00000.parquet")}
    assert set(rows) == {f"odd/{name}" for name in odd_but_good_files()} - set(reasons)
    local = pq.read_table(workplace / "run" / "artifacts" / "rgb" / "part-00000.parquet").to_pylist()
    for row in local:  # the same neighbours and distances as from the file system
        if row["image_id"] in rows:
            assert (row["neighbor_id"], row["distance"]) == tuple(
                rows[row["image_id"]][k] for k in ("neighbor_id", "distance")
            )


USUAL = {"manifest": "{w}/queries.parquet", "reference": "{w}/reference", "output": "{w}/x"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manifest": "{w}/none.parquet"}, "There is no manifest"),
        ({"manifest": "{w}/reference/reference.parquet"}, "is no manifest"),
        ({"manifest": "{w}/reference/plan.json"}, "is no Parquet file"),
        ({"reference": "{w}/none"}, "no finished reference"),
        ({"output": None}, "needs --manifest, --reference and --output"),
        ({"spaces": "supervised"}, "has no space 'supervised'; it has rgb, frequency"),
        ({"output": "{w}/run", "dtype": "float32"}, "holds a run with another plan: the stored number format"),
        ({"max-rejected": "few"}, "a number of images or a percentage"),
        ({"shard-rows": "0"}, "must be at least 1"),
        ({"output": "s3x://b/x"}, "unknown scheme"),
        ({"output": "{w}/queries.parquet/x"}, "Can't write "),
        ({"config": "{w}/none.yaml"}, "Can't read --config"),
    ],
)
def test_configuration_errors_are_exit_2_and_one_sentence(
    workplace: Path, changes: dict[str, str | None], words: str
) -> None:
    """No cluster is needed: a mistake is found before anything starts."""
    flags = {name: value for name, value in {**USUAL, **changes}.items() if value is not None}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value.format(w=workplace))]
    result = job("compute_artifacts", *arguments)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert not (workplace / "x").exists()


def test_another_reference_than_the_config_says(workplace: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("own_spaces:\n  rgb:\n    size_px: 64\n")
    arguments = (
        "--manifest",
        workplace / "queries.parquet",
        "--reference",
        workplace / "reference",
        "--output",
        tmp_path / "x",
    )
    result = job("compute_artifacts", "--config", config, *arguments)
    assert result.returncode == 2
    assert "size_px is 64 in the config and None in the reference" in result.stderr


def test_no_such_bucket_and_wrong_keys(workplace: Path, s3: dict[str, str]) -> None:
    result = job("index_images", "--input", "s3://no-such-bucket-here/x", "--output", workplace / "x.parquet", env=s3)
    assert result.returncode == 2
    assert "There is no bucket 'no-such-bucket-here'" in result.stderr
    # pragma: allowlist nextline secret  # a wrong one is what this is about
    wrong = {**s3, "AWS_SECRET_ACCESS_KEY": "wrong"}
    result = job("index_images", "--input", f"s3://{BUCKET}/bad-input", "--output", workplace / "x.parquet", env=wrong)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
