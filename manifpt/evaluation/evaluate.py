"""The command `evaluate_attributor`: fit everything, choose on validation, then read the test images once.

Legend: S labels.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt import cluster
from manifpt.attributor.choice import Choice, choice_of, read_labels
from manifpt.attributor.examples import Examples, read_rows
from manifpt.attributor.splits import SIDES
from manifpt.baselines import BASELINES
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.evaluation.audit import audit_codecs
from manifpt.evaluation.baseline_task import fit_baseline
from manifpt.evaluation.bundles import row_of_bundle
from manifpt.evaluation.methods import Candidate, candidates_of, key_digest
from manifpt.evaluation.results import comparisons, fusions, of_baseline, of_candidate, per_source
from manifpt.evaluation.running import run_works
from manifpt.evaluation.tables import table_json, table_markdown
from manifpt.evaluation.tasks import Work, fit_attributor, test_attributor
from manifpt.log import event
from manifpt.reader import read_plan
from manifpt.spaces import View
from manifpt.storage import join, normalize, store_of

__all__ = ["ByRun", "check_codec", "evaluate_attributor", "examples_by_seed"]

ByRun = dict[tuple[str, str], Examples]  # by run and space


def evaluate_attributor(config: EvaluateConfig) -> dict[str, Any]:
    """Compares artifacts, controls and baselines. Returns the rows of `table.json` and where they are.

    Raises:
        ConfigError: what is missing or doesn't fit together.
    """
    begin = time.monotonic()
    output = normalize(config.output)
    runs = [normalize(run) for run in config.artifacts]
    control_runs = [normalize(run) for run in config.control_artifacts]
    test_runs = [normalize(run) for run in config.test_artifacts]
    if config.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {config.seeds}.")
    names = _baseline_names(config.baselines)
    candidates = candidates_of(runs, test_runs, config.spaces, config.networks, config.epochs, control_runs)
    check_codec([*runs, *control_runs], config.equalize_codec)
    bundles = [
        row_of_bundle(path, runs, config.labels) for path in config.attributor
    ]  # first: what is wrong there costs no fits
    examples = examples_by_seed(candidates, config)
    tests = _test_examples(candidates, examples[0], config)
    dataset = config.dataset or runs[0].rstrip("/").rpartition("/")[2]
    first = examples[0][candidates[0].run, candidates[0].space.name]
    event("evaluation", dataset=dataset, images=len(first.label_n), labels=len(first.labels), seeds=config.seeds,
          candidates=len(candidates), baselines=len(names), output=output)  # fmt: skip
    cluster.connect()
    view = _view(runs) if names else None
    audit = audit_codecs(first, config.equalize_codec)

    works = {
        (n, seed): _work(candidate, examples[seed], tests, output, seed)
        for n, candidate in enumerate(candidates)
        for seed in range(config.seeds)
    }
    baselines = {
        (name, seed): _baseline_work(name, examples[seed], tests, candidates[0], view, output, seed)
        for name in names
        for seed in range(config.seeds)
    }
    _run(fit_attributor, works.values(), "fit")
    chosen = _chosen(candidates, works, config.seeds)
    _run(test_attributor, [works[n, seed] for n in chosen for seed in range(config.seeds)], "test")
    _run(fit_baseline, baselines.values(), "test")

    fitted = [of_candidate(candidates[n], [works[n, seed] for seed in range(config.seeds)]) for n in chosen]
    fitted += [of_baseline(name, [baselines[name, seed] for seed in range(config.seeds)]) for name in names]
    fused_rows, weights = fusions(fitted)
    rows = [found.row for found in fitted] + [row for row, _ in fused_rows]
    rows += bundles
    tested = [tests or of_seed for of_seed in examples]
    compared = comparisons(fitted, fused_rows, [next(iter(of_seed.values())) for of_seed in tested])
    separable = [source for source, is_separable in audit["separable"].items() if is_separable]
    table = table_json(dataset, rows, separable)
    counts = {side: int((first.side_n == number).sum()) for number, side in enumerate(SIDES)}
    facts = {"images": len(first.label_n), "labels": list(first.labels), "seeds": config.seeds, **counts}
    text = table_markdown(dataset, rows, compared, audit, facts, config.paper_column)
    details = {
        "dataset": dataset,
        "facts": facts | {"left_out": first.left_out},
        "codec_audit": audit,
        "comparisons": [
            {"one": c.one, "other": c.other, "mean": c.mean, "intervals": c.intervals, "is_clear": c.is_clear}
            for c in compared
        ],
        "per_source": {f"{f.row.method} | {f.row.space}": per_source(f, first.labels) for f in fitted},
        "fusion_weights": weights,
        "seconds": round(time.monotonic() - begin, 1),
    }
    for name, document in (("table.json", table), ("details.json", details)):
        store_of(output).write(join(output, name), (json.dumps(document, indent=2) + "\n").encode())
    store_of(output).write(join(output, "table.md"), text.encode())
    return {"table": table, "text": text, "output": output}


def _baseline_names(asked: Sequence[str]) -> list[str]:
    if list(asked) == ["all"]:
        return list(BASELINES)
    for name in asked:
        if name not in BASELINES:
            raise ConfigError(f"Unknown baseline {name!r}; known: all, {', '.join(BASELINES)}.")
    return list(asked)


def check_codec(runs: Sequence[str], equalized: bool) -> None:
    """Raises:
    ConfigError: a run's images were re-encoded and the flag says that they weren't, or the other way round.
    """
    for run in runs:
        codecs = {spec.codec for spec in read_plan(run).spaces}
        if equalized and codecs != {"jpeg"}:
            raise ConfigError(
                f"--equalize-codec: {run} was computed on images as they are. Build its reference with "
                f"--equalize-codec and compute its artifacts again."
            )
        if not equalized and "jpeg" in codecs:
            raise ConfigError(f"{run} was computed on re-encoded images: say --equalize-codec here too.")


def _view(runs: Sequence[str]) -> View:
    """The pixels that baselines see: those of the runs' pixel spaces."""
    for run in runs:
        for spec in read_plan(run).spaces:
            if spec.kind != "network":
                return spec.view
    raise ConfigError("Baselines see the pixels of an rgb or frequency space: add a run that has one.")


