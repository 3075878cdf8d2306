"""The three commands: plan (`manifpt.planning`), run what is missing, finish."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from manifpt.alterations import NONE
from manifpt.computing import Computing, check_actors
from manifpt.config import ArtifactsConfig, IndexConfig, ReferenceConfig, rejection_budget
from manifpt.errors import ConfigError, StorageError, TooManyRejected
from manifpt.indexing import IndexOptions, index
from manifpt.log import event
from manifpt.manifest import Manifest, write_manifest
from manifpt.plan import Plan, publish_plan
from manifpt.planning import plan_artifacts, plan_reference
from manifpt.reference import finish_bundle, library_versions
from manifpt.shards import committed_shards, read_commits, reject_reasons, write_rejected
from manifpt.storage import join, normalize, store_of

__all__ = ["build_reference", "compute_artifacts", "index_images", "sample_config"]


def index_images(config: IndexConfig) -> dict[str, Any]:
    """Lists images and writes the manifest. Returns what was found."""
    begin = time.monotonic()
    field, equals, value = (config.where or "").partition("=")
    if config.where is not None and not (field and equals):
        raise ConfigError(f"--where is COLUMN=VALUE, not {config.where!r}.")
    options = IndexOptions(
        source=config.source,
        source_column=config.source_column,
        split=config.split,
        split_column=config.split_column,
        keep_columns=config.keep_columns,
        where=(field, value) if config.where else None,
    )
    skipped: Counter[str] = Counter()
    sources: Counter[str] = Counter()

    def counted() -> Iterator[Any]:
        listed = 0
        last = begin
        try:
            for batch in index(config.input, options, skipped):
                for item in batch["source"].value_counts().to_pylist():
                    sources[item["values"]] += item["counts"]
                listed += len(batch)
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    event("indexing", images=listed, images_per_s=listed / (last - begin))
                yield batch
        except OSError as error:  # of what is read; what can't be written is told below
            raise StorageError(f"An input can't be read: {error}") from error

    output = normalize(config.output)
    try:
        rows = write_manifest(counted(), output)
    except OSError as error:
        raise ConfigError(f"Can't write {output} ({error}); choose another --output or correct its rights.") from error
    return {
        "manifest": output,
        "images": rows,
        "sources": dict(sorted(sources.items())),
        "skipped": dict(skipped.most_common()),
        "seconds": round(time.monotonic() - begin, 2),
    }


def build_reference(config: ReferenceConfig) -> dict[str, Any]:
    """Builds a reference bundle, or goes on where an earlier call stopped. Returns the summary."""
    plan, output = plan_reference(config)
    summary = _execute(plan, output, config)
    bundle = finish_bundle(plan, output)
    return _finish(output, summary | {"reference_digest": bundle.digest, "images_in_reference": bundle.images})


def compute_artifacts(config: ArtifactsConfig) -> dict[str, Any]:
    """Computes artifact shards, or goes on where an earlier call stopped. Returns the summary."""
    plan, output = plan_artifacts(config)
    summary = _execute(plan, output, config)
    summary = _finish(output, summary)
    if summary["shards_computed"] or store_of(output).stat(join(output, "preview.png")) is None:
        from manifpt.report.preview import draw_preview

        draw_preview(plan, output)
    return summary


def _execute(plan: Plan, output: str, config: ArtifactsConfig | ReferenceConfig) -> dict[str, Any]:
    """Publishes the plan, computes the shards without a commit, and sums up all commits."""
    begin = time.monotonic()
    budget = rejection_budget(config.max_rejected, plan.rows)
    check_actors(config.max_actors)
    publish_plan(plan, output)
    store_of(output).clean(output)
    done = committed_shards(output) & set(range(plan.shards))
    pending = [shard for shard in range(plan.shards) if shard not in done]
    event("plan", task=plan.task, images=plan.rows, shards=plan.shards, done=len(done),
          spaces=",".join(spec.name for spec in plan.spaces), output=output)  # fmt: skip
    rejected = sum(commit["rejected_images"] for commit in read_commits(output, sorted(done)))
    images = sum(len(plan.rows_of(shard)) for shard in done)
    computed, images_per_s, running_s = 0, None, 0.0
    if pending and rejected <= budget:
        computing = Computing(plan, output, pending, images, rejected, config.max_actors, config.gpu)
        with contextlib.closing(computing.commits()) as commits:
            for commit in commits:
                computed += 1
                rejected += commit["rejected_images"]
                if rejected > budget:
                    break
        images_per_s, running_s = computing.images_per_s, computing.running_s
    committed = committed_shards(output) & set(range(plan.shards))
    summary = _summary(plan, output, committed) | {
        "shards_computed": computed,
        "seconds": round(time.monotonic() - begin, 2),
        "images_per_s": images_per_s,
        "running_s": running_s,
    }
    if rejected > budget:
        if pending:  # a finished run keeps its summary
            _write_json(join(output, "summary.json"), summary | {"status": "too many rejected"})
        raise TooManyRejected(
            f"{rejected} images were rejected, {budget} are allowed: see {join(output, 'rejected.parquet')}. Raise "
            f"--max-rejected and run the same command again; or correct the input and choose another --output."
        )
    if len(committed) < plan.shards:
        raise ConfigError(
            f"{plan.shards - len(committed)} committed shards can't be seen from here: {output} must be storage that "
            f"every node shares, such as s3://."
        )
    return summary


def _summary(plan: Plan, output: str, shards: set[int]) -> dict[str, Any]:
    """What the commits say together; also writes `rejected.parquet` from them, in the same pass."""
    rows: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    sources: dict[str, dict[str, dict[str, float]]] = {}
    rejected = 0

    def tallied() -> Iterator[dict[str, Any]]:
        nonlocal rejected
        for commit in read_commits(output, sorted(shards)):
            for path, part in commit["parts"].items():
                rows[path.split("/")[1]] += part["rows"]
                stored[path.split("/")[1]] += part["bytes"]
            for name, seconds in commit["seconds"].items():
                stages[name] += seconds
            rejected += commit["rejected_images"]
            reasons.update(reject_reasons(commit))
            for space, of_space in commit["statistics"].items():
                for source, sums in of_space.items():
                    _merge(sources.setdefault(space, {}).setdefault(source, {}), sums)
            yield commit

    write_rejected(output, tallied())
    for of_source in (found for of_space in sources.values() for found in of_space.values()):
        of_source["distance_mean"] = of_source.pop("distance_sum") / of_source["images"]
    recall = {
        space: sum(s["right"] for s in found.values()) / max(1, sum(s["checked"] for s in found.values()))
        for space, found in sources.items()
        if plan.projection == "approximate"
    }
    return {
        "task": plan.task,
        "images": plan.rows,
        "shards": plan.shards,
        "shards_committed": len(shards),
        "rejected": {"images": rejected, "reasons": dict(reasons.most_common())},
        "parts": {name: {"rows": rows[name], "bytes": stored[name]} for name in sorted(rows)},
        "spaces": {space: dict(sorted(found.items())) for space, found in sources.items()},
        "stage_seconds": {name: round(seconds, 2) for name, seconds in stages.items()},
        "estimate": plan.estimate.identity() if plan.task == "artifacts" else None,
        "projection": plan.semantic().get("projection", "exact") if plan.task == "artifacts" else None,
        **({"recall": recall} if recall else {}),
        **({"alter": plan.alter} if plan.alter != NONE else {}),
        "plan_digest": plan.digest,
        "reference_digest": plan.reference_digest or None,
        "versions": library_versions(),
    }


def _merge(into: dict[str, float], sums: dict[str, float]) -> None:
    for name, value in sums.items():
        combine = min if name.endswith("_min") else max if name.endswith("_max") else lambda a, b: a + b
        into[name] = combine(into[name], value) if name in into else value


def _finish(output: str, summary: dict[str, Any]) -> dict[str, Any]:
    store_of(output).clean(output)  # of workers that were killed on the way
    summary |= {"status": "done"}
    if not summary["shards_computed"] and store_of(output).stat(join(output, "_SUCCESS")) is not None:
        return summary  # nothing new: the summary of the run that computed stays
    _write_json(join(output, "summary.json"), summary)
    store_of(output).write(join(output, "_SUCCESS"), b"")
    return summary


def _write_json(uri: str, document: dict[str, Any]) -> None:
    store_of(uri).write(uri, (json.dumps(document, indent=2) + "\n").encode())


def sample_config(config: ArtifactsConfig) -> ArtifactsConfig:
    """The settings of a run on the shipped sample, after making its manifests and its reference."""
    from manifpt.sample import SAMPLE_PATH

    output = normalize(config.output or "runs/sample")
    paths = {name: join(output, f"{name}.parquet") for name in ("real", "generated")}
    for name, split in (("real", "reference"), ("generated", "query")):
        if store_of(output).stat(paths[name]) is not None:  # made before; a copied file has another time stamp
            if Manifest(paths[name]).read(0, 1)["uri"][0].as_py() == str(SAMPLE_PATH):
                continue
            raise ConfigError(f"{output} is the sample run of another copy of this project; delete it.")
        index_images(
            IndexConfig(
                input=(str(SAMPLE_PATH),), output=paths[name], source_column="source", split_column="split",
                where=f"split={split}",
            )
        )  # fmt: skip
    reference = join(output, "reference")
    build_reference(
        ReferenceConfig(manifest=paths["real"], output=reference, max_actors=config.max_actors, gpu=config.gpu)
    )
    return replace(config, manifest=paths["generated"], reference=reference, output=output)
