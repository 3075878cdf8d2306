"""Finished attributors in an evaluation: which run's artifacts they take, and how well they name all of its images."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from manifpt.attributor.bundle import Attributor
from manifpt.attributor.choice import read_labels
from manifpt.errors import ConfigError
from manifpt.evaluation.tables import Row
from manifpt.metrics.attribution import accuracy, balanced_accuracy
from manifpt.reader import read_artifacts, read_plain_plan

__all__ = ["fitting_runs", "row_of_bundle"]


def fitting_runs(path: str, attributor: Attributor, runs: Sequence[str]) -> list[str]:
    """The runs whose artifacts an attributor takes, in their order; one or more.

    Args:
        path: of its bundle, for messages.
        attributor: it.
        runs: folders of runs of images as they are.

    Raises:
        ConfigError: there is none, or a run altered its images.
    """
    found = []
    for run in runs:
        plan = read_plain_plan(run)
        estimate, digest = plan.estimate.identity(), plan.reference_digest
        if any(attributor.fits(spec.identity(), estimate, digest) for spec in plan.spaces):
            found.append(run)
    if not found:
        raise ConfigError(
            f"The attributor {path} takes artifacts of space {attributor.config['space']['name']}, estimate "
            f"{attributor.config['estimate']['name']} and reference {attributor.config['reference_digest'][:16]}; none "
            f"of the runs has them."
        )
    return found


def row_of_bundle(path: str, runs: Sequence[str], labels_path: str | None) -> Row:
    """A finished attributor on all images of the run whose artifacts it takes: give it images that it never saw.

    Args:
        path: of the bundle.
        runs: folders.
        labels_path: YAML that maps sources to its labels.

    Raises:
        ConfigError: as of `fitting_runs`; sources that it doesn't know.
    """
    attributor = Attributor.load(path)
    run, space = fitting_runs(path, attributor, runs)[0], attributor.config["space"]
    labels = read_labels(labels_path)
    begin, answers, numbers = time.perf_counter(), [], []
    for table in read_artifacts(run, space["name"]):
        named = [labels.get(source, source) for source in table["source"].to_pylist()]
        table = table.filter(pa.array([label is not None for label in named]))
        label_n = attributor.label_numbers([label for label in named if label is not None])
        predicted = attributor.predict(table["artifact"].combine_chunks().to_numpy_ndarray())
        answers.append(predicted.probability_bs.argmax(1))
        numbers.append(label_n)
    label_n, answer_n = np.concatenate(numbers), np.concatenate(answers)
    return Row(
        kind="artifact",
        method=f"attributor {path}",
        space=space["name"],
        chosen=attributor.config["network"],
        accuracies=(accuracy(label_n, answer_n),),
        balanced=(balanced_accuracy(label_n, answer_n),),
        validation=0.0,
        predict_s=time.perf_counter() - begin,
    )
