"""From settings to a plan: what is missing or doesn't fit together shows here, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from manifpt.alterations import ALTERATIONS
from manifpt.artifacts import INLINE_LIMIT_BYTES
from manifpt.config import ArtifactsConfig, ReferenceConfig
from manifpt.decode import DECODER, decoder_versions
from manifpt.errors import BadImage, ConfigError
from manifpt.estimates import Estimate, check_estimate
from manifpt.estimates.residual import projected_in
from manifpt.fetch import fetch
from manifpt.isolated import IsolatedDecoder
from manifpt.log import event
from manifpt.manifest import Manifest, records
from manifpt.plan import Plan, auto_shard_rows, check_plan
from manifpt.reference import Bundle, open_bundle
from manifpt.shards import committed_shards
from manifpt.spaces import SpaceSpec, spec_of
from manifpt.spaces.encoders import own_fields
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import normalize

__all__ = ["describe_plan", "plan_artifacts", "plan_reference"]


def plan_reference(config: ReferenceConfig) -> tuple[Plan, str]:
    """The plan of a reference and its folder; nothing is written.

    Raises:
        ConfigError: what is missing, or doesn't fit together.
    """
    manifest = Manifest(normalize(config.manifest))
    own = dict(config.own_spaces)
    if config.encoder is not None:
        if "selfsupervised" not in config.spaces:
            raise ConfigError("--encoder is of the space selfsupervised: name it after --spaces.")
        own["selfsupervised"] = {**own.get("selfsupervised", {}), "encoder": config.encoder}
        own["selfsupervised"].pop("weights_sha256", None)  # of other weights; an encoder's card states its own
    specs = [resolve_weights(spec_of(name, own, config.size_px)) for name in dict.fromkeys(config.spaces)]
    if not specs:
        raise ConfigError("A reference needs at least one space; name some after --spaces.")
    if config.equalize_codec:
        specs = [replace(spec, codec="jpeg") for spec in specs]
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
    return plan, normalize(config.output)


def plan_artifacts(config: ArtifactsConfig) -> tuple[Plan, str]:
    """The plan of a run and its folder; nothing is written.

    Raises:
        ConfigError: what is missing, or doesn't fit together.
    """
    if not config.manifest or not config.reference or not config.output:
        raise ConfigError("compute_artifacts needs --manifest, --reference and --output (or none: the shipped sample).")
    if config.alter not in ALTERATIONS:
        raise ConfigError(f"Unknown --alter {config.alter!r}; known: {', '.join(ALTERATIONS)}.")
    manifest = Manifest(normalize(config.manifest))
    bundle = open_bundle(normalize(config.reference))
    if bundle.decoder_versions != decoder_versions():
        event("decoder_versions_differ", reference=bundle.decoder_versions, here=decoder_versions(),
              hint="pixels may differ by a level; build the reference again to be sure")  # fmt: skip
    if config.reference_shards < 1:
        raise ConfigError(f"--reference-shards must be at least 1, not {config.reference_shards}.")
    if config.reference_shards > 1 and config.projection == "approximate":
        raise ConfigError(
            "--reference-shards is for exact projection: an approximate index is one, and one actor holds it."
        )
    specs = [_of_bundle(name, bundle, config) for name in dict.fromkeys(config.spaces or bundle.spaces)]
    estimate = _estimate(config)
    if estimate.residual_first and not any(spec.kind == "frequency" for spec in specs):
        raise ConfigError("--residual-first is for frequency spaces; name one after --spaces, or leave it out.")
    for spec in specs:
        check_estimate(estimate, projected_in(spec, estimate), bundle.dims[spec.name])
    if estimate.weights:
        from manifpt.estimates.denoiser import check_reference  # torch costs seconds

        check_reference(estimate.weights, bundle.digest)
    inline = {"inline": True, "lazy": False, "auto": None}[config.store]
    item_bytes = np.dtype(config.dtype).itemsize
    stored = tuple(
        spec.name
        for spec in specs
        if (inline if inline is not None else bundle.dims[spec.name] * item_bytes <= INLINE_LIMIT_BYTES)
        or not estimate.is_sample  # only from a neighbour can an artifact be made again
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
        estimate=estimate,
        alter=config.alter,
    )
    return plan, normalize(config.output)


_SIGMAS = {"soft": 0.01, "blur": 1.0}


def _estimate(config: ArtifactsConfig) -> Estimate:
    """The estimate that flags ask for; one that they don't fit is refused."""
    name, sigma = config.estimate, config.sigma
    if sigma is not None and name not in _SIGMAS:
        raise ConfigError(f"--sigma is for {' and '.join(_SIGMAS)}, not for --estimate {name}.")
    if config.denoiser is not None and name != "denoiser":
        raise ConfigError("--denoiser needs --estimate denoiser.")
    if name == "denoiser" and config.denoiser is None:
        raise ConfigError("--estimate denoiser needs --denoiser, the folder that jobs/train_denoiser.py made.")
    if name != "nearest" and (config.projection == "approximate" or config.reference_shards > 1):
        raise ConfigError(f"--projection approximate and --reference-shards are for --estimate nearest, not {name}.")
    if name not in ("nearest", "random") and config.store == "lazy":
        raise ConfigError(f"--store lazy keeps a neighbour to make the artifact from; --estimate {name} has none.")
    weights, digest = normalize(config.denoiser) if config.denoiser else "", ""
    if weights:
        from manifpt.estimates.denoiser import denoiser_digest  # torch costs seconds

        digest = denoiser_digest(weights)
    return Estimate(
        name=name,
        neighbors=config.neighbors,
        ridge=config.ridge,
        sigma=_SIGMAS.get(name, 0.0) if sigma is None else sigma,
        weights=weights,
        weights_sha256=digest,
        residual_first=config.residual_first,
    )


def _of_bundle(name: str, bundle: Bundle, config: ArtifactsConfig) -> SpaceSpec:
    """The bundle's spec of a space, which decides; what the user says of it must agree."""
    spec = bundle.spaces.get(name)
    if spec is None:
        known = ", ".join(bundle.spaces)
        raise ConfigError(
            f"The reference {bundle.uri} has no space {name!r}; it has {known}. Choose among them with --spaces, or "
            f"build a reference with {name!r}."
        )
    fields = own_fields(config.own_spaces.get(name, {}))
    own = SpaceSpec.from_json({"name": name, "kind": spec.kind, **fields})
    differing = [f for f in fields if f != "weights" and getattr(own, f) != getattr(spec, f)]
    if differing:
        raise ConfigError(
            f"Space {name!r}: {differing[0]} is {getattr(own, differing[0])!r} in the config and "
            f"{getattr(spec, differing[0])!r} in the reference {bundle.uri}. Correct it, or build the reference again."
        )
    return resolve_weights(replace(spec, weights=own.weights or spec.weights))


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
    with IsolatedDecoder() as decode:
        for start in range(0, min(manifest.rows, 1024), 64):
            for data in fetch(records(manifest.read(start, start + 64))):
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
    per_image = {s.name: 100 + (bundle.dims[s.name] * item_bytes if s.name in plan.inline else 0) for s in plan.spaces}
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
