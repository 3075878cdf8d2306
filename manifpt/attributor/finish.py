"""What becomes of a training: calibrated and given a threshold on validation, measured once on test, published.

Legend: N images, S labels, M bins of confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import load

from manifpt.artifacts import parquet_bytes
from manifpt.attributor.baseline import BASELINE, baseline_table
from manifpt.attributor.bundle import SEEN, save_bundle
from manifpt.attributor.calibration import fit_temperature, probabilities
from manifpt.attributor.card import model_card
from manifpt.attributor.examples import Examples
from manifpt.attributor.features import STATISTICS, FeatureStatistics
from manifpt.attributor.openset import OpenSet, chosen_on, validation_aurocs
from manifpt.attributor.outputs import Outputs, read_outputs
from manifpt.attributor.splits import TEST
from manifpt.errors import ConfigError
from manifpt.following import json_lines
from manifpt.log import event
from manifpt.metrics.attribution import confusion, precision_recall
from manifpt.metrics.calibration import Reliability, calibration_error_by_chance, reliability
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.reference import library_versions
from manifpt.storage import join, store_of

__all__ = ["finish"]


def finish(output: str, examples: Examples, facts: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Makes a bundle of what the workers left in a training's folder. Returns its metrics.

    Args:
        output: the folder.
        examples: that were trained on.
        facts: what decided the training.
        workers: how many there were.
    """
    from manifpt.report.reliability import draw_reliability  # matplotlib takes a second

    store = store_of(output)
    validation, test = (_said(output, side, workers) for side in ("validation", "test"))
    temperature = fit_temperature(validation.logits_bs, validation.label_b)
    statistics = FeatureStatistics.from_bytes(store.read(join(output, STATISTICS)))
    if not statistics.count_s.all():
        # Each worker gets as many images as any other, and a remainder goes to none.
        lost = ", ".join(label for label, count in zip(examples.labels, statistics.count_s, strict=True) if not count)
        raise ConfigError(
            f"None of the {workers} workers saw an image of {lost}, of which there are too few: train with "
            f"--workers 1, give it more images, or leave labels of few images out with --min-images."
        )
    aurocs = validation_aurocs(validation, temperature, statistics)
    openset = chosen_on(validation, temperature, statistics, aurocs, facts["false_alarms"])
    event("open_set", score=openset.score, threshold=openset.threshold, **aurocs)
    calibration = _calibration(test, temperature, facts["seed"]) | {
        "unknown": {"validation_auroc": aurocs, "rate": facts["false_alarms"]} | _alarms(openset, test, examples.labels)
    }
    metrics = _metrics(output, examples, test, facts["seed"]) | {
        name: calibration[name] for name in ("calibration_error", "calibration_error_by_chance")
    }
    config = {**facts, "workers": workers, "versions": library_versions()}
    card = model_card(examples.labels, config, metrics, calibration["unknown"] | openset.chosen())
    state = load(store.read(join(output, "network.safetensors")))
    others = {
        BASELINE: parquet_bytes(baseline_table(examples, {"validation": validation, "test": test}, openset)),
        SEEN: parquet_bytes(examples.table.select(["content_hash"]).filter(pa.array(examples.side_n != TEST))),
        "calibration.png": draw_reliability(calibration["reliability"]),
    }
    save_bundle(output, state, examples.labels, config, calibration, openset, metrics, card, others)
    return {"labels": list(examples.labels), **metrics}


def _said(output: str, side: str, workers: int) -> Outputs:
    """What all workers said of their shares of a side; not those of an earlier attempt with more workers."""
    folder = join(output, "predictions")
    written = {entry.key for entry in store_of(output).list(folder)}
    names = (f"{side}-{rank:05d}-of-{workers:05d}.parquet" for rank in range(workers))
    return read_outputs([join(folder, name) for name in names if name in written])


def _calibration(test: Outputs, temperature: float, seed: int) -> dict[str, Any]:
    """How far the probabilities of test images can be believed, before and after calibration."""
    before, after = (reliability(probabilities(test.logits_bs, t), test.label_b) for t in (1.0, temperature))
    return {
        "temperature": temperature,
        "method": "temperature scaling, fitted on the validation images",
        "calibration_error": after.error,
        "calibration_error_uncalibrated": before.error,
        "calibration_error_by_chance": calibration_error_by_chance(probabilities(test.logits_bs, temperature), seed),
        "reliability": {"before": _bins(before), "after": _bins(after)},
    }


def _bins(found: Reliability) -> dict[str, Any]:
    return {
        "images": found.count_m.tolist(),
        "confidence": _no_nan(found.confidence_m),
        "accuracy": _no_nan(found.accuracy_m),
    }


def _alarms(openset: OpenSet, test: Outputs, labels: tuple[str, ...]) -> dict[str, Any]:
    """Which shares of the test images, all of known sources, are called unknown."""
    is_unknown_n = openset.scores(test) > openset.threshold
    rate_s = np.bincount(test.label_b, weights=is_unknown_n, minlength=len(labels)) / np.bincount(test.label_b)
    rates = dict(zip(labels, rate_s.tolist(), strict=True))
    return {"measured_rate": float(rate_s.mean()), "measured_rate_by_label": rates}


def _metrics(output: str, examples: Examples, test: Outputs, seed: int) -> dict[str, Any]:
    confusion_ss = confusion(test.label_b, test.predicted_b, examples.labels)
    precision_s, recall_s = precision_recall(confusion_ss)
    history = json_lines(join(output, "metrics.jsonl"))
    return {
        "accuracy": test.accuracy,
        "balanced_accuracy": test.balanced_accuracy,
        "fd_ratio": fd_ratio_or_none(test.features_bf, test.label_b, seed),
        "test_images": confusion_ss.sum(axis=1).tolist(),
        "precision": _no_nan(precision_s),
        "recall": _no_nan(recall_s),
        "confusion": confusion_ss.tolist(),
        "validation_accuracy": max(epoch["validation_accuracy"] for epoch in history),
        "epochs": len(history),
        "images_per_s": float(np.median([epoch["images_per_s"] for epoch in history])),
        "training_s": sum(epoch["seconds"] for epoch in history),
    }


def _no_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
