"""The command `train_attributor`: choose rows, train over workers, calibrate, measure once on test, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from manifpt.attributor.calibration import fit_temperature, probabilities
from manifpt.attributor.card import model_card
from manifpt.attributor.examples import Examples, choice_of, select_examples
from manifpt.attributor.outputs import Outputs, read_outputs
from manifpt.attributor.splits import SIDES, TEST, TRAIN, VALIDATION
from manifpt.attributor.trackers import Track, make_tracker
from manifpt.config import TrainConfig
from manifpt.errors import ConfigError
from manifpt.following import followed, json_lines
from manifpt.log import event
from manifpt.metrics.attribution import (
    confusion,
    expected_calibration_error,
    precision_recall,
)
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.plan import publish_facts
from manifpt.reference import library_versions
from manifpt.resources import share_training
from manifpt.spaces import BUILT_IN
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import join, normalize, store_of

__all__ = ["train_attributor"]


def train_attributor(config: TrainConfig) -> dict[str, Any]:
    """Trains an attributor, or goes on where an earlier call stopped. Returns the bundle's metrics.

    Raises:
        ConfigError: what is missing or doesn't fit together; nothing was trained.
        WorkerError: workers died again and again.
    """
    begin = time.monotonic()
    run, output = normalize(config.artifacts), normalize(config.output)
    examples = select_examples(run, config.space, replace(choice_of(config), seed=config.seed))
    from manifpt.attributor import training  # torch costs seconds

    network = config.network or ("resnet50" if len(examples.shape) == 3 else "head")
    training.check_network(network, examples.shape)
    recipe = training.RECIPES[network]
    if config.epochs is not None:
        if config.epochs < 1:
            raise ConfigError(f"--epochs must be at least 1, not {config.epochs}.")
        recipe = replace(recipe, epochs=config.epochs)
    track = make_tracker(config.tracker, output)
    weights = _imagenet() if network == "resnet50" else None
    facts = _facts(config, examples, network, recipe, weights.weights_sha256 if weights else None)
    publish_facts(join(output, "training.json"), facts, "training")
    if store_of(output).stat(join(output, "config.json")) is not None:
        metrics: dict[str, Any] = json.loads(store_of(output).read(join(output, "metrics.json")))
        return metrics | {"labels": list(examples.labels), "trained": False}
    count_s = np.bincount(examples.label_n[examples.side_n == TRAIN], minlength=len(examples.labels))
    event("training", run=run, space=config.space, estimate=examples.estimate.label, network=network,
          images=len(examples.label_n), train=int(count_s.sum()), labels=len(examples.labels),
          output=output)  # fmt: skip

    from manifpt import cluster, pipeline
    from manifpt.attributor import worker
    from manifpt.distributed import run_workers

    cluster.connect()
    shares = share_training(*cluster.cluster(), config.workers)
    if count_s.sum() < 2 * shares.workers:
        raise ConfigError(
            f"{shares.workers} workers can't share {count_s.sum()} training images, since each needs two: --workers "
            f"{count_s.sum() // 2} or fewer."
        )
    job = worker.Job(
        output=output,
        run=run,
        space=config.space,
        shape=examples.shape,
        labels=examples.labels,
        train_rows=int(count_s.sum()),
        validation=examples.parts(VALIDATION),
        test=examples.parts(TEST),
        network=network,
        recipe=recipe,
        weight_s=training.class_weights(examples.label_n[examples.side_n == TRAIN], len(count_s), recipe.balanced),
        weights=weights,
        seed=config.seed,
    )
    rows = pipeline.artifact_rows(run, config.space, examples.parts(TRAIN), shares.task_cpus)
    with followed(join(output, "metrics.jsonl"), _tell(recipe.epochs, track)):
        run_workers(worker.train, job, output, shares, rows)
    metrics = _finish(output, examples, facts, shares.workers) | {"seconds": round(time.monotonic() - begin, 1)}
    return metrics | {"trained": True}


def _imagenet() -> Any:
    """torchvision's ImageNet weights, where they can be had."""
    try:
        return resolve_weights(BUILT_IN["supervised"])
    except ConfigError as error:
        event("no_imagenet_weights", hint="resnet50 starts from random weights", why=error)
        return None