def examples_by_seed(candidates: Sequence[Candidate], config: EvaluateConfig) -> list[ByRun]:
    """By seed: the rows of every run and space. All have the same images on the same sides."""
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

    return [{pair: of_common(pair, of_seed) for pair in rows} for of_seed in choices]


def _work(candidate: Candidate, examples: ByRun, tests: ByRun, output: str, seed: int) -> Work:
    of_run = examples[candidate.run, candidate.space.name]
    test = of_run if candidate.test_run is None else tests[candidate.test_run, candidate.space.name]
    key = candidate.key() | {"examples": of_run.digest, "test": test.digest, "seed": seed}
    folder = join(output, "methods", f"{candidate.space.name}-{candidate.estimate.name}-{key_digest(key)}")
    return Work(folder=folder, key=key, name=candidate.network, examples=of_run, test_examples=test,
                recipe=candidate.recipe, seed=seed)  # fmt: skip


def _test_examples(candidates: Sequence[Candidate], examples: ByRun, config: EvaluateConfig) -> ByRun:
    """All images that every test run has, under the labels of training: the cross-dataset test; {} without one."""
    choice = Choice(labels=read_labels(config.test_labels), group_column=config.group_column, is_test=True)
    tests = {(str(c.test_run), c.space.name): c for c in candidates if c.test_run is not None}
    rows = {pair: read_rows(*pair, config.group_column) for pair in tests}
    for pair, candidate in tests.items():
        trained_on, test = examples[candidate.run, candidate.space.name], rows[pair].chosen(choice)
        unknown = sorted(set(test.labels) - set(trained_on.labels))
        if unknown or test.shape != trained_on.shape or test.estimate.identity() != candidate.estimate.identity():
            what = f"labels that training has not ({', '.join(unknown)})" if unknown else "another shape or projection"
            raise ConfigError(f"{pair[0]} has {what}; map its sources with --test-labels, or leave them out.")
    if not tests:
        return {}
    choice = replace(choice, image_ids=_common_ids(of_run.chosen(choice) for of_run in rows.values()))
    labels, found = next(iter(examples.values())).labels, {}
    for pair, of_run in rows.items():
        test = of_run.chosen(choice)
        number = np.array([labels.index(label) for label in test.labels], np.int64)
        found[pair] = replace(test, labels=labels, label_n=number[test.label_n])
    return found


def _common_ids(examples: Iterable[Examples]) -> pa.Array:
    """The images that all have: a near copy of a real in one space is none in another."""
    first, *others = (of_run.table["image_id"].combine_chunks() for of_run in examples)
    for other in others:
        first = first.filter(pc.is_in(first, value_set=other))
    return first


def _baseline_work(
    name: str, examples: ByRun, tests: ByRun, candidate: Candidate, view: View | None, output: str, seed: int
) -> Work:
    of_run = examples[candidate.run, candidate.space.name]
    test = of_run if candidate.test_run is None else tests[candidate.test_run, candidate.space.name]
    assert view is not None
    key = {"baseline": name, "view": view.key, "examples": of_run.digest, "test": test.digest, "seed": seed}
    folder = join(output, "methods", f"{name}-{key_digest(key)}")
    return Work(folder=folder, key=key, name=name, examples=of_run, test_examples=test, view=view, seed=seed)


def _run(task: Any, works: Iterable[Work], stage: str) -> None:
    """Runs what hasn't ended before, and tells each result."""
    run_works(task, [work for work in works if work.done(stage) is None], stage, _told)


def _told(found: dict[str, Any]) -> dict[str, Any]:
    key = found["key"]
    name = key.get("baseline") or f"{key['space']['name']}/{key['estimate']['name']}/{key['network']}"
    return {
        "method": name,
        "seed": key["seed"],
        "accuracy": found.get("validation_accuracy", found.get("accuracy")),
    }


def _chosen(candidates: Sequence[Candidate], works: Mapping[tuple[int, int], Work], seeds: int) -> list[int]:
    """Of every group, the candidate with the best mean validation accuracy."""
    best: dict[tuple[str, str, bool, str], tuple[float, int]] = {}
    for n, candidate in enumerate(candidates):
        fits = [works[n, seed].done("fit") or {} for seed in range(seeds)]
        score = statistics.fmean(fit["validation_accuracy"] for fit in fits)
        if candidate.group not in best or score > best[candidate.group][0]:
            best[candidate.group] = score, n
    return [n for _, n in best.values()]
