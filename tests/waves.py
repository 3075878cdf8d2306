"""A bucket that fills in five waves: what a monitoring scan says of each, and how often it errs over many draws.

    python -m tests.waves QUERIES REALS OUTPUT --hidden GENERATOR GENERATOR

QUERIES and REALS are manifests, such as those that `reproduce_tables` leaves. An attributor is trained without the
hidden generators, on three fifths of the groups and on altered copies of them; the others are what comes. Waves 1 and 2
are like its training; from wave 3 on a quarter of the images is of the hidden generators; wave 4 was encoded again as
JPEG of low quality. Once, the waves go through a real S3 server and `jobs/scan.py`. Then every image that may come is
attributed, and waves are drawn from them for many seeds: the same tests and rules, without the jobs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manifpt.fetch import fetch
from manifpt.manifest import write_manifest
from manifpt.monitoring.alerts import DEFAULT_RULES, alerts_of
from manifpt.monitoring.drift import Counts, Sample, drift
from manifpt.monitoring.newcomers import newcomers
from manifpt.monitoring.result import read_baseline
from tests.helpers.cluster import ROOT, job, must
from tests.helpers.s3 import BUCKET, environment, s3_server

WAVES, NEW_FROM, JPEG_IN, QUALITY = 5, 3, 4, 50
COMING = 0.4  # of the groups


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("queries", "reals", "output"):
        given.add_argument(name, type=Path)
    given.add_argument("--hidden", nargs=2, required=True)
    given.add_argument("--space", default="ycbcr")
    given.add_argument("--estimate", default="soft --sigma 0.01", help="with its flags, as one word")
    given.add_argument("--network", default="small")
    given.add_argument("--epochs", type=int, default=12)
    given.add_argument("--known", type=int, default=150, help="images a wave")
    given.add_argument("--seeds", type=int, default=20)
    given.add_argument("--level", type=float, default=0.05)
    given.add_argument("--without", nargs="*", default=[], help="known sources that the draws of many seeds leave out, "
                       "such as those whose images are not independent")  # fmt: skip
    options = given.parse_args()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    coming = prepare(options, folder)
    print(json.dumps(json.loads((folder / "attributor" / "metrics.json").read_text()), indent=None)[:400])
    through_s3(options, folder, coming)
    over_seeds(options, folder, coming)


def prepare(options: argparse.Namespace, folder: Path) -> pa.Table:
    """Reference, run and attributor; what is left to come, with `label` and `hidden`."""
    table = pq.read_table(options.queries)
    groups = table["latent_group"].to_pylist() if "latent_group" in table.column_names else [None] * len(table)
    keys = [group or image_id for group, image_id in zip(groups, table["image_id"].to_pylist(), strict=True)]
    part_n = np.array([int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:4], "big") / 2**32 for k in keys])
    is_hidden_n = np.isin(table["source"].to_pylist(), options.hidden)
    if not (folder / "attributor" / "config.json").exists():
        rows = table.filter(pa.array((part_n >= COMING) & ~is_hidden_n))
        write_manifest(rows.to_batches(), str(folder / "train.parquet"))
        local = {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
        must(job("build_reference", "--manifest", options.reals, "--spaces", options.space, "--output",
                 folder / "reference", env=local, timeout_s=3000))  # fmt: skip
        for name, alter in (("run", "none"), ("altered", "drawn")):
            must(job("compute_artifacts", "--manifest", folder / "train.parquet", "--reference", folder / "reference",
                     "--output", folder / name, "--estimate", *options.estimate.split(), "--alter", alter, env=local,
                     timeout_s=3000))  # fmt: skip
        group = ["--group-column", "latent_group"] if "latent_group" in table.column_names else []
        must(job("train_attributor", "--artifacts", folder / "run", "--altered-artifacts", folder / "altered",
                 "--space", options.space, "--network", options.network, "--epochs", options.epochs,
                 "--output", folder / "attributor", *group, env=local, timeout_s=6000))  # fmt: skip
    known = set(json.loads((folder / "attributor" / "labels.json").read_text()))
    is_known_n = np.isin(table["source"].to_pylist(), list(known))
    return table.filter(pa.array(((part_n < COMING) & is_known_n) | is_hidden_n))


def drawn_waves(options: argparse.Namespace, coming: pa.Table, seed: int) -> list[np.ndarray]:
    """Rows of each wave, no row twice: of the known labels as the baseline has them, and of the hidden ones."""
    rng = np.random.default_rng(seed)
    source_n = np.array(coming["source"].to_pylist(), dtype=object)
    known_n = held_out_labels(options)
    baseline = known_n[~np.isin(known_n, options.without)]
    left = {label: list(rng.permutation(np.flatnonzero(source_n == label))) for label in sorted(set(source_n))}
    waves = []
    for wave in range(1, WAVES + 1):
        wanted = [str(label) for label in rng.choice(baseline, options.known)]
        if wave >= NEW_FROM:
            wanted += [options.hidden[n % 2] for n in range(options.known // 3)]
        waves.append(np.array([left[label].pop() for label in wanted if left[label]], np.int64))
    return waves


def held_out_labels(options: argparse.Namespace) -> np.ndarray:
    """str (object), of each image of the attributor's baseline."""
    labels = pq.read_table(options.output / "attributor" / "baseline.parquet")["label"].to_pylist()
    return np.array(labels, dtype=object)