def _facts(config: TrainConfig, examples: Examples, network: str, recipe: Any, weights: str | None) -> dict[str, Any]:
    """What decides the attributor, as `config.json` says it."""
    return {
        "space": examples.spec.identity(),
        "estimate": examples.estimate.identity(),
        "reference_digest": examples.reference_digest,
        "shape": list(examples.shape),
        "examples_digest": examples.digest,
        "images": {side: int((examples.side_n == n).sum()) for n, side in enumerate(SIDES)},
        "left_out": examples.left_out,
        "group_column": config.group_column,
        "network": network,
        "start": f"ImageNet, SHA-256 {weights}" if weights else "random",
        "recipe": asdict(recipe) | {"milestones": list(recipe.milestones)},
        "seed": config.seed,
    }


def _tell(epochs: int, track: Track) -> Callable[[dict[str, Any], list[dict[str, Any]]], None]:
    """Tells an epoch, with the time that the rest will take at most."""

    def tell(epoch: dict[str, Any], found: list[dict[str, Any]]) -> None:
        event(
            "epoch", epoch=f"{epoch['epoch']}/{epochs}", loss=epoch["loss"], accuracy=epoch["accuracy"],
            validation_accuracy=epoch["validation_accuracy"], images_per_s=epoch["images_per_s"],
            eta_s=round((epochs - epoch["epoch"]) * float(np.median([e["seconds"] for e in found]))),
        )  # fmt: skip
        try:
            track(epoch)
        except Exception as error:  # a tracker's server is no reason to lose a training
            event("not_tracked", epoch=epoch["epoch"], error=error)

    return tell


def _finish(output: str, examples: Examples, facts: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Calibrates on validation, measures on test, and publishes the bundle."""
    from safetensors.torch import load

    from manifpt.attributor.bundle import save_bundle

    validation, test = (_said(output, side, workers) for side in ("validation", "test"))
    temperature = fit_temperature(validation.logits_bs, validation.label_b)
    confusion_ss = confusion(test.label_b, test.predicted_b, examples.labels)
    precision_s, recall_s = precision_recall(confusion_ss)
    errors = [expected_calibration_error(probabilities(test.logits_bs, t), test.label_b) for t in (temperature, 1.0)]
    calibration = {
        "temperature": temperature,
        "method": "temperature scaling, fitted on the validation images",
        "calibration_error": errors[0],
        "calibration_error_uncalibrated": errors[1],
    }
    history = json_lines(join(output, "metrics.jsonl"))
    metrics = {
        "accuracy": test.accuracy,
        "balanced_accuracy": test.balanced_accuracy,
        "calibration_error": calibration["calibration_error"],
        "fd_ratio": fd_ratio_or_none(test.features_bf, test.label_b, facts["seed"]),
        "test_images": confusion_ss.sum(axis=1).tolist(),
        "precision": _no_nan(precision_s),
        "recall": _no_nan(recall_s),
        "confusion": confusion_ss.tolist(),
        "validation_accuracy": max(epoch["validation_accuracy"] for epoch in history),
        "epochs": len(history),
        "images_per_s": float(np.median([epoch["images_per_s"] for epoch in history])),
        "training_s": sum(epoch["seconds"] for epoch in history),
    }
    state = load(store_of(output).read(join(output, "network.safetensors")))
    config = {**facts, "versions": library_versions()}
    card = model_card(examples.labels, config, metrics)
    save_bundle(output, state, examples.labels, config, calibration, metrics, card)
    return {"labels": list(examples.labels), **metrics}


def _no_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _said(output: str, side: str, workers: int) -> Outputs:
    """What all workers said of their shares of a side; not those of an earlier attempt with more workers."""
    folder = join(output, "predictions")
    written = {entry.key for entry in store_of(output).list(folder)}
    names = (f"{side}-{rank:05d}-of-{workers:05d}.parquet" for rank in range(workers))
    return read_outputs([join(folder, name) for name in names if name in written])
