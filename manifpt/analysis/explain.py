"""One image in, a piece of evidence out: what was measured of it, and whether that names a source.

`evidence.json`, written last:

    format, created         1; UTC, ISO 8601
    tool                    name; versions of libraries; code: {kind, value}, a commit or a SHA-256, as `kind` says
    image                   uri, sha256 of the bytes, content_hash of the pixels, format, width_px, height_px;
                            resized_to_px: [height, width] or null; in_reference, near_copy, in_run: bool
    run                     uri, plan_digest, estimate, space (the spec)
    reference               uri, digest, images
    attributor              uri, weights_sha256, accuracy (on its test images), calibration_error, threshold (least
                            probability of a verdict), label (the most probable one), precision and test_images of it
    unknown                 score (its name), value (larger is less like the known sources), threshold (null: none),
                            is_unknown: value over threshold
    artifact                shape; norm: |x - x*|, the run's `distance`
    nearest_reals           at most 5, by distance: image_id, uri, distance; unchanged: its pixels are still those of
                            the reference
    sources                 by source of the run: label, images, quantiles (by %) of their distances, percentile
    probabilities           of every label, calibrated, largest first: label, probability
    verdict                 source (null: inconclusive), conclusive, reasons
    meaning                 a sentence each: what a number means, and what it doesn't
    panel                   file, sha256

A number that was not measured is null; there is no NaN.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from manifpt.analysis.custody import code_digest, read_image
from manifpt.analysis.distances import Distances, read_distances
from manifpt.analysis.measure import Measured, measure
from manifpt.analysis.verdict import Findings, percentile, quantiles, threshold, verdict
from manifpt.attributor.files import bundle_object
from manifpt.config import ExplainConfig
from manifpt.decode import content_hash
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.plan import Plan
from manifpt.reader import read_plain_plan
from manifpt.reference import Bundle, library_versions, open_bundle
from manifpt.report.preview import listed_images, pixels_of
from manifpt.spaces import SpaceSpec
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import join, normalize, store_of

if TYPE_CHECKING:
    from manifpt.attributor.bundle import Attributor

__all__ = ["explain_image"]

_FORMAT = 1
_PANEL = "evidence.png"
_MEANING = {
    "probability": "Of images like the attributor's test images to which it gives a label such a probability, about "
    "this share comes from that source. They are shares among its own sources, also of an image of none of them.",
    "unknown": "How unlike the attributor's training images the image is. The threshold says how seldom an image of a "
    "known source is called unknown, not how often one of an unknown source is.",
    "distance": "How far the image lies from the run's estimate of the real images, and where that is among the "
    "images of each source. A usual distance fits a source and many others; it singles out none.",
    "nearest_reals": "The real images of the reference that are most alike in this space. That an image is near "
    "one doesn't mean that it was made from it.",
    "verdict": "Conclusive means that no rule spoke against the named source; inconclusive, that one did. Either is "
    "evidence about an image, not a proof of who made it.",
}


def explain_image(config: ExplainConfig) -> dict[str, Any]:
    """Measures one image, draws its panel and writes its evidence. Returns the evidence.

    Raises:
        ConfigError: an image that can't be used; or a run, reference and attributor that don't belong together.
    """
    uri, run, output = normalize(config.image), normalize(config.artifacts), normalize(config.output)
    image_hwc, image = read_image(uri)
    plan = read_plain_plan(run)
    from manifpt.attributor.bundle import Attributor  # torch costs seconds
    from manifpt.attributor.choice import read_labels

    attributor = Attributor.load(config.attributor)
    of_training = attributor.config.get("choice", {}).get("labels", {})
    labels = read_labels(config.labels) or of_training
    bundle = open_bundle(normalize(config.reference) if config.reference else plan.reference_uri)
    spec, estimate = _agreed(attributor, plan, bundle, run), _estimate(plan, config.denoiser, bundle)
    distances = read_distances(run, plan, spec.name, image["content_hash"])
    found = measure(image_hwc, image, bundle, spec, estimate, plan.dtype)
    said = attributor.verdicts(found.artifact[None])
    probability_s, openset = said.probability_bs[0].astype(np.float64), attributor.openset
    order = np.argsort(-probability_s, kind="stable")
    probabilities = [{"label": attributor.labels[s], "probability": float(probability_s[s])} for s in order]
    named = attributor.labels[order[0]]
    tested = _tested(normalize(config.attributor), attributor.config, named, attributor.labels)
    nearest, pictures = _nearest(bundle, found)
    in_view = found.view_chw.shape[1:]
    is_resized = image_hwc.shape[:2] != in_view
    sizes = [picture.shape[:2] for picture in pictures if picture is not None]
    of_label = distances.of(source for source in distances.by_source if labels.get(source, source) == named)
    findings = Findings(
        label=named,
        probability=probabilities[0]["probability"],
        calibration_error=tested["calibration_error"],
        precision=tested["precision"],
        test_images=tested["test_images"],
        named_images=tested["named_images"],
        unknown_score=float(said.unknown_score_b[0]),
        unknown_threshold=openset.threshold,
        percentile=percentile(found.distance, of_label),
        other_size=_size(image_hwc) if is_resized and image_hwc.shape[:2] not in sizes else None,
        in_reference=found.in_reference,
        near_copy=found.near_copy,
        in_run=distances.holds_image,
    )
    evidence = {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"name": "manifpt", "versions": library_versions(), "code": code_digest()},
        "image": {
            **image,
            "resized_to_px": list(in_view) if is_resized else None,
            "in_reference": found.in_reference,
            "near_copy": found.near_copy,
            "in_run": distances.holds_image,
        },
        "run": {
            "uri": run,
            "plan_digest": plan.digest,
            "estimate": plan.estimate.identity(),
            "space": spec.identity(),
        },
        "reference": {"uri": bundle.uri, "digest": bundle.digest, "images": bundle.images},
        "attributor": {
            "uri": normalize(config.attributor),
            "weights_sha256": attributor.config["files"]["model.safetensors"],
            "label": named,
            "threshold": threshold(tested["calibration_error"]),
            **tested,
        },
        "unknown": openset.chosen()
        | {
            "value": float(said.unknown_score_b[0]),
            "is_unknown": bool(said.is_unknown_b[0]),
        },
        "artifact": {"shape": list(found.artifact.shape), "norm": found.distance},
        "nearest_reals": nearest,
        "sources": _sources(distances, labels, found.distance),
        "probabilities": probabilities,
        "verdict": verdict(findings),
        "meaning": _MEANING,
    }
    from manifpt.report.evidence import draw_evidence  # matplotlib, only where there is something to draw

    panel = draw_evidence(evidence, image_hwc, found.view_chw, found.artifact, pictures, spec)
    evidence["panel"] = {"file": _PANEL, "sha256": hashlib.sha256(panel).hexdigest()}
    try:
        store_of(output).write(join(output, _PANEL), panel)
        text = json.dumps(evidence, indent=2, allow_nan=False) + "\n"
        store_of(output).write(join(output, "evidence.json"), text.encode())
    except OSError as error:
        raise ConfigError(f"Can't write {output} ({error}); choose another --output or correct its rights.") from error
    return evidence


def _agreed(attributor: Attributor, plan: Plan, bundle: Bundle, run: str) -> SpaceSpec:
    """The attributor's space, with weights to encode by, if run and reference are those that it was trained on."""
    name = attributor.config["space"]["name"]
    of_run = next((spec.identity() for spec in plan.spaces if spec.name == name), None)
    if bundle.digest != plan.reference_digest or name not in bundle.spaces:
        raise ConfigError(f"The reference {bundle.uri} is not the one of {run}: name that one with --reference.")
    spec = resolve_weights(bundle.spaces[name])
    pairs = {
        "space": (of_run, spec.identity()),
        "estimate": (plan.estimate.identity(),),
        "reference_digest": (bundle.digest,),
    }
    differing = [what for what, theirs in pairs.items() if any(attributor.config[what] != one for one in theirs)]
    if differing:
        raise ConfigError(
            f"The attributor was not trained on artifacts like those of {run}: its {', '.join(differing)} differs. "
            f"Name the run that it was trained on with --artifacts."
        )
    return spec


