"""The whole job: `jobs/compute_artifacts.py` against the straightforward script, and against the bare ceiling.

The ceiling is the slowest of decoding, embedding and searching, each alone on all cores, with nothing written, in a
process whose allocator keeps blocks, as that of the job's actors does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

from manifpt import stages
from manifpt.config import ArtifactsConfig
from manifpt.plan import Plan
from manifpt.planning import plan_artifacts
from manifpt.projecting import Projecting
from manifpt.resources import KEPT_BLOCKS
from tests.benchmarks.data import SHARED, files
from tests.benchmarks.embed import random_resnet50
from tests.benchmarks.measure import median, paired
from tests.helpers.cluster import ROOT, job, must
from tests.helpers.images import repeated, sample_files, write_files

__all__ = ["run"]

OWN = "resnet50"


class Inputs:
    """Files, manifests and a reference with rgb and a ResNet50 space, all below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.config = folder / "own.yaml"
        self.reference = {"rgb": folder / "reference-rgb", OWN: folder / "reference-resnet50"}

    def manifest(self, images: int) -> Path:
        """Of the first so many images."""
        return self.folder / f"manifest-{images}.parquet"

    def command(self, space: str, images: int, output: Path) -> list[str]:
        """As a user types it."""
        return [
            sys.executable, str(ROOT / "jobs" / "compute_artifacts.py"), "--manifest", str(self.manifest(images)),
            "--reference", str(self.reference[space]), "--spaces", space, "--output", str(output),
            "--config", str(self.config),
        ]  # fmt: skip


def prepare(folder: Path, images: int, counts: list[int], network_references: int) -> Inputs:
    """Writes images, manifests of so many rows over them, and the references; nothing here is timed."""
    inputs = Inputs(folder)
    write_files(files(images), inputs.images)
    must(job("index_images", "--input", inputs.images, "--output", folder / "all.parquet"))
    for count in counts:
        repeated(folder / "all.parquet", count, inputs.manifest(count))
    spec = random_resnet50(folder / "resnet50.safetensors")
    own = {OWN: {"architecture": spec.architecture, "weights": str(spec.weights), "size_px": 224}}
    inputs.config.write_text(yaml.safe_dump({"own_spaces": own}))
    cifar = SHARED / "gm_cifar10" / "real_cifar10_jpeg.parquet"
    source: Path = cifar
    if not cifar.exists():
        source = folder / "reals"
        write_files(sample_files("reference", {"real": 1 << 30}), source)
    reals = folder / "reals.parquet"
    must(job("index_images", "--input", source, "--source", "real", "--output", reals))
    repeated(reals, network_references, folder / "some-reals.parquet")
    must(job("build_reference", "--manifest", reals, "--spaces", "rgb", "--output", inputs.reference["rgb"],
             timeout_s=900))  # fmt: skip
    must(job("build_reference", "--manifest", folder / "some-reals.parquet", "--spaces", OWN, "--config", inputs.config,
             "--output", inputs.reference[OWN], timeout_s=900))  # fmt: skip
    for space, reference in inputs.reference.items():
        config = ArtifactsConfig(
            manifest=str(inputs.manifest(min(counts))), reference=str(reference), output=str(folder / "none"),
            spaces=(space,), own_spaces=own,
        )  # fmt: skip
        projecting = Projecting(plan_artifacts(config)[0])
        held = projecting.references[space]
        np.save(folder / f"{space}.npy", held.embeddings_of(slice(0, len(held.codes.array))))
    return inputs


