"""A run that is hurt every 20 seconds while S3 fails and stalls; what it writes must be what an undisturbed one writes.

    python -m tests.chaos [--minutes 30] [--images 20000] [--seed 0] [--output chaos.json]

A head and three workers on this machine (two decode, one has what Ray takes for a GPU), and an S3 server. Every 20 s
one thing happens, drawn by chance: an actor or task of the pipeline is killed, or any of Ray's workers or agents is
killed, or a node vanishes and another one comes. A node ends with its agents; then replacing it is what happens. S3
answers 5% of all requests with 503 and lets 5% wait for 2 s. A run that ends is compared and another one begins,
until the minutes are over; the last is let end, and hurt to its end. A job that gives up is started again with the
same command, as an operator would, and is counted. Exit code 1: a result differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.cluster import job, must, started
from tests.helpers.images import put_objects, repeated, sample_files
from tests.helpers.nodes import Nodes, ray_nodes
from tests.helpers.s3 import BUCKET, environment, flaky_proxy, objects, s3_server

ROOT_URI = f"s3://{BUCKET}"
EVERY_S = 20.0
REFUSED, STALLED = 0.05, 0.05
SHARD_ROWS = 32
POOLS = ("cpu_node", "cpu_node", "gpu_node")
KINDS = ("stage", "stage", "worker", "node")  # nodes more seldom, as they take others with them


def main() -> int:
    """Prints and writes what was done to it, and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("chaos.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, s3_server(Path(name) / "s3") as endpoint:
        s3 = environment(endpoint)
        _prepare(Path(name), s3, options.images)
        with ray_nodes(*POOLS, node_env=s3) as nodes:
            begin = time.monotonic()
            must(job("compute_artifacts", *_arguments("calm"), env={**s3, **nodes.env}, timeout_s=3600))
            calm_s = time.monotonic() - begin
        calm = objects("calm/artifacts/", s3)
        _check_complete(calm, objects("calm/rejected.parquet", s3)[""], options.images)
        print(f"undisturbed: {options.images} images, {len(calm)} parts, {calm_s:.0f} s", flush=True)
        said = _disturbed(Path(name), endpoint, calm, options)
    said |= {"images": options.images, "calm_s": round(calm_s, 1), "parts": len(calm)}
    options.output.write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))
    return 0 if all(run["same"] for run in said["runs"]) else 1


def _prepare(folder: Path, s3: Mapping[str, str], images: int) -> None:
    """Reals, queries, a manifest of so many rows over them, and a reference, all in the bucket."""
    put_objects(sample_files("reference", {"real": 400}), BUCKET, "reals", dict(s3))
    put_objects(sample_files("query"), BUCKET, "queries", dict(s3))
    put_objects(iter([("gan/broken.png", b"no image")]), BUCKET, "queries", dict(s3))
    with ray_nodes(*POOLS, node_env=s3) as nodes:
        env = {**s3, **nodes.env}
        for name in ("reals", "queries"):
            index = ("--input", f"{ROOT_URI}/{name}", "--output", folder / f"{name}.parquet")
            must(job("index_images", *index, env=env))
        reference = ("--manifest", folder / "reals.parquet", "--output", f"{ROOT_URI}/reference")
        must(job("build_reference", *reference, env=env))
    repeated(folder / "queries.parquet", images, folder / "many.parquet")
    put_objects(iter([("many.parquet", (folder / "many.parquet").read_bytes())]), BUCKET, "manifests", dict(s3))


def _arguments(output: str) -> tuple[object, ...]:
    common = ("--manifest", f"{ROOT_URI}/manifests/many.parquet", "--reference", f"{ROOT_URI}/reference")
    return (*common, "--shard-rows", SHARD_ROWS, "--output", f"{ROOT_URI}/{output}")


