"""Finished attributors in an evaluation: which run's artifacts they take, and how well they name its images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.attributor.bundle import SEEN, Attributor
from manifpt.attributor.choice import Choice, read_labels
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.files import bundle_file
from manifpt.attributor.splits import TEST, TRAIN
from manifpt.documents import table_of
from manifpt.errors import ConfigError
from manifpt.evaluation.tables import Row
from manifpt.metrics.attribution import accuracy, balanced_accuracy
from manifpt.reader import read_artifacts, read_plain_plan
from manifpt.storage import normalize

__all__ = ["fitting_runs", "own_examples", "row_of_bundle"]


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


def own_examples(attributor: Attributor, run: str) -> Examples | None:
    """The images of an attributor's training with their sides, where a run holds them just as they were."""
    config = attributor.config
    if "choice" not in config:
        return None
    choice = Choice.from_facts(config["choice"])
    try:
        examples = select_examples(run, config["space"]["name"], choice)
    except ConfigError:  # a run that can't be split like that is another one
        return None
    return examples if examples.digest == config["examples_digest"] else None


def _seen(attributor: Attributor, path: str) -> pa.Array:
    """Content hashes of the images that it was trained and chosen on."""
    data = bundle_file(normalize(path), attributor.config, SEEN)
    return table_of(data, f"{SEEN} of {path}", ["content_hash"])["content_hash"].combine_chunks()


def row_of_bundle(path: str, runs: Sequence[str], labels_path: str | None) -> Row:
    """A finished attributor on its own test images, where the run is the one of its training, and else on all images
    that its training didn't see.

    Args:
        path: of the bundle.
        runs: folders; the first whose artifacts it takes is read.
        labels_path: YAML that maps sources to its labels.

    Raises:
        ConfigError: as of `fitting_runs`; sources that it doesn't know.
    """
    attributor = Attributor.load(path)
    run, space = fitting_runs(path, attributor, runs)[0], attributor.config["space"]["name"]
    labels, own = read_labels(labels_path), own_examples(attributor, run)
    if own is None:
        examples = select_examples(run, space, Choice(labels=labels, is_test=True))
        is_seen_n = pc.is_in(examples.table["content_hash"], value_set=_seen(attributor, path)).to_numpy()
        if is_seen_n.all():
            raise ConfigError(f"The attributor {path} was trained on every image of {run}: test it on others.")
        examples = replace(examples, side_n=np.where(is_seen_n, TRAIN, TEST).astype(np.int8))
        note = f"on all {(~is_seen_n).sum():,} images of {run} that its training has not seen"
    else:
        examples, labels = own, labels or dict(attributor.config["choice"]["labels"])
        note = f"on its own {(own.side_n == TEST).sum():,} test images, by the split of its training"
    ids = examples.table["image_id"].filter(pa.array(examples.side_n == TEST)).combine_chunks()
    begin, answers, numbers = time.perf_counter(), [], []
    for table in read_artifacts(run, space):
        table = table.filter(pc.is_in(table["image_id"], value_set=ids))
        named = [labels.get(source, source) for source in table["source"].to_pylist()]
        table = table.filter(pa.array([label is not None for label in named], pa.bool_()))
        label_n = attributor.label_numbers([label for label in named if label is not None])
        if len(table):
            predicted = attributor.predict(table["artifact"].combine_chunks().to_numpy_ndarray())
            answers.append(predicted.probability_bs.argmax(1))
            numbers.append(label_n)
    label_n, answer_n = np.concatenate(numbers), np.concatenate(answers)
    return Row(
        kind="artifact",
        method=f"attributor {path}",
        space=space,
        chosen=attributor.config["network"],
        accuracies=(accuracy(label_n, answer_n),),
        balanced=(balanced_accuracy(label_n, answer_n),),
        validation=None,
        predict_s=time.perf_counter() - begin,
        notes=(note,),
    )