def through_s3(options: argparse.Namespace, folder: Path, coming: pa.Table) -> None:
    """The waves of seed 0 through `jobs/scan.py`."""
    import boto3

    print(
        "\n| wave | images | attributed | unknown | inconclusive | rejected | fired | alerts |\n" + "| --- " * 8 + "|"
    )
    with s3_server(folder / f"s3-{os.getpid()}") as endpoint:
        env = environment(endpoint)
        client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
                              aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")  # fmt: skip
        for wave, row_n in enumerate(drawn_waves(options, coming, 0), start=1):
            for name, data in images(coming, row_n, wave == JPEG_IN):
                client.put_object(Bucket=BUCKET, Key=f"in/{wave}/{name}", Body=data)
            said = scan(folder, f"s3://{BUCKET}/in", f"s3://{BUCKET}/scans", options.level, env)
            body = client.get_object(Bucket=BUCKET, Key=f"scans/windows/{wave:05d}/window.json")["Body"].read()
            result = json.loads(body)
            fired = [finding["name"] for finding in result["findings"] if finding["fired"]]
            print(f"| {wave} | {result['images']} | {sum(result['attributed'].values())} | {result['unknown']} | "
                  f"{result['inconclusive']} | {result['rejected']} | {', '.join(fired) or '-'} | "
                  f"{', '.join(alert['rule'] for alert in result['alerts']) or '-'} |", flush=True)  # fmt: skip
            (folder / f"scan-{wave}.txt").write_text(said)
        report = client.get_object(Bucket=BUCKET, Key="scans/report.html")["Body"].read()
        (folder / "report.html").write_bytes(report)


