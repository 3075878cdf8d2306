"""The command `reproduce_tables`: a recipe and its images -> manifests, references, runs, the table.

Each step is a command of its own, and a step that was done before is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from manifpt.config import (
    ArtifactsConfig,
    DenoiserConfig,
    EvaluateConfig,
    IndexConfig,
    ReferenceConfig,
    ReproduceConfig,
)
from manifpt.documents import stored_object
from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.manifest import REAL, Manifest, write_manifest
from manifpt.plan import publish_facts
from manifpt.reader import read_plan
from manifpt.recipes.check import checked
from manifpt.recipes.framing import framed_name, framed_table
from manifpt.recipes.load import recipe
from manifpt.recipes.phases import phase_randomized_reals
from manifpt.recipes.schema import Cross, Recipe
from manifpt.recipes.select import inputs, select
from manifpt.runs import build_reference, compute_artifacts, index_images
from manifpt.spaces import View
from manifpt.storage import is_local, join, normalize, store_of

__all__ = ["reproduce_tables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One run of `compute_artifacts` that a table needs: flags by name, and spaces.

    `phases`: onto a reference of phase-randomised reals, the control of `manifpt.recipes.phases`.
    """

    name: str
    spaces: tuple[str, ...]
    flags: Mapping[str, Any]
    phases: bool = False


# What the tables compare. Parameters that validation chooses among are runs of their own.
_PAPER = ("rgb", "frequency", "supervised", "selfsupervised")
_RUNS = (
    _Run(name="nearest", spaces=(*_PAPER, "ycbcr"), flags={}),
    _Run(name="none", spaces=(*_PAPER, "ycbcr", "frequency_ycbcr"), flags={"estimate": "none"}),
    _Run(name="random", spaces=("rgb",), flags={"estimate": "random"}),
    *(_Run(name=f"blur-{s}", spaces=("ycbcr",), flags={"estimate": "blur", "sigma": s}) for s in (0.5, 0.7, 1.0)),
    *(_Run(name=f"soft-{s}", spaces=("ycbcr",), flags={"estimate": "soft", "sigma": s}) for s in (0.003, 0.01, 0.03)),
    *(_Run(name=f"phases-{s}", spaces=("ycbcr",), flags={"estimate": "soft", "sigma": s}, phases=True)
      for s in (0.003, 0.01, 0.03)),
    _Run(name="mean-16", spaces=("ycbcr",), flags={"estimate": "mean", "neighbors": 16}),
    _Run(name="hull-64", spaces=("ycbcr",), flags={"estimate": "hull", "neighbors": 64}),
    _Run(name="denoiser", spaces=("ycbcr",), flags={"estimate": "denoiser"}),
)  # fmt: skip


_FACTS = "recipe.json"
_SOFT_PX = 73  # 3 * 73^2 numbers an image: see manifpt.estimates.gaussian