def run(
    rounds: int, threads: int, folder: Path, images: int, paired_images: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """`job_of_ceiling` and `job_vs_script_*` from one long job each, from command to end, against the script's rate
    without its start-up; `*_short` from paired rounds of both on fewer images."""
    long_rgb = 5 * images
    inputs = prepare(folder, images, [images, paired_images, long_rgb], 2_000)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for space, name, short, long in (("rgb", "rgb", images, long_rgb), (OWN, "supervised", paired_images, images)):
        outcome = versus(inputs, space, short, rounds)
        ratios[f"job_vs_script_{name}_short"] = round(outcome["script_s"] / outcome["ours_s"], 3)
        say(
            f"job {name:10} {short} images: script {outcome['script_s']:.1f} s (without its start-up of"
            f" {outcome['script_ready_s']:.1f} s), ours {outcome['ours_s']:.1f} s from command to end,"
            f" {outcome['ours_running_s']:.1f} s without joining Ray: x{ratios[f'job_vs_script_{name}_short']:.2f}"
        )
        ceiling = alone(inputs, space, short, threads, long)
        whole = long_job(inputs, space, long)
        results[name] = outcome | {"ceiling": ceiling, "long": whole}
        versus_script = whole["images_per_s"] * outcome["script_s"] / short
        share = whole["images_per_s"] / min(ceiling.values())
        ratios[f"job_vs_script_{name}"] = round(versus_script, 3)
        ratios["job_of_ceiling" if space == OWN else f"job_of_ceiling_{name}"] = round(share, 3)
        say(
            f"job {name:10} {long} images: {whole['images_per_s']:.1f} images/s from command to end,"
            f" x{versus_script:.2f} of the script's rate, {share:.0%} of the ceiling; alone on all cores"
            f" decode {ceiling['decode']:.0f}, embed {ceiling['embed']:.0f}, search {ceiling['search']:.0f}"
        )
    return {"results": results, "ratios": ratios}


def versus(inputs: Inputs, space: str, images: int, rounds: int) -> dict[str, Any]:
    """Ours and the script on the same files, in turn."""
    said: dict[str, list[Any]] = {"script": [], "ours": []}
    folder = inputs.folder / f"versus-{space}"
    folder.mkdir(exist_ok=True)
    script = [
        sys.executable, "-m", "tests.benchmarks.script", "--images", str(inputs.images), "--limit", str(images),
        "--space", "rgb" if space == "rgb" else "supervised", "--weights", str(inputs.folder / "resnet50.safetensors"),
        "--reference", str(inputs.folder / f"{space}.npy"), "--output", str(folder / "script.parquet"),
    ]  # fmt: skip

    def theirs() -> None:
        done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT, timeout=1_800)
        said["script"].append(json.loads(done.stdout))

    def ours() -> None:
        output = folder / f"run-{len(said['ours'])}"
        subprocess.run(inputs.command(space, images, output), capture_output=True, check=True, timeout=1_800)
        said["ours"].append(json.loads((output / "summary.json").read_text()))

    seconds = paired({"script": theirs, "ours": ours}, rounds)
    return {
        "images": images,
        "seconds": seconds,
        "said": {name: values[-rounds:] for name, values in said.items()},
        # The script's clock starts when its model and index are ready; ours at the command.
        "script_s": median([value["seconds"] for value in said["script"][-rounds:]]),
        "script_ready_s": median([value["ready_s"] for value in said["script"][-rounds:]]),
        "ours_s": median(seconds["ours"]),
        "ours_running_s": median([value["running_s"] for value in said["ours"][-rounds:]]),
    }


def long_job(inputs: Inputs, space: str, images: int) -> dict[str, float]:
    """One job of many images, from command to end."""
    output = inputs.folder / f"long-{space}"
    begin = time.perf_counter()
    subprocess.run(inputs.command(space, images, output), capture_output=True, check=True, timeout=3_600)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "images_per_s": images / seconds}


def alone(inputs: Inputs, space: str, images: int, threads: int, job_images: int) -> dict[str, float]:
    """`ceilings`, in a process of its own."""
    with (
        mock.patch.dict(os.environ, KEPT_BLOCKS),  # read when a process starts
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        return process.submit(ceilings, inputs, space, images, threads, job_images).result()


def ceilings(inputs: Inputs, space: str, images: int, threads: int, job_images: int) -> dict[str, float]:
    """Images/s of each stage alone: decoding in a process a core, the others with all threads."""
    own = yaml.safe_load(inputs.config.read_text())["own_spaces"]
    config = ArtifactsConfig(
        manifest=str(inputs.manifest(images)), reference=str(inputs.reference[space]), spaces=(space,),
        output=str(inputs.folder / "none"), own_spaces=own,
    )  # fmt: skip
    plan, _ = plan_artifacts(config)
    some = min(plan.shards, 8)
    with multiprocessing.get_context("spawn").Pool(threads) as pool:
        pool.map(Decoded(plan), range(threads))  # imports, and a warm file cache
        begin = time.perf_counter()
        rows = sum(pool.map(Decoded(plan), range(some), chunksize=1))
        decode = rows / (time.perf_counter() - begin)
    shard = stages.decode_rows(plan, 0)
    rows = len(shard["rows"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, projecting = stages.Encoder(plan.spaces, threads, device, job_images), Projecting(plan, threads)
    encoded = encoder(shard)
    reference = projecting.references[space]
    embeddings_bd = reference.space.embed(encoded[f"code:{reference.space.spec.code_key}"]).reshape(rows, -1)
    seconds = paired(
        {
            "embed": lambda: reference.space.embed(encoder(shard)[f"code:{reference.space.spec.code_key}"]),
            "search": lambda: reference.projector.search.search(embeddings_bd, 1),
        },
        3,
    )
    return {"decode": decode, **{name: rows / median(values) for name, values in seconds.items()}}


class Decoded:
    """Decodes a shard of a plan in another process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, shard: int) -> int:
        return len(stages.decode_rows(self._plan, shard)["rows"])
