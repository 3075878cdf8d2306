"""The command `evaluate_attributor`: fit everything, choose on validation, then read the test images once.

Legend: S labels.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manifpt import cluster
from manifpt.attributor.splits import SIDES, TEST
from manifpt.baselines import BASELINES
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.evaluation.audit import audit_codecs, separable_sources
from manifpt.evaluation.baseline_task import fit_baseline
from manifpt.evaluation.bundles import row_of_bundle
from manifpt.evaluation.images import ByRun, examples_by_seed, examples_of_another_set
from manifpt.evaluation.methods import LOSS, Candidate, candidates_of, key_digest
from manifpt.evaluation.results import comparisons, fusions, of_baseline, of_candidate, per_source
from manifpt.evaluation.running import run_works
from manifpt.evaluation.tables import table_json, table_markdown
from manifpt.evaluation.tasks import Work, fit_attributor, test_attributor
from manifpt.log import event
from manifpt.reader import read_plan
from manifpt.recipes.tables import paper_accuracies
from manifpt.spaces import View
from manifpt.storage import join, normalize, store_of

__all__ = ["check_codec", "evaluate_attributor"]


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
    if config.paper_column:
        paper_accuracies(config.paper_column)  # a name that it hasn't costs no fits
    names = _baseline_names(config.baselines)
    candidates = candidates_of(runs, test_runs, config.spaces, config.networks, config.epochs, control_runs)
    check_codec([*runs, *control_runs, *test_runs], config.equalize_codec)
    measured = (test_runs, config.test_labels) if test_runs else (runs, config.labels)
    bundles = [row_of_bundle(path, *measured) for path in config.attributor]  # first: what is wrong costs no fits
    examples = examples_by_seed(candidates, config)
    tests = examples_of_another_set(candidates, examples[0], config)
    dataset = config.dataset or runs[0].rstrip("/").rpartition("/")[2]
    first = examples[0][candidates[0].run, candidates[0].space.name]
    event("evaluation", dataset=dataset, images=len(first.label_n), labels=len(first.labels), seeds=config.seeds,
          candidates=len(candidates), baselines=len(names), output=output)  # fmt: skip
    cluster.connect()
    view = _view(runs) if names else None
    tested_on = config.test_dataset or test_runs[0].rstrip("/").rpartition("/")[2] if test_runs else None
    audits = {"": audit_codecs(first, config.equalize_codec)}
    if tested_on is not None:
        audits[tested_on] = audit_codecs(next(iter(tests.values())), config.equalize_codec, is_whole=False)

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
    table = table_json(dataset, rows, separable_sources(audits.values()), tested_on)
    last = next(iter(tested[0].values()))
    counts = {side: int((first.side_n == number).sum()) for number, side in enumerate(SIDES)}
    facts = {"images": len(first.label_n), "labels": list(first.labels), "seeds": config.seeds, **counts}
    sides = {next(iter(of_seed.values())).side_n.tobytes() for of_seed in examples}
    facts |= {
        "test": int((last.side_n == TEST).sum()),
        "tested_on": tested_on,
        "own_splits": len(sides) > 1,
    }
    text = table_markdown(dataset, rows, compared, audits, facts, config.paper_column)
    details = {
        "dataset": dataset,
        "facts": facts | {"left_out": first.left_out, "left_out_of_test": last.left_out if tests else {}},
        "codec_audit": audits[""],
        "codec_audit_of_test": audits.get(tested_on or "") if tests else None,
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


def _work(candidate: Candidate, examples: ByRun, tests: ByRun, output: str, seed: int) -> Work:
    of_run = examples[candidate.run, candidate.space.name]
    test = of_run if candidate.test_run is None else tests[candidate.test_run, candidate.space.name]
    key = candidate.key() | {"examples": of_run.digest, "test": test.digest, "seed": seed}
    folder = join(output, "methods", f"{candidate.space.name}-{candidate.estimate.name}-{key_digest(key)}")
    return Work(folder=folder, key=key, name=candidate.network, examples=of_run, test_examples=test,
                recipe=candidate.recipe, start=candidate.start, seed=seed)  # fmt: skip


def _baseline_work(
    name: str, examples: ByRun, tests: ByRun, candidate: Candidate, view: View | None, output: str, seed: int
) -> Work:
    of_run = examples[candidate.run, candidate.space.name]
    test = of_run if candidate.test_run is None else tests[candidate.test_run, candidate.space.name]
    assert view is not None
    key = {"baseline": name, "loss": LOSS, "view": view.key, "examples": of_run.digest, "test": test.digest,
           "seed": seed}  # fmt: skip
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
    best: dict[tuple[Any, ...], tuple[float, int]] = {}
    for n, candidate in enumerate(candidates):
        fits = [works[n, seed].done("fit") or {} for seed in range(seeds)]
        score = statistics.fmean(fit["validation_accuracy"] for fit in fits)
        if candidate.group not in best or score > best[candidate.group][0]:
            best[candidate.group] = score, n
    return [n for _, n in best.values()]