def _estimate(plan: Plan, denoiser: str | None, bundle: Bundle) -> Estimate:
    """The run's estimate, with where its denoiser lies, which no plan says."""
    if plan.estimate.name != "denoiser":
        if denoiser is not None:
            raise ConfigError(f"--denoiser is for runs by --estimate denoiser; this one's is {plan.estimate.name}.")
        return plan.estimate
    if denoiser is None:
        raise ConfigError("The run's estimate is a denoiser: say where it is with --denoiser.")
    from manifpt.estimates.denoiser import check_reference

    weights = normalize(denoiser)
    check_reference(weights, bundle.digest)
    return replace(plan.estimate, weights=weights)


def _tested(uri: str, config: Mapping[str, Any], named: str, labels: Sequence[str]) -> dict[str, Any]:
    """What the bundle's metrics say of the attributor and of one label; null where they don't."""
    metrics = bundle_object(uri, config, "metrics.json")
    if not metrics:
        return {"accuracy": None, "calibration_error": None, "precision": None, "test_images": 0, "named_images": 0}
    try:
        number = labels.index(named)
        return {
            "accuracy": _share(metrics["accuracy"]),
            "calibration_error": _share(metrics["calibration_error"]),
            "precision": _share(metrics["precision"][number]),
            "test_images": int(metrics["test_images"][number]),
            "named_images": sum(int(row[number]) for row in metrics["confusion"]),
        }
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"The metrics of {uri} are damaged ({error!r}); train it again.") from error


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _nearest(bundle: Bundle, found: Measured) -> tuple[list[dict[str, Any]], list[np.ndarray | None]]:
    """The nearest reals, and the pixels of each; None where they are gone or were changed since."""
    try:
        rows = {row["image_id"]: row for row in listed_images(bundle.uri, found.image_ids)}
    except FileNotFoundError as error:
        raise ConfigError(f"The reference {bundle.uri} has lost its list of images: build it again.") from error
    pixels = pixels_of(list(rows.values()))
    nearest, pictures = [], []
    for image_id, distance in zip(found.image_ids, found.distance_k.tolist(), strict=True):
        picture = pixels.get(image_id)
        if picture is not None and content_hash(picture) != rows[image_id]["content_hash"]:
            picture = None
        pictures.append(picture)
        nearest.append(
            {"image_id": image_id, "uri": rows[image_id]["uri"], "distance": distance, "unchanged": picture is not None}
        )
    return nearest, pictures


def _sources(distances: Distances, labels: Mapping[str, str | None], distance: float) -> dict[str, dict[str, Any]]:
    return {
        source: {
            "label": labels.get(source, source),
            "images": len(distance_n),
            "quantiles": quantiles(distance_n),
            "percentile": percentile(distance, distance_n),
        }
        for source, distance_n in distances.by_source.items()
    }


def _size(image_hwc: np.ndarray) -> str:
    height_px, width_px = image_hwc.shape[:2]
    return f"{width_px} x {height_px} px"
