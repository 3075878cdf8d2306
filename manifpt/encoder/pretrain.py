"""The command `pretrain_encoder`: reals -> an encoder that never saw anything else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.config import EncoderConfig, ReferenceConfig, rejection_budget
from manifpt.encoder.card import encoder_card
from manifpt.encoder.network import architecture_of
from manifpt.encoder.probe import Probe
from manifpt.encoder.worker import Job, pretrain
from manifpt.errors import ConfigError
from manifpt.following import followed, json_lines
from manifpt.log import event
from manifpt.manifest import Manifest, records
from manifpt.plan import Plan, publish_facts
from manifpt.planning import plan_reference
from manifpt.reference import library_versions
from manifpt.resources import share_training
from manifpt.spaces import SpaceSpec
from manifpt.spaces.encoders import encoder_config
from manifpt.storage import join, store_of
from manifpt.trained import publish_trained

__all__ = ["pretrain_encoder"]

_LEAST_PX = 16
_BANK, _QUERIES = 5_000, 1_000
_BLOCK_ROWS = 1 << 16


def pretrain_encoder(config: EncoderConfig) -> dict[str, Any]:
    """Trains an encoder, or goes on where an earlier call stopped. Returns its config, and whether it was trained now.

    Raises:
        ConfigError: what is missing or doesn't fit together.
        WorkerError: workers died again and again.
    """
    begin = time.monotonic()
    for name in ("epochs", "batch_size"):
        least = 1 if name == "epochs" else 2
        if getattr(config, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(config, name)}.")
    reference = ReferenceConfig(manifest=config.manifest, output=config.output, spaces=("rgb",), size_px=config.size_px)
    plan, output = plan_reference(reference)
    pixels = _square(plan.spaces[0])
    size_px = pixels.height_px or 0
    if plan.rows < config.batch_size:
        raise ConfigError(
            f"{plan.manifest_uri} has {plan.rows} images, fewer than a batch of {config.batch_size}: index more, or "
            f"choose a smaller --batch-size."
        )
    probe = _probe(plan, config.label_column, config.seed) if config.label_column else None
    facts = {
        "architecture": architecture_of(config.backbone, size_px), "size_px": size_px,
        "mean": list(pixels.mean), "std": list(pixels.std), "manifest_digest": plan.manifest_digest,
        "policy": config.policy, "epochs": config.epochs, "batch_size": config.batch_size, "seed": config.seed,
        "label_column": config.label_column, "decoder": plan.decoder,
    }  # fmt: skip
    publish_facts(join(output, "training.json"), facts, "encoder")
    if store_of(output).stat(join(output, "config.json")) is not None:
        return encoder_config(output) | {"trained": False}

    from manifpt import cluster, pipeline
    from manifpt.distributed import run_workers

    cluster.connect()
    shares = share_training(*cluster.cluster(), config.workers)
    if config.batch_size < 2 * shares.workers:
        raise ConfigError(f"{shares.workers} workers need a --batch-size of {2 * shares.workers} or more.")
    event("pretraining", images=plan.rows, architecture=facts["architecture"], size_px=size_px, policy=config.policy,
          epochs=config.epochs, workers=shares.workers, output=output)  # fmt: skip
    job = Job(
        output=output, backbone=config.backbone, policy=config.policy, epochs=config.epochs,
        batch_size=config.batch_size, seed=config.seed, pixels=pixels, size_px=size_px, images=plan.rows,
        most_rejected=rejection_budget(config.max_rejected, plan.rows), probe=probe,
    )  # fmt: skip
    with followed(join(output, "metrics.jsonl"), _tell):
        run_workers(
            pretrain, job, output, shares, pipeline.view_rows(replace(plan, spaces=(pixels,)), shares.task_cpus)
        )
    return _publish(output, facts, time.monotonic() - begin) | {"trained": True}


def _square(spec: SpaceSpec) -> SpaceSpec:
    """The view of training, which is the one that a network space has."""
    if spec.height_px != spec.width_px:
        raise ConfigError(
            f"The first image has {spec.width_px} x {spec.height_px} px, and an encoder sees squares: state --size-px."
        )
    if (spec.height_px or 0) < _LEAST_PX:
        raise ConfigError(f"An encoder needs images of {_LEAST_PX} px or more, not of {spec.height_px} px.")
    return replace(spec, size_px=spec.height_px)


def _probe(plan: Plan, column: str, seed: int) -> Probe:
    """Some labelled images, by chance: most are the bank, the others are told by it."""
    manifest = Manifest(plan.manifest_uri)
    if column not in manifest.kept_columns:
        raise ConfigError(
            f"{plan.manifest_uri} has no kept column {column!r}; keep it: index_images.py --keep-columns {column}."
        )
    labels = manifest.read(0, manifest.rows, [column])[column].combine_chunks().cast(pa.string())
    classes = sorted(pc.unique(labels.drop_null()).to_pylist())
    if len(classes) < 2:
        raise ConfigError(
            f"--label-column {column} has {len(classes)} value(s): a probe tells two classes or more apart."
        )
    labelled_n = np.flatnonzero(labels.is_valid().to_numpy(zero_copy_only=False))
    chosen_n = np.random.default_rng(seed).permutation(labelled_n)[: _BANK + _QUERIES]
    row_of: dict[int, dict[str, Any]] = {}
    for start in range(0, manifest.rows, _BLOCK_ROWS):
        of_block = np.sort(chosen_n[(chosen_n >= start) & (chosen_n < start + _BLOCK_ROWS)])
        if len(of_block):
            rows = records(manifest.read(start, start + _BLOCK_ROWS).take(of_block - start))
            row_of |= dict(zip(of_block.tolist(), rows, strict=True))
    number = {label: n for n, label in enumerate(classes)}
    label_n = np.array([number[label] for label in labels.take(chosen_n).to_pylist()], np.int64)
    ordered = [row_of[row] for row in chosen_n.tolist()]
    return Probe(ordered, label_n, min(_BANK, len(chosen_n) * _BANK // (_BANK + _QUERIES)))


def _tell(line: dict[str, Any], _: Sequence[dict[str, Any]]) -> None:
    known = {name: value for name, value in line.items() if value is not None}
    if not line["epoch"]:  # before training: what can be used, and what a random network tells
        known = {name: known[name] for name in ("images", "knn_accuracy") if name in known}
    event("pretraining_step" if "step" in line else "pretraining_epoch" if line["epoch"] else "usable", **known)


def _publish(output: str, facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Card and config, the config last: with it the encoder is whole."""
    passes = [line for line in json_lines(join(output, "metrics.jsonl")) if "step" not in line]
    shown = {
        **facts,
        "images": passes[0]["images"],
        "images_an_epoch": passes[-1]["images"],
        "loss": [line["loss"] for line in passes[1:]],
        "knn_accuracy": [line["knn_accuracy"] for line in passes if line["knn_accuracy"] is not None],
        "seconds": round(seconds, 1),
        "versions": library_versions(),
    }
    return publish_trained(output, shown, encoder_card(shown))