def _check_complete(parts: Mapping[str, bytes], rejected: bytes, images: int) -> None:
    """Every image stands in each space once, or is rejected once."""
    refused = pq.read_table(io.BytesIO(rejected))["image_id"].to_pylist()
    for space in ("rgb", "frequency"):
        tables = [pq.read_table(io.BytesIO(data), columns=["image_id"]) for key, data in parts.items() if space in key]
        ids = pa.concat_tables(tables)["image_id"].to_pylist()
        assert len(ids) + len(refused) == len({*ids, *refused}) == images, f"{space}: {len(ids)} + {len(refused)}"


def _disturbed(folder: Path, endpoint: str, calm: Mapping[str, bytes], options: argparse.Namespace) -> dict[str, Any]:
    dice, done, runs = random.Random(options.seed), Counter[str](), list[dict[str, Any]]()
    begin = time.monotonic()
    with flaky_proxy(endpoint, REFUSED, stalls=STALLED, seed=options.seed) as proxy:
        s3 = environment(proxy.endpoint)
        with ray_nodes(*POOLS, node_env=s3) as nodes:
            while (time.monotonic() - begin) / 60 < options.minutes:
                name = f"run-{len(runs)}"
                run = _one_run(name, nodes, s3, folder / f"{name}.log", dice, done)
                run["same"] = objects(f"{name}/artifacts/", environment(endpoint)) == calm
                rejected = (objects(f"{one}/rejected.parquet", environment(endpoint)) for one in (name, "calm"))
                run["same"] &= next(rejected) == next(rejected)
                runs.append(run)
                print(f"{(time.monotonic() - begin) / 60:5.1f} min: {run}", flush=True)
                if not run["same"]:
                    print((folder / f"{name}.log").read_text()[-6000:])
                    break
    minutes = round((time.monotonic() - begin) / 60, 1)
    return {
        "minutes": minutes, "hurt": dict(done), "refused_503": len(proxy.refused), "stalled": len(proxy.stalled),
        "runs": runs,
    }  # fmt: skip


def _one_run(
    name: str, nodes: Nodes, s3: Mapping[str, str], log: Path, dice: random.Random, done: Counter[str]
) -> dict[str, Any]:
    begin, submissions = time.monotonic(), 0
    while True:
        submissions += 1
        with started("compute_artifacts", *_arguments(name), env={**s3, **nodes.env}, log=log) as process:
            while process.poll() is None:
                with contextlib.suppress(Exception):  # it is running still
                    process.wait(EVERY_S)
                if process.poll() is None:
                    done[_hurt(nodes, dice)] += 1
        if process.returncode == 0:
            return {"s": round(time.monotonic() - begin, 1), "submissions": submissions}
        print(f"exit {process.returncode}: {log.read_text()[-1500:]}", flush=True)
        if submissions == 20:
            raise RuntimeError(f"{name} did not end in 20 submissions: {log.read_text()[-6000:]}")


def _hurt(nodes: Nodes, dice: random.Random) -> str:
    """One thing that happens to clusters; its name."""
    nodes.look()
    missing = Counter(POOLS) - Counter({pool: len(pids) for pool, pids in nodes.raylets.items()})
    if missing:
        nodes.add(*missing.elements())
        return "a node that had ended by itself replaced"
    kind = dice.choice(KINDS)
    if kind == "node":
        pool = dice.choice(POOLS)
        nodes.remove(pool, dice.randrange(len(nodes.raylets[pool])))
        nodes.add(pool)
        return f"{pool} lost"
    found = _workers(nodes, "ray::Map" if kind == "stage" else "ray::")
    if not found:
        return "nothing ran"
    with contextlib.suppress(psutil.Error):
        dice.choice(found).kill()
    return "actor or task of a stage killed" if kind == "stage" else "worker killed"


def _workers(nodes: Nodes, title: str) -> list[psutil.Process]:
    """Of all nodes that run stages, by what Ray writes into the process's title; sorted, so that a seed means it."""
    found = []
    for raylet in sorted(pid for pids in nodes.raylets.values() for pid in pids):
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if " ".join(one.cmdline()).startswith(title):
                        found.append(one)
    return found


if __name__ == "__main__":
    sys.exit(main())