def scan(folder: Path, source: str, output: str, level: float, env: Mapping[str, str]) -> str:
    """One scan, as a schedule starts it."""
    command = [
        sys.executable, str(ROOT / "jobs" / "scan.py"), "--input", source, "--output", output, "--attributor",
        str(folder / "attributor"), "--reference", str(folder / "reference"), "--drift-level", str(level),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def images(coming: pa.Table, row_n: np.ndarray, is_jpeg: bool) -> list[tuple[str, bytes]]:
    """Names without a source, and bytes."""
    rows = coming.take(pa.array(row_n)).to_pylist()
    found = []
    for row, data in zip(rows, fetch(rows), strict=True):
        assert isinstance(data, bytes), (row["uri"], data)
        name = hashlib.sha256(row["image_id"].encode()).hexdigest()[:24]
        if is_jpeg:
            sink = io.BytesIO()
            Image.open(io.BytesIO(data)).convert("RGB").save(sink, "JPEG", quality=QUALITY)
            data = sink.getvalue()
        found.append((f"{name}.png", data))  # the decoder looks at bytes, not at names
    return found


def over_seeds(options: argparse.Namespace, folder: Path, coming: pa.Table) -> None:
    """The same tests and rules on waves of many seeds."""
    plain, degraded = (attributed(folder, coming, kind, options.level) for kind in ("plain", "jpeg"))
    baseline = read_baseline(str(folder / "attributor"))
    baseline = baseline.take(np.flatnonzero(~np.isin(held_out_labels(options), options.without)))
    fired: dict[tuple[int, str], int] = {}
    alerted = np.zeros(WAVES + 1, int)
    for seed in range(options.seeds):
        before = earlier = Counts()
        for wave, row_n in enumerate(drawn_waves(options, coming, seed), start=1):
            table = (degraded if wave == JPEG_IN else plain).take(pa.array(row_n))
            counts, sample = counts_in(table), sample_of(table)
            findings = drift(baseline, sample, before, counts, options.level, seed * 100 + wave, earlier)
            ids = np.array(table["image_id"].to_pylist(), dtype=object)
            found = newcomers(sample, ids, baseline, seed)
            alerts = alerts_of(DEFAULT_RULES, findings, counts, found, time="", window=str(wave))
            alerted[wave] += bool(alerts)
            for name in {alert.rule for alert in alerts} | {f"test {f.name}" for f in findings if f.fired}:
                fired[wave, name] = fired.get((wave, name), 0) + 1
            earlier = earlier.merged(counts)
            if not alerts:
                before = before.merged(counts)
    print(f"\nWindows with an alert, of {options.seeds} seeds; level {options.level}:")
    for wave in range(1, WAVES + 1):
        why = ", ".join(f"{name} {count}" for (w, name), count in sorted(fired.items()) if w == wave)
        print(f"wave {wave}: {alerted[wave]} of {options.seeds}  ({why})")


def attributed(folder: Path, coming: pa.Table, kind: str, level: float) -> pa.Table:
    """Every image that may come, as it is or encoded again, attributed by one scan; in the rows of `coming`."""
    source, output = folder / kind, folder / f"{kind}-scan"
    if not (output / "scan.json").exists():
        source.mkdir(exist_ok=True)
        for name, data in images(coming, np.arange(len(coming)), kind == "jpeg"):
            (source / name).write_bytes(data)
        scan(folder, str(source), str(output), level, {})
    parts = sorted((output / "attributions").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(part).replace_schema_metadata(None) for part in parts])
    place = {Path(image_id).stem: n for n, image_id in enumerate(table["image_id"].to_pylist())}
    names = [hashlib.sha256(i.encode()).hexdigest()[:24] for i in coming["image_id"].to_pylist()]
    return table.take(pa.array([place[name] for name in names]))


def counts_in(table: pa.Table) -> Counts:
    """As a window counts them."""
    sources: dict[str, int] = {}
    for source in table["source"].to_pylist():
        if source is not None:
            sources[source] = sources.get(source, 0) + 1
    verdicts: list[Any] = table["verdict"].to_pylist()
    return Counts(sources, verdicts.count("unknown"), verdicts.count("inconclusive"))


def sample_of(table: pa.Table) -> Sample:
    """As a window samples them: all of it."""
    return Sample(
        np.array(table["label"].to_pylist(), dtype=object),
        table["distance"].to_numpy().astype(np.float64),
        *(table[name].combine_chunks().to_numpy_ndarray().astype(np.float32) for name in ("feature", "spectrum")),
        table["is_unknown"].to_numpy(zero_copy_only=False),
    )


if __name__ == "__main__":
    main()
