"""The robustness ladder: what attributors say of their own test images after re-encoding, resizing, crop, blur, noise.

Every attributor climbs all steps of `manifpt.alterations.LADDER`, from the images as they are (`none`) on. Its test
images are found again by what its `config.json` says of its training, in the run that it fits; the digest of its
examples proves that they are the same. Those that take the same images in the same space climb together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt import cluster
from manifpt.alterations import LADDER, NONE
from manifpt.attributor.bundle import Attributor
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples
from manifpt.attributor.splits import TEST
from manifpt.config import EvaluateConfig
from manifpt.errors import ConfigError
from manifpt.evaluation.bundles import fitting_runs, own_examples
from manifpt.evaluation.methods import key_digest
from manifpt.evaluation.rungs import Climber, Rung, climb
from manifpt.evaluation.running import run_works
from manifpt.log import event
from manifpt.manifest import Manifest, write_manifest
from manifpt.plan import Plan
from manifpt.reader import read_plan
from manifpt.reference import open_bundle
from manifpt.report.ladder import draw_ladder, ladder_markdown
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import join, normalize, store_of

__all__ = ["measure_ladder"]

_STEPS = (NONE, *LADDER)
_READ_ROWS = 1 << 16


def measure_ladder(config: EvaluateConfig) -> dict[str, Any]:
    """Measures attributors at every step; writes `ladder.json`, `ladder.md` and `ladder.png`.

    Returns:
        The document of `ladder.json`, and `text` of `ladder.md`.

    Raises:
        ConfigError: what is missing or doesn't fit together.
    """
    begin = time.monotonic()
    output = normalize(config.output)
    if not config.attributor:
        raise ConfigError("--ladder measures finished attributors: name one or more with --attributor.")
    runs = [normalize(run) for run in config.artifacts]
    climbing = [_climbing(normalize(path), runs, output) for path in config.attributor]
    rungs = _rungs(climbing)
    event("ladder", attributors=len(climbing), steps=len(_STEPS), to_do=len(rungs), output=output)
    if rungs:
        cluster.connect()
        run_works(climb, rungs, "step", lambda found: found)
    document = {"steps": list(_STEPS), "attributors": [of_one.said() for of_one in climbing]}
    document["seconds"] = round(time.monotonic() - begin, 1)
    text, store = ladder_markdown(document), store_of(output)
    store.write(join(output, "ladder.json"), (json.dumps(document, indent=2) + "\n").encode())
    store.write(join(output, "ladder.png"), draw_ladder(document))
    store.write(join(output, "ladder.md"), text.encode())
    return document | {"text": text}


@dataclass(frozen=True, slots=True)
class _Climbing:
    """An attributor with what it climbs on: a plan of its test images as they are."""

    climber: Climber
    plan: Plan
    facts: dict[str, Any]

    def said(self) -> dict[str, Any]:
        """Its entry in the document."""
        results = {step: self.climber.done(step) or {} for step in _STEPS}
        shown = {step: {k: v for k, v in of.items() if k not in ("key", "step")} for step, of in results.items()}
        return self.facts | {"results": shown}


def _climbing(path: str, runs: Sequence[str], output: str) -> _Climbing:
    attributor = Attributor.load(path)
    config = attributor.config
    if config["estimate"]["name"] == "denoiser":  # no plan says where its weights lie
        raise ConfigError(f"{path} takes residuals of a denoiser, which the ladder can't make; leave it out.")
    if "choice" not in config:
        raise ConfigError(f"{path} doesn't say by which choice it was trained; train it again.")
    choice = Choice.from_facts(config["choice"])
    examples = _examples(path, attributor, runs)
    plan = _plan(examples, output)
    altered = [of_run["alter"] for of_run in config["altered"] or ()]
    key = {"attributor": attributor.digest, "examples": examples.digest, "images": plan.manifest_digest}
    climber = Climber(
        uri=path, folder=join(output, "ladder", f"{examples.spec.name}-{key_digest(key)}"), key=key,
        labels=choice.labels,
    )  # fmt: skip
    facts = {
        "attributor": path,
        "space": examples.spec.name,
        "estimate": config["estimate"],
        "network": config["network"],
        "altered": altered,
        "labels": len(attributor.labels),
        "test_images": plan.rows,
    }
    return _Climbing(climber, plan, facts)


def _examples(path: str, attributor: Attributor, runs: Sequence[str]) -> Examples:
    """Those of its training."""
    for run in fitting_runs(path, attributor, runs):
        examples = own_examples(attributor, run)
        if examples is not None:
            return examples
    raise ConfigError(
        f"None of the runs holds the images that {path} was trained on: name its run with --artifacts, or train it "
        f"again."
    )


def _plan(examples: Examples, output: str) -> Plan:
    """Of the test images as they are, in the attributor's space."""
    of_run = read_plan(examples.run)
    bundle = open_bundle(of_run.reference_uri)
    if bundle.digest != of_run.reference_digest:
        raise ConfigError(f"The reference {bundle.uri} is not the one of {examples.run}: compute the run again.")
    spec = resolve_weights(bundle.spaces[examples.spec.name])
    manifest = _test_manifest(examples, of_run, output)
    return replace(
        of_run, manifest_uri=manifest.uri, manifest_digest=manifest.digest(), manifest_etag=manifest.etag,
        rows=manifest.rows, spaces=(spec,), inline=(spec.name,), reference_shards=1,
    )  # fmt: skip


def _test_manifest(examples: Examples, of_run: Plan, output: str) -> Manifest:
    """The manifest's rows of test images, under a name that says which; the same one for all that are tested on them.

    Raises:
        ConfigError: the run's manifest was replaced.
    """
    ids = examples.table["image_id"].take(pa.array(np.flatnonzero(examples.side_n == TEST))).combine_chunks()
    digest = key_digest({"manifest": of_run.manifest_digest, "images": ids.to_pylist()})
    uri = join(output, "ladder", f"images-{digest}.parquet")
    if store_of(uri).stat(uri) is None:
        manifest = Manifest(of_run.manifest_uri)
        if manifest.digest() != of_run.manifest_digest:
            raise ConfigError(f"The manifest {manifest.uri} is not the one of {examples.run}: compute the run again.")
        blocks = (manifest.read(start, start + _READ_ROWS) for start in range(0, manifest.rows, _READ_ROWS))
        wanted = (block.filter(pc.is_in(block["image_id"], value_set=ids)) for block in blocks)
        write_manifest((batch for block in wanted for batch in block.to_batches() if len(batch)), uri)
    return Manifest(uri)


def _rungs(climbing: Sequence[_Climbing]) -> list[Rung]:
    """What is to do, the steps of the same images one after the other: a worker keeps their reference."""
    rungs = []
    for plan in dict.fromkeys(of_one.plan for of_one in climbing):
        # A bundle that is named twice is measured once.
        climbers = {of_one.climber.folder: of_one.climber for of_one in climbing if of_one.plan == plan}.values()
        for step in _STEPS:
            missing = tuple(climber for climber in climbers if climber.done(step) is None)
            if missing:
                rungs.append(Rung(plan=replace(plan, alter=step), climbers=missing))
    return rungs
