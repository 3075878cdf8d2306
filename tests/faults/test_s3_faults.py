"""S3 answers 503 to one request in ten: the job is slower, and right."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.cluster import job, must
from tests.helpers.images import put_objects, sample_files
from tests.helpers.s3 import BUCKET, flaky_proxy, objects


def test_one_request_in_ten_fails(cluster: dict[str, str], s3: dict[str, str], tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/flaky"
    put_objects(sample_files("reference", {"real": 200}), BUCKET, "flaky/reals", s3)
    put_objects(sample_files("query", {"gan": 150, "vae": 150, "real": 50}), BUCKET, "flaky/queries", s3)
    env = {**s3, **cluster}
    for output, share in (("calm", 0.0), ("flaky", 0.1)):
        with flaky_proxy(s3["AWS_ENDPOINT_URL"], share) as proxy:
            at = {**env, "AWS_ENDPOINT_URL": proxy.endpoint}
            base = f"{root}/{output}"
            for name in ("reals", "queries"):
                must(job("index_images", "--input", f"{root}/{name}", "--output", f"{base}/{name}.parquet", env=at))
            must(job("build_reference", "--manifest", f"{base}/reals.parquet", "--output", f"{base}/reference", env=at))
            arguments = (
                "--manifest",
                f"{base}/queries.parquet",
                "--reference",
                f"{base}/reference",
                "--shard-rows",
                32,
            )
            must(job("compute_artifacts", *arguments, "--output", f"{base}/run", env=at))
            assert (len(proxy.refused) > 50) == (share > 0), f"{len(proxy.refused)} requests were refused"
            kinds = {request.split()[0] for request in proxy.refused}
            assert share == 0 or {"GET", "PUT"} <= kinds
    calm, flaky = (objects(f"flaky/{output}/run/artifacts/", s3) for output in ("calm", "flaky"))
    assert len(calm) == 2 * 11
    assert flaky == calm
    assert objects("flaky/flaky/run/rejected.parquet", s3) == objects("flaky/calm/run/rejected.parquet", s3)
