"""The README's whole run: every image of gm_cifar10 in a bucket -> index -> reference of 30,000 reals -> artifacts.

    python -m tests.whole_run ../shared/data/gm_cifar10

Starts its own S3 server and Ray, and prints the commands, their times and what they say. The supervised space is the
real ImageNet network that a package ships, EfficientNet-Lite0 at 112 px.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.cluster import job, must, ray_head
from tests.helpers.images import cifar_files, put_objects
from tests.helpers.s3 import BUCKET, environment, s3_server
from tests.helpers.weights import lite0_config, lite0_safetensors

REALS = "real_cifar10_jpeg"
LOSSLESS = "real_cifar10_png_lossless"


def queries(cifar: Path) -> Iterator[tuple[str, bytes]]:
    """All generated images, and the lossless reals as the source `real`."""
    names = sorted(path.stem for path in cifar.glob("*.parquet") if path.stem != REALS)
    for name, data in cifar_files(cifar, dict.fromkeys(names, 1 << 30)):
        yield name.replace(LOSSLESS, "real"), data


def main() -> None:
    cifar = Path(sys.argv[1])
    root = f"s3://{BUCKET}"
    with tempfile.TemporaryDirectory(prefix="whole-") as folder, s3_server(Path(folder) / "s3") as endpoint:
        s3 = environment(endpoint)
        begin = time.monotonic()
        reals = put_objects(cifar_files(cifar, {REALS: 1 << 30}), BUCKET, "real", s3)
        generated = put_objects(queries(cifar), BUCKET, "generated", s3)
        print(f"uploaded {reals:,} + {generated:,} objects in {time.monotonic() - begin:.1f} s", flush=True)
        weights = lite0_safetensors(Path(folder) / "lite0.safetensors")
        config = lite0_config(Path(folder) / "cifar.yaml", str(weights), size_px=112)
        with ray_head(num_cpus=os.cpu_count() or 2, node_env=s3) as cluster:
            env = {**s3, **cluster}

            def step(name: str, *arguments: object) -> None:
                print(f"\n$ python jobs/{name}.py {' '.join(map(str, arguments))}", flush=True)
                begin = time.monotonic()
                result = job(name, *arguments, env=env, timeout_s=3600)
                print(result.stderr, must(result), sep="\n")
                print(f"[{time.monotonic() - begin:.1f} s]", flush=True)

            step(
                "index_images",
                "--input",
                f"{root}/real/{REALS}",
                "--source",
                "real",
                "--output",
                f"{root}/real.parquet",
            )
            step("index_images", "--input", f"{root}/generated", "--output", f"{root}/generated.parquet")
            spaces = ("--spaces", "rgb", "frequency", "lite0")
            step(
                "build_reference",
                "--config",
                config,
                "--manifest",
                f"{root}/real.parquet",
                *spaces,
                "--output",
                f"{root}/reference",
            )
            shared = (
                "--manifest",
                f"{root}/generated.parquet",
                "--reference",
                f"{root}/reference",
                "--output",
                f"{root}/run",
            )
            step("compute_artifacts", *shared, "--dry-run")
            step("compute_artifacts", *shared)
            step("compute_artifacts", *shared)  # again: everything is there


if __name__ == "__main__":
    main()
