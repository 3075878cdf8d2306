"""The three commands, between their settings and the pipeline: plan, run what is missing, finish."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from manifpt.artifacts import INLINE_LIMIT_BYTES
from manifpt.config import ArtifactsConfig, IndexConfig, ReferenceConfig, rejection_budget
from manifpt.decode import DECODER, decode, decoder_versions
from manifpt.errors import BadImage, ConfigError, TooManyRejected
from manifpt.fetch import fetch
from manifpt.indexing import IndexOptions, index
from manifpt.log import Progress, event
from manifpt.manifest import Manifest, write_manifest
from manifpt.plan import Plan, auto_shard_rows, check_plan, publish_plan
from manifpt.reference import Bundle, finish_bundle, library_versions, open_bundle
from manifpt.shards import committed_shards, read_commits, write_rejected
from manifpt.spaces import SpaceSpec, spec_of
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import is_local, join, normalize, store_of

__all__ = ["build_reference", "compute_artifacts", "describe_plan", "index_images", "plan_artifacts", "sample_config"]


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
        for batch in index(config.input, options, skipped):
            for item in batch["source"].value_counts().to_pylist():
                sources[item["values"]] += item["counts"]
            listed += len(batch)
            if time.monotonic() - last > 10:
                last = time.monotonic()
                event("indexing", images=listed, images_per_s=listed / (last - begin))
            yield batch

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
    manifest = Manifest(normalize(config.manifest))
    output = normalize(config.output)
    specs = [resolve_weights(spec_of(name, config.own_spaces, config.size_px)) for name in dict.fromkeys(config.spaces)]
    if not specs:
        raise ConfigError("A reference needs at least one space; name some after --spaces.")
    specs = _with_sizes(specs, manifest)
    plan = Plan(
        task="reference",
        manifest_uri=manifest.uri,
        manifest_digest=manifest.digest(),
        rows=manifest.rows,
        shard_rows=_shard_rows(config.shard_rows, specs),
        spaces=tuple(specs),
        decoder=DECODER,
        manifest_etag=manifest.etag,
    )
    summary = _execute(plan, output, config.max_rejected, config.max_actors)
    bundle = finish_bundle(plan, output)
    return _finish(output, summary | {"reference_digest": bundle.digest, "images_in_reference": bundle.images})


def compute_artifacts(config: ArtifactsConfig) -> dict[str, Any]:
    """Computes artifact shards, or goes on where an earlier call stopped. Returns the summary."""
    plan, output = plan_artifacts(config)
    summary = _execute(plan, output, config.max_rejected, config.max_actors)
    summary = _finish(output, summary)
    if summary["shards_computed"] or store_of(output).stat(join(output, "preview.png")) is None:
        from manifpt.report.preview import draw_preview

        draw_preview(plan, output)
    return summary


def plan_artifacts(config: ArtifactsConfig) -> tuple[Plan, str]:
    """The plan of a run and its folder; nothing is written.

    Raises:
        ConfigError: what is missing, or doesn't fit together.
    """
    if not config.manifest or not config.reference or not config.output:
        raise ConfigError("compute_artifacts needs --manifest, --reference and --output (or none: the shipped sample).")
    manifest = Manifest(normalize(config.manifest))
    bundle = open_bundle(normalize(config.reference))
    if bundle.decoder_versions != decoder_versions():
        event("decoder_versions_differ", reference=bundle.decoder_versions, here=decoder_versions(),
              hint="pixels may differ by a level; build the reference again to be sure")  # fmt: skip
    if config.reference_shards < 1:
        raise ConfigError(f"--reference-shards must be at least 1, not {config.reference_shards}.")
    if config.reference_shards > 1 and config.projection == "approximate":
        raise ConfigError(
            "--reference-shards is for exact projection; an approximate index is small enough for one actor."
        )
    specs = [_of_bundle(name, bundle, config) for name in dict.fromkeys(config.spaces or bundle.spaces)]
    inline = {"inline": True, "lazy": False, "auto": None}[config.store]
    item_bytes = np.dtype(config.dtype).itemsize
    stored = tuple(
        spec.name
        for spec in specs
        if (inline if inline is not None else _values(spec, bundle) * item_bytes <= INLINE_LIMIT_BYTES)
    )
    plan = Plan(
        task="artifacts",
        manifest_uri=manifest.uri,
        manifest_digest=manifest.digest(),
        rows=manifest.rows,
        shard_rows=_shard_rows(config.shard_rows, specs),
        spaces=tuple(specs),
        reference_uri=bundle.uri,
        reference_digest=bundle.digest,
        dtype=config.dtype,
        inline=stored,
        decoder=DECODER,
        manifest_etag=manifest.etag,
        projection=config.projection,
        reference_shards=config.reference_shards,
    )
    return plan, normalize(config.output)


def _of_bundle(name: str, bundle: Bundle, config: ArtifactsConfig) -> SpaceSpec:
    """The bundle's spec of a space, which decides; what the user says of it must agree."""
    spec = bundle.spaces.get(name)
    if spec is None:
        known = ", ".join(bundle.spaces)
        raise ConfigError(
            f"The reference {bundle.uri} has no space {name!r}; it has {known}. Choose among them with --spaces, or "
            f"build a reference with {name!r}."
        )
    fields = config.own_spaces.get(name, {})
    own = SpaceSpec.from_json({"name": name, "kind": spec.kind, **fields})
    differing = [f for f in fields if f != "weights" and getattr(own, f) != getattr(spec, f)]
    if differing:
        raise ConfigError(
            f"Space {name!r}: {differing[0]} is {getattr(own, differing[0])!r} in the config and "
            f"{getattr(spec, differing[0])!r} in the reference {bundle.uri}. Correct it, or build the reference again."
        )
    return resolve_weights(replace(spec, weights=own.weights or spec.weights))