def reproduce_tables(config: ReproduceConfig) -> dict[str, Any]:
    """Runs every step of a recipe. Returns what `evaluate_attributor` does.

    Raises:
        ConfigError: no such recipe, or images that aren't where it says.
    """
    found = _sized(recipe(config.recipe), config.size_px)
    images, output = normalize(config.images), normalize(config.output)
    if not is_local(output):
        raise ConfigError("reproduce_tables keeps manifests and label maps on this machine: choose a local --output.")
    os.makedirs(output, exist_ok=True)
    wanted = [run for run in _RUNS if not config.runs or run.name in config.runs]
    unknown = set(config.runs) - {run.name for run in _RUNS}
    if unknown or not wanted:
        raise ConfigError(f"Unknown run {', '.join(sorted(unknown))}; known: {', '.join(r.name for r in _RUNS)}.")
    if found.size_px > _SOFT_PX:
        event("left_out", source="soft", why=f"at {found.size_px} px the covariance of all pixels is too large")
        wanted = [run for run in wanted if run.flags.get("estimate") != "soft"]
    own = config.own_spaces
    spaces = [*dict.fromkeys([*found.spaces, "ycbcr", "frequency_ycbcr", *own])]
    spaces_of = {run.name: _spaces_of(run, spaces, own) for run in wanted}
    for run in (run for run in wanted if not spaces_of[run.name]):
        event("left_out", source=run.name, why=f"{found.name} has none of its spaces ({', '.join(run.spaces)})")
    wanted = [run for run in wanted if spaces_of[run.name]]
    if all(run.phases for run in wanted):
        raise ConfigError(
            f"Of --runs {' '.join(config.runs)} nothing is left that {found.name} can evaluate: add nearest or none."
        )
    others = [_other(found, folder, wanted, config.equalize_codec) for folder in config.across]
    manifests = _manifests(found, images, output)
    reference = join(output, "reference")
    build_reference(
        ReferenceConfig(
            manifest=manifests["reference"], output=reference, spaces=tuple(spaces), size_px=found.size_px,
            equalize_codec=config.equalize_codec, own_spaces=own,
        )
    )  # fmt: skip
    phases = join(output, "random-phases")
    if any(run.phases for run in wanted):
        build_reference(
            ReferenceConfig(
                manifest=_phases(manifests["reference"], found.size_px, output), output=phases, spaces=("ycbcr",),
                size_px=found.size_px, equalize_codec=config.equalize_codec,
            )
        )  # fmt: skip
    runs: dict[bool, list[str]] = {False: [], True: []}
    for run in wanted:
        flags = dict(run.flags)
        if run.name == "denoiser":
            flags["denoiser"] = join(output, "denoiser")
            _train_denoiser(reference, flags["denoiser"], config.denoiser_images)
        target = join(output, "runs", run.name)
        runs[run.phases].append(target)
        compute_artifacts(
            ArtifactsConfig(manifest=manifests["queries"], reference=phases if run.phases else reference,
                            output=target, spaces=spaces_of[run.name], **flags)
        )  # fmt: skip
    from manifpt.evaluation.evaluate import evaluate_attributor  # torch costs seconds

    evaluation = EvaluateConfig(
        artifacts=tuple(runs[False]), control_artifacts=tuple(runs[True]), output=join(output, "evaluation"),
        networks=config.networks, epochs=config.epochs, baselines=config.baselines, seeds=config.seeds,
        group_column=found.images.group_column, most_images=config.most_images,
        equalize_codec=config.equalize_codec,
        dataset=found.name + (", codec equalised" if config.equalize_codec else ""),
        paper_column=found.paper_column,
    )  # fmt: skip
    result = evaluate_attributor(evaluation)
    here = set(pq.read_table(manifests["queries"], columns=["source"])["source"].to_pylist()) if others else set()
    for other in others:
        labels = join(output, f"labels-of-{other.cross.recipe}.yaml")
        known = {name: label if label in here else None for name, label in other.labels.items()}
        store_of(labels).write(labels, yaml.safe_dump(known).encode())
        names = [run.name for phases in (False, True) for run in wanted if run.phases == phases]
        across = replace(
            evaluation, test_artifacts=tuple(join(other.folder, "runs", name) for name in names), test_labels=labels,
            test_dataset=other.cross.recipe, paper_column=other.cross.table4,
            output=join(output, f"evaluation-on-{other.cross.recipe}"),
        )  # fmt: skip
        of_other = evaluate_attributor(across)
        result = result | {"text": result["text"] + "\n" + of_other["text"]}
    return result


