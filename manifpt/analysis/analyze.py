"""The command `analyze_fingerprints`: measures in Ray tasks, then draws and publishes the report."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np

from manifpt.analysis.designs import Designs, read_designs
from manifpt.analysis.tasks import STAGES, Work, measure, opened
from manifpt.attributor.choice import choice_of, read_labels
from manifpt.attributor.files import bundle_config, bundle_file, bundle_object
from manifpt.config import AnalyzeConfig
from manifpt.documents import json_of
from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.plan import Plan, publish_facts
from manifpt.reader import read_plan
from manifpt.recipes import paper_table5
from manifpt.reference import library_versions
from manifpt.storage import join, normalize, store_of

__all__ = ["analyze_fingerprints"]

Arrays = dict[str, dict[str, np.ndarray]]


def analyze_fingerprints(config: AnalyzeConfig) -> dict[str, Any]:
    """Measures, draws, and writes `report.html`, `report.json` and `figures/`, or finds them there.

    Returns:
        What `report.json` holds, and `analysed`: whether that was now.

    Raises:
        ConfigError: what is missing or doesn't fit together.
    """
    begin = time.monotonic()
    if not 0 <= config.seed < 1 << 32:
        raise ConfigError(f"--seed is from 0 to 4294967295, not {config.seed}.")
    run, output = normalize(config.artifacts), normalize(config.output)
    plan = read_plan(run)
    spaces = config.spaces or tuple(spec.name for spec in plan.spaces)
    designs = read_designs(config.designs) if config.designs else None
    attributors = _attributors(config, plan, spaces)
    works = [
        Work(run=run, space=space, stage=stage, choice=choice_of(config), group_column=config.group_column,
             designs=designs, attributor=attributors.get(space), seed=config.seed)
        for stage in STAGES
        for space in spaces
    ]  # fmt: skip
    for work in works[: len(spaces)]:  # what is wrong is found before a cluster starts
        opened(work)
    publish_facts(join(output, "analysis.json"), _facts(config, plan, spaces, designs, attributors), "analysis")
    if store_of(output).stat(join(output, "report.html")) is not None:
        before: dict[str, Any] = json.loads(store_of(output).read(join(output, "report.json")))
        return before | {"analysed": False}
    numbers, arrays = _measured(works)
    document = {
        "run": run,
        "reference_digest": plan.reference_digest,
        "estimate": plan.estimate.identity(),
        "seed": config.seed,
        "stored_as": plan.dtype,
        "spaces": numbers,
        "attributors": {space: _reached(path) for space, path in attributors.items()},
        "designs": None if designs is None else _designs(config.designs, designs, numbers),
        "paper_table5": {method: dict(row) for method, row in paper_table5().items()},
        "versions": library_versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
    }
    from manifpt.report.fingerprints import publish_report  # matplotlib and Bokeh cost a second

    publish_report(document, arrays, output)
    event("reported", report=join(output, "report.html"), seconds=time.monotonic() - begin)
    return document | {"analysed": True}


def _facts(
    config: AnalyzeConfig, plan: Plan, spaces: tuple[str, ...], designs: Designs | None, attributors: dict[str, str]
) -> dict[str, Any]:
    """What decides a report."""
    return {
        "plan_digest": plan.digest,
        "reference_digest": plan.reference_digest,
        "spaces": list(spaces),
        "labels": read_labels(config.labels),
        "min_images": config.min_images,
        "most_images": config.most_images,
        "group_column": config.group_column,
        "designs": None if designs is None else designs.value,
        "attributors": {space: _reached(path)["weights_sha256"] for space, path in attributors.items()},
        "seed": config.seed,
    }


def _measured(works: list[Work]) -> tuple[dict[str, dict[str, Any]], Arrays]:
    """All stages, by space; each is told as it ends."""
    from manifpt import cluster, pipeline

    cluster.connect()
    cpus = cluster.cluster()[0]
    numbers: dict[str, dict[str, Any]] = {work.space: {} for work in works}
    arrays: Arrays = {work.space: {} for work in works}
    begin = time.monotonic()
    event("analysis", run=works[0].run, spaces=len(numbers), stages=len(works))
    results = pipeline.run_tasks(measure, [(work,) for work in works], cpus=1.0 if cpus >= 1 else cpus)
    for done, (work, found, drawn) in enumerate(results, start=1):
        numbers[work.space] |= found
        arrays[work.space] |= drawn
        seconds = time.monotonic() - begin
        event("measured", space=work.space, stage=work.stage, done=f"{done}/{len(works)}", seconds=seconds,
              eta_s=round(seconds / done * (len(works) - done)))  # fmt: skip
    return numbers, arrays


def _attributors(config: AnalyzeConfig, plan: Plan, spaces: tuple[str, ...]) -> dict[str, str]:
    """Bundles by the space that they take."""
    from manifpt.attributor.bundle import Attributor

    found: dict[str, str] = {}
    for path in config.attributor:
        attributor = Attributor.load(path)
        spec = next((spec for spec in plan.spaces if spec.name == attributor.config["space"]["name"]), None)
        if spec is None or not attributor.fits(spec.identity(), plan.estimate.identity(), plan.reference_digest):
            raise ConfigError(
                f"The attributor {path} was trained on artifacts of another run (space "
                f"{attributor.config['space']['name']}, reference {attributor.config['reference_digest'][:16]}); train "
                f"one on {config.artifacts}, or leave it out."
            )
        if spec.name in found or spec.name not in spaces:
            raise ConfigError(
                f"The attributor {path} is of the space {spec.name}, which has another one or isn't analysed: name one "
                f"for each of --spaces ({', '.join(spaces)}) at most."
            )
        found[spec.name] = path
    return found


def _reached(path: str) -> dict[str, Any]:
    """What an attributor reached on its test images."""
    uri = normalize(path)
    config = bundle_config(uri)
    metrics = bundle_object(uri, config, "metrics.json")
    kept = ("accuracy", "balanced_accuracy", "calibration_error", "fd_ratio", "test_images", "precision", "recall",
            "confusion")  # fmt: skip
    labels = json_of(bundle_file(uri, config, "labels.json"), f"The attributor {uri}")
    facts = {"bundle": uri, "weights_sha256": config["files"]["model.safetensors"], "network": config["network"],
             "labels": labels}  # fmt: skip
    return facts | {name: metrics[name] for name in kept}


def _designs(table: str | None, designs: Designs, numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The choices of the generators that are here."""
    labels = sorted({label for of_space in numbers.values() for label in of_space["images"]})
    return {
        "table": table,
        "choices": list(designs.choices),
        "generators": {label: dict(designs.value[label]) for label in labels if label in designs.value},
        "unverified": {label: sorted(designs.unverified[label]) for label in labels if designs.unverified.get(label)},
    }