def _values(spec: SpaceSpec, bundle: Bundle) -> int:
    """Numbers an embedding has."""
    return bundle.dims[spec.name]


def _with_sizes(specs: list[SpaceSpec], manifest: Manifest) -> list[SpaceSpec]:
    """Fixes every view's size; a native one is that of the manifest's first good image."""
    native: tuple[int, int] | None = None
    out = []
    for spec in specs:
        view = spec.view
        if view.height_px is None or view.width_px is None:
            native = native or _first_size(manifest)
            out.append(replace(spec, height_px=native[0], width_px=native[1]))
        else:
            out.append(replace(spec, height_px=view.height_px, width_px=view.width_px))
    return out


def _first_size(manifest: Manifest) -> tuple[int, int]:
    for start in range(0, min(manifest.rows, 1024), 64):
        for data in fetch(manifest.read(start, start + 64).to_pylist()):
            try:
                if isinstance(data, bytes):
                    height_px, width_px = decode(data).shape[:2]
                    return height_px, width_px
            except BadImage:
                continue
    raise ConfigError(f"None of the first images of {manifest.uri} can be read and decoded; check where they are.")


def _shard_rows(asked: int | None, specs: Iterable[SpaceSpec]) -> int:
    if asked is not None and asked < 1:
        raise ConfigError(f"--shard-rows must be at least 1, not {asked}.")
    views = {spec.view.key: spec.view for spec in specs}.values()
    return asked or auto_shard_rows(sum(3 * (view.height_px or 0) * (view.width_px or 0) for view in views))


def _execute(plan: Plan, output: str, max_rejected: str, max_actors: int | None) -> dict[str, Any]:
    """Publishes the plan, computes the shards without a commit, and sums up all commits."""
    begin = time.monotonic()
    budget = rejection_budget(max_rejected, plan.rows)
    if max_actors is not None and max_actors < 1:
        raise ConfigError(f"--max-actors must be at least 1, not {max_actors}.")
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
        from manifpt import pipeline  # Ray costs a second, and a finished run doesn't need it

        pipeline.connect()
        if not pipeline.on_one_node() and is_local(output):
            event("shared_storage_needed", path=output, hint="every node must see this path; else use s3://")
        progress = Progress(plan.rows, images, rejected)
        try:
            for commit in pipeline.run(plan, output, pending, max_actors):
                computed += 1
                progress.add(len(plan.rows_of(commit["shard"])), commit["rejected_images"])
                rejected += commit["rejected_images"]
                if rejected > budget:
                    break
            images_per_s, running_s = round(progress.images_per_s, 1), round(progress.running_s, 2)
        finally:
            progress.close()
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
            reasons.update({image_id: reason for image_id, _, _, _, reason, _ in commit["rejected"]}.values())
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
        "projection": plan.semantic().get("projection", "exact") if plan.task == "artifacts" else None,
        **({"recall": recall} if recall else {}),
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


def describe_plan(plan: Plan, output: str) -> dict[str, Any]:
    """What a run would do, for `--dry-run`: images, shards, bytes to read, bytes to write at most."""
    check_plan(plan, output)
    manifest = Manifest(plan.manifest_uri)
    size_bytes, unknown = 0, 0
    for start in range(0, manifest.rows, 1 << 18):
        column = manifest.read(start, start + (1 << 18), ["size_bytes"])["size_bytes"]
        size_bytes += sum(v for v in column.to_pylist() if v is not None)
        unknown += column.null_count
    bundle = open_bundle(plan.reference_uri)
    item_bytes = np.dtype(plan.dtype).itemsize
    per_image = {s.name: 100 + (_values(s, bundle) * item_bytes if s.name in plan.inline else 0) for s in plan.spaces}
    return {
        "images": plan.rows,
        "shards": plan.shards,
        "shards_done": len(committed_shards(output) & set(range(plan.shards))),
        "images_a_shard": plan.shard_rows,
        "bytes_to_read": size_bytes,
        "images_of_unknown_size": unknown,
        "spaces": {name: {"store": "inline" if name in plan.inline else "lazy", "bytes_at_most": plan.rows * each}
                   for name, each in per_image.items()},
        "bytes_to_write_at_most": plan.rows * sum(per_image.values()),
        "reference_images": bundle.images,
        "output": output,
    }  # fmt: skip


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
    build_reference(ReferenceConfig(manifest=paths["real"], output=reference, max_actors=config.max_actors))
    return replace(config, manifest=paths["generated"], reference=reference, output=output)