def _spaces_of(run: _Run, spaces: Sequence[str], own: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a run's that the reference has; the user's own besides, in the runs that have every space."""
    found = tuple(name for name in run.spaces if name in spaces)
    return found + tuple(name for name in own if name not in found) if run.name in ("nearest", "none") else found


def _sized(found: Recipe, size_px: int | None) -> Recipe:
    """Raises:
    ConfigError: no size, or one to which pixels would be enlarged.
    """
    if size_px is None:
        return found
    if size_px > found.size_px:
        raise ConfigError(f"--size-px {size_px}: {found.name} is of {found.size_px} px, and pixels are never enlarged.")
    return checked(replace(found, size_px=size_px))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Other:
    """What this command made of another recipe, to test on.

    Attributes:
        folder: its output.
        cross: what this recipe says of it.
        labels: of its manifests, to those of this recipe; None: this one has no such label.
    """

    folder: str
    cross: Cross
    labels: Mapping[str, str | None]


def _other(found: Recipe, folder: str, wanted: Sequence[_Run], equalized: bool) -> _Other:
    """Raises:
    ConfigError: no output of this command, or of a recipe or a size that this one can't be tested on.
    """
    folder = normalize(folder)
    facts = stored_object(join(folder, _FACTS), {"recipe": dict})
    if facts is None:
        raise ConfigError(f"--across {folder} is no output of reproduce_tables: it has no {_FACTS}.")
    name, size_px = facts["recipe"].get("name"), facts["recipe"].get("size_px")
    crosses = {cross.recipe: cross for cross in found.cross}
    if name not in crosses:
        known = ", ".join(crosses) or "none"
        raise ConfigError(f"--across {folder} is of {name}; the recipe {found.name} says how to test on: {known}.")
    if size_px != found.size_px:
        raise ConfigError(
            f"--across {folder} is of {size_px} px, {found.name} of {found.size_px} px: make both with one --size-px."
        )
    for run in wanted:  # what isn't there costs no hours
        codecs = {spec.codec for spec in read_plan(join(folder, "runs", run.name)).spaces}
        if equalized != ("jpeg" in codecs):
            raise ConfigError(f"--across {folder} was made {'without' if equalized else 'with'} --equalize-codec.")
    here = {theirs: ours for ours, theirs in crosses[name].labels.items()}
    used = [source for source in facts["recipe"].get("sources", ()) if source.get("exclude") is None]
    theirs = {source.get("label") or source["name"] for source in used} | {REAL}
    return _Other(folder=folder, cross=crosses[name], labels={label: here.get(label) for label in sorted(theirs)})


def _train_denoiser(reference: str, output: str, images: int) -> None:
    from manifpt.estimates.denoising import train_denoiser

    train_denoiser(DenoiserConfig(reference=reference, output=output, images=images))


def _manifests(found: Recipe, images: str, output: str) -> dict[str, str]:
    """Manifests of the reference and of the queries, whose sources are the recipe's labels."""
    uris = {name: join(output, f"{name}.parquet") for name in ("reference", "queries")}
    facts_uri, framed_root = join(output, _FACTS), join(output, "framed")
    facts = {"recipe": _deciding(asdict(found)), "images": images}
    if all(store_of(uri).stat(uri) is not None for uri in uris.values()):
        publish_facts(facts_uri, facts, "set")  # those of another recipe, or of before it was edited, are refused
        return uris
    if stored_object(facts_uri, {}) != json.loads(json.dumps(facts)):
        if os.path.exists(framed_root):  # of an attempt that came to no manifests
            shutil.rmtree(framed_root)
        store_of(facts_uri).write(facts_uri, json.dumps(facts, indent=2).encode())
    _frame(found, images, framed_root)
    indexed = join(output, "indexed.parquet")
    index_images(
        IndexConfig(
            input=tuple(inputs(found, images, framed_root)), output=indexed,
            source_column=found.images.source_column, keep_columns=found.images.keep_columns,
        )
    )  # fmt: skip
    manifest = Manifest(indexed)
    selected = select(found, manifest.read(0, manifest.rows))
    for name, table in (("reference", selected.reference), ("queries", selected.queries)):
        write_manifest(table.to_batches(), uris[name])
    event("selected", recipe=found.name, reference=len(selected.reference), queries=len(selected.queries),
          labels=len(set(selected.queries["source"].to_pylist())))  # fmt: skip
    for source, why in selected.left_out.items():
        event("left_out", source=source, why=why)
    return uris


_TOLD = {"title", "resolution", "licence", "note", "provenance", "sampling", "checkpoint"}


def _deciding(facts: Any) -> Any:
    """What of a recipe decides which images are taken; whoever mends a remark may go on."""
    if isinstance(facts, dict):
        return {name: _deciding(value) for name, value in facts.items() if name not in _TOLD}
    return [_deciding(value) for value in facts] if isinstance(facts, list | tuple) else facts


def _frame(found: Recipe, images: str, framed_root: str) -> None:
    """Real images cropped as the generators were trained, where the recipe says so."""
    for part in (*found.real.reference, *found.real.queries):
        for crop_px in part.crops_px:
            target = Path(framed_root) / framed_name(part.path, crop_px)
            if target.exists():
                continue
            begin = time.monotonic()
            uri = join(images, part.path)
            with store_of(uri).open(uri) as stream:
                table = framed_table(pq.read_table(stream), crop_px, found.size_px)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            pq.write_table(table, partial, row_group_size=1024)
            partial.replace(target)
            event("framed", file=part.path, crop_px=crop_px, seconds=time.monotonic() - begin)


def _phases(reference: str, size_px: int, output: str) -> str:
    """Manifest of the reference's images with random phases."""
    uri = join(output, "random-phases.parquet")
    if store_of(uri).stat(uri) is None:
        target = Path(output) / "random-phases-images.parquet"
        view = View(size_px, size_px, resized=True, min_px=size_px)
        batches = phase_randomized_reals(Manifest(reference), view)
        pq.write_table(pa.Table.from_batches(batches), target, row_group_size=1024)
        index_images(IndexConfig(input=(str(target),), output=uri, source=REAL))
    return uri
