"""The images that an evaluation compares methods on: the same of every run, with the same pixels, on the same sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.attributor.choice import Choice, choice_of, read_labels
from manifpt.attributor.examples import Examples, read_rows
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.evaluation.methods import Candidate
from manifpt.log import event

__all__ = ["ByRun", "examples_by_seed", "examples_of_another_set"]

ByRun = dict[tuple[str, str], Examples]  # by run and space


def examples_by_seed(candidates: Sequence[Candidate], config: EvaluateConfig) -> list[ByRun]:
    """By seed: the rows of every run and space. All have the same images on the same sides.

    Raises:
        ConfigError: two runs saw other pixels under one image id, or split the images in two ways.
    """
    choice = choice_of(config)
    pairs = list(dict.fromkeys((c.run, c.space.name) for c in candidates))
    rows = {pair: read_rows(*pair, config.group_column) for pair in pairs}
    alone = {pair: of_run.chosen(choice) for pair, of_run in rows.items()}
    common = _common_ids(alone.values())
    event("images_in_all_runs", images=len(common), references=len({r.reference_digest for r in rows.values()}))
    choices = [replace(choice, seed=seed, image_ids=common) for seed in range(config.seeds)]

    def of_common(pair: tuple[str, str], of_seed: Choice) -> Examples:
        found, left_out = rows[pair].chosen(of_seed), alone[pair].left_out
        lacking = len(alone[pair].label_n) - len(common)
        return replace(found, left_out=left_out | ({"not in all runs": lacking} if lacking else {}))

    found = [{pair: of_common(pair, of_seed) for pair in rows} for of_seed in choices]
    for of_seed in found:
        _check_alike(of_seed)
    return found


def examples_of_another_set(candidates: Sequence[Candidate], examples: ByRun, config: EvaluateConfig) -> ByRun:
    """All images that every test run has and training has not, under the labels of training; {} without test runs.

    Args:
        candidates: with their test runs.
        examples: of training, of any seed: all seeds have the same images.
        config: whose label map tells which of the sources are those of training.

    Raises:
        ConfigError: a test run of another space, shape, codec or projection, of labels that training has not, or with
            no image but those of training.
    """
    choice = Choice(labels=read_labels(config.test_labels), group_column=config.group_column, is_test=True)
    tests = {(str(c.test_run), c.space.name): c for c in candidates if c.test_run is not None}
    rows = {pair: read_rows(*pair, config.group_column) for pair in tests}
    alone = {pair: of_run.chosen(choice) for pair, of_run in rows.items()}
    for pair, candidate in tests.items():
        trained_on, test = examples[candidate.run, candidate.space.name], alone[pair]
        unknown = sorted(set(test.labels) - set(trained_on.labels))
        is_same = test.spec.identity() == trained_on.spec.identity() and test.shape == trained_on.shape
        if unknown or not is_same or _method(test.estimate) != _method(candidate.estimate):
            what = f"labels that training has not ({', '.join(unknown)})" if unknown else "another space or projection"
            raise ConfigError(f"{pair[0]} has {what}; map its sources with --test-labels, or leave them out.")
    if not tests:
        return {}
    common, seen = _common_ids(alone.values()), next(iter(examples.values())).table["content_hash"]
    first = next(iter(alone.values())).table
    is_new_n = pc.invert(pc.is_in(first["content_hash"], value_set=seen.combine_chunks()))
    unseen = first["image_id"].filter(is_new_n).combine_chunks()
    left = common.filter(pc.is_in(common, value_set=unseen))
    if not len(left):
        raise ConfigError("Training has every image of the runs in --test-artifacts: name runs of other images.")
    labels, found = next(iter(examples.values())).labels, {}
    for pair, of_run in rows.items():
        test = of_run.chosen(replace(choice, image_ids=left))
        number = np.array([labels.index(label) for label in test.labels], np.int64)
        left_out = alone[pair].left_out | ({"in training": len(common) - len(left)} if len(left) < len(common) else {})
        found[pair] = replace(test, labels=labels, label_n=number[test.label_n], left_out=left_out)
    _check_alike(found)
    return found


def _method(estimate: Estimate) -> dict[str, Any]:
    """Each set has a denoiser of its own reals, as it has a reference of its own."""
    return {name: value for name, value in estimate.identity().items() if name != "weights_sha256"}


def _common_ids(examples: Iterable[Examples]) -> pa.Array:
    """The images that all have: a near copy of a real in one space is none in another."""
    first, *others = (of_run.table["image_id"].combine_chunks() for of_run in examples)
    for other in others:
        first = first.filter(pc.is_in(first, value_set=other))
    return first


def _check_alike(examples: ByRun) -> None:
    """Runs are joined by image ids, and those of one manifest agree on everything else. Two manifests may not: a folder
    that was sampled again has the old names, and a column of groups, or a split of its own, puts images on other sides.

    Raises:
        ConfigError: they don't agree.
    """
    (first_pair, first), *others = examples.items()
    for pair, other in others:
        both = f"{first_pair[0]} and {pair[0]}"
        if not first.table["content_hash"].equals(other.table["content_hash"]):
            raise ConfigError(f"{both} saw other pixels under the same image ids: compute the older one again.")
        is_same = first.labels == other.labels and np.array_equal(first.label_n, other.label_n)
        if not is_same or not np.array_equal(first.side_n, other.side_n):
            raise ConfigError(
                f"{both} put the same images under other labels or on other sides (their manifests differ in sources, "
                f"in a column of groups or in a split): compute both from one manifest."
            )
