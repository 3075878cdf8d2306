"""The command `train_attributor`: choose rows, train over workers, calibrate, measure once on test, publish."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifpt.artifacts import to_numpy
from manifpt.attributor.calibration import fit_temperature, probabilities
from manifpt.attributor.card import model_card
from manifpt.attributor.examples import Choice, Examples, read_labels, select_examples
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.trackers import make_tracker
from manifpt.config import TrainConfig
from manifpt.errors import ConfigError, PlanMismatch
from manifpt.log import event
from manifpt.metrics.attribution import (
    accuracy,
    balanced_accuracy,
    confusion,
    expected_calibration_error,
    precision_recall,
)
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.reference import library_versions
from manifpt.resources import share_training
from manifpt.spaces import BUILT_IN
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import join, normalize, store_of

__all__ = ["train_attributor"]

_POLL_S = 2.0


def train_attributor(config: TrainConfig) -> dict[str, Any]:
    """Trains an attributor, or goes on where an earlier call stopped. Returns the bundle's metrics.

    Raises:
        ConfigError: what is missing or doesn't fit together; nothing was trained.
        WorkerError: workers died again and again.
    """
    begin = time.monotonic()
    run, output = normalize(config.artifacts), normalize(config.output)
    choice = Choice(
        labels=read_labels(config.labels),
        min_images=config.min_images,
        most_images=config.most_images,
        group_column=config.group_column,
        seed=config.seed,
    )
    examples = select_examples(run, config.space, choice)
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
    _publish_plan(facts, output)
    if store_of(output).stat(join(output, "config.json")) is not None:
        metrics: dict[str, Any] = json.loads(store_of(output).read(join(output, "metrics.json")))
        return metrics | {"labels": list(examples.labels), "trained": False}
    count_s = np.bincount(examples.label_n[examples.side_n == TRAIN], minlength=len(examples.labels))
    event("training", run=run, space=config.space, estimate=examples.estimate.label, network=network,
          images=len(examples.label_n), train=int(count_s.sum()), labels=len(examples.labels),
          output=output)  # fmt: skip

    from manifpt import pipeline
    from manifpt.attributor import worker
    from manifpt.distributed import run_workers

    pipeline.connect()
    shares = share_training(*pipeline.cluster(), config.workers)
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
    with _told_as_it_goes(output, recipe.epochs, track):
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
        "images": {side: int((examples.side_n == n).sum()) for n, side in enumerate(("train", "validation", "test"))},
        "left_out": examples.left_out,
        "group_column": config.group_column,
        "network": network,
        "start": f"ImageNet, SHA-256 {weights}" if weights else "random",
        "recipe": asdict(recipe) | {"milestones": list(recipe.milestones)},
        "seed": config.seed,
    }


def _publish_plan(facts: Mapping[str, Any], output: str) -> None:
    """Writes `training.json`, or finds the same there.

    Raises:
        PlanMismatch: the folder holds another training; the message says what differs.
    """
    uri = join(output, "training.json")
    try:
        if store_of(uri).create(uri, (json.dumps(facts, indent=2) + "\n").encode()):
            return
        there = json.loads(store_of(uri).read(uri))
    except OSError as error:
        raise ConfigError(
            f"Can't write to {output} ({error}); choose another --output or correct its rights."
        ) from error
    differing = [name for name in facts if there.get(name) != json.loads(json.dumps(facts[name]))]
    if differing:
        raise PlanMismatch(
            f"{output} holds another training: {', '.join(differing)} differs. Choose another --output, or delete it."
        )


@contextlib.contextmanager
def _told_as_it_goes(output: str, epochs: int, track: Any) -> Iterator[None]:
    """Tells every epoch that the workers have written to `metrics.jsonl`."""
    ended = threading.Event()
    store, uri = store_of(output), join(output, "metrics.jsonl")

    def lines() -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in store.read(uri).decode().splitlines()]
        except (FileNotFoundError, ValueError):
            return []

    told = len(lines())

    def tell() -> None:
        nonlocal told
        found = lines()
        for epoch in found[told:]:
            event(
                "epoch", epoch=f"{epoch['epoch']}/{epochs}", loss=epoch["loss"], accuracy=epoch["accuracy"],
                validation_accuracy=epoch["validation_accuracy"], images_per_s=epoch["images_per_s"],
                eta_s=round((epochs - epoch["epoch"]) * float(np.median([e["seconds"] for e in found]))),
            )  # fmt: skip
            try:
                track(epoch)
            except Exception as error:  # a tracker's server is no reason to lose a training
                event("not_tracked", epoch=epoch["epoch"], error=error)
        told = max(told, len(found))

    def watch() -> None:
        while not ended.wait(_POLL_S):
            tell()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    tell()


def _finish(output: str, examples: Examples, facts: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Calibrates on validation, measures on test, and publishes the bundle."""
    from safetensors.torch import load

    from manifpt.attributor.bundle import save_bundle

    validation, test = (_predictions(output, side, workers) for side in ("validation", "test"))
    temperature = fit_temperature(to_numpy(validation["logits"]), examples.label_n[validation["row"].to_numpy()])
    label_n, logits_ns = examples.label_n[test["row"].to_numpy()], to_numpy(test["logits"])
    predicted_n = logits_ns.argmax(1)
    confusion_ss = confusion(label_n, predicted_n, examples.labels)
    precision_s, recall_s = precision_recall(confusion_ss)
    calibration = {
        "temperature": temperature,
        "method": "temperature scaling, fitted on the validation images",
        "calibration_error": expected_calibration_error(probabilities(logits_ns, temperature), label_n),
        "calibration_error_uncalibrated": expected_calibration_error(probabilities(logits_ns, 1.0), label_n),
    }
    history = [json.loads(line) for line in store_of(output).read(join(output, "metrics.jsonl")).decode().splitlines()]
    metrics = {
        "accuracy": accuracy(label_n, predicted_n),
        "balanced_accuracy": balanced_accuracy(label_n, predicted_n),
        "calibration_error": calibration["calibration_error"],
        "fd_ratio": fd_ratio_or_none(to_numpy(test["features"]), label_n, facts["seed"]),
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


def _predictions(output: str, side: str, workers: int) -> pa.Table:
    """All workers' shares of a side, in the order of rows; not those of an earlier attempt with more workers."""
    store, folder = store_of(output), join(output, "predictions")
    written = {entry.key for entry in store.list(folder)}
    names = [name for name in (f"{side}-{rank:05d}-of-{workers:05d}.parquet" for rank in range(workers))
             if name in written]  # fmt: skip
    tables = [pq.read_table(pa.BufferReader(store.read(join(folder, name)))) for name in names]
    return pa.concat_tables(tables).combine_chunks().sort_by("row")
