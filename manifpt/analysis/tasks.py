"""The work of an analysis, one task a function: each reads its rows of a run and measures. Knows no Ray.

Legend: B images, S labels, D dimensions, F features, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from manifpt.analysis.designs import Designs
from manifpt.analysis.maps import images_for_maps, tsne, umap
from manifpt.analysis.overlap import Reals, overlap
from manifpt.analysis.sample import Sample, embeddings_known, open_sample
from manifpt.analysis.structure import (
    alignments,
    fingerprint_distances,
    images_for_pairs,
    principal,
    separability,
)
from manifpt.attributor.bundle import Attributor
from manifpt.attributor.choice import Choice
from manifpt.attributor.splits import TEST
from manifpt.errors import ConfigError
from manifpt.spaces.pixels import log_spectrum

__all__ = ["STAGES", "Work", "measure", "opened"]

_HELD_BYTES = 2 << 30  # of float32 artifacts
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One stage of one space.

    Attributes:
        run, space: whose artifacts.
        stage: of `STAGES`.
        choice, group_column: which rows.
        designs: the design table, if there is one.
        attributor: a bundle on this space, whose features then stand for the images; None: principal components do.
        seed: of all that is drawn.
    """

    run: str
    space: str
    stage: str
    choice: Choice
    group_column: str | None
    designs: Designs | None
    attributor: str | None
    seed: int


_EQUAL = 1e-5  # of the largest number: float32 sums of equal rows differ by less


def measure(work: Work) -> tuple[Work, dict[str, Any], dict[str, np.ndarray]]:
    """Returns the work, what JSON can hold of its result, and arrays to draw."""
    sample, trained = opened(work)
    numbers, arrays = STAGES[work.stage](sample, work, trained)
    return work, numbers, arrays


def opened(work: Work) -> tuple[Sample, Attributor | None]:
    """The rows of a work, of which nothing large is read yet, and its attributor.

    Raises:
        ConfigError: no such rows, a label of one image, or an attributor of other rows.
    """
    trained = Attributor.load(work.attributor) if work.attributor is not None else None
    # Sides of an attributor's own seed: its features are looked at on images that it wasn't trained on.
    choice = (
        replace(work.choice, is_test=True) if trained is None else replace(work.choice, seed=trained.config["seed"])
    )
    sample = open_sample(work.run, work.space, choice, work.group_column)
    if trained is not None and sample.examples.digest != trained.config["examples_digest"]:
        raise ConfigError(
            f"The attributor {work.attributor} was trained on other rows than these: state the --labels, --min-images, "
            f"--most-images and --group-column of its training."
        )
    count_s = np.bincount(sample.label_b, minlength=len(sample.labels))
    if count_s.min() < 2:
        raise ConfigError(
            f"{sample.labels[count_s.argmin()]} has one image, and a fingerprint needs two: --min-images 2."
        )
    return replace(sample, seed=work.seed), trained


def _overlap(sample: Sample, work: Work, _: Attributor | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Against the reals, and the pictures of means."""
    of_label = {label: np.flatnonzero(sample.label_b == number) for number, label in enumerate(sample.labels)}
    numbers: dict[str, Any] = {
        "shape": list(sample.shape),
        "images": {label: len(rows) for label, rows in of_label.items()},
        "made_apart": _made_apart(sample),
        "left_out": sample.examples.left_out,
        "norms": {
            label: dict(
                zip(map(str, _QUANTILES), np.quantile(sample.distance_b[rows], _QUANTILES).tolist(), strict=True)
            )
            for label, rows in of_label.items()
        },
        "overlap": None,
    }
    arrays: dict[str, np.ndarray] = {"distance_b": sample.distance_b, "label_b": sample.label_b}
    known = embeddings_known(sample.examples.estimate, sample.spec)
    numbers["in_reference"] = int(sample.in_reference_b.sum())
    if known:
        # A real that the reference holds would be compared with itself.
        is_new_b = ~sample.in_reference_b
        # Of an approximate neighbour the distance may be larger than that to the nearest: it bounds nothing.
        is_nearest = sample.examples.estimate.name == "nearest" and sample.examples.projection != "approximate"
        reals = Reals.of(sample.real_nd, sample.seed)
        numbers["reals"] = len(sample.real_nd)
        numbers["overlap"] = {}
    means, spectra = [], []
    # Shards are read once a label where not all fit: at 256 px a label's artifacts are a gigabyte.
    fit = 4 * len(sample.row_b) * math.prod(sample.shape) <= _HELD_BYTES
    for label, rows in of_label.items():
        of_one, one = (sample, rows) if fit else (sample.of_rows(sample.row_b[rows]), np.arange(len(rows)))
        if known:
            new = one[is_new_b[rows]]
            distance_m = of_one.distance_b[new] if is_nearest else None
            numbers["overlap"][label] = overlap(reals, of_one.embedding_bd[new], distance_m)
        if len(sample.shape) == 3:
            means.append(of_one.artifact_bd[one].mean(axis=0).reshape(sample.shape))
            spectra += [_mean_spectrum(sample, of_one.embedding_bd[one])] if known else []
    if means:
        arrays["mean_artifact_schw"] = np.stack(means)
    if spectra:
        arrays["mean_spectrum_shw"] = np.stack(spectra)
        arrays["real_spectrum_hw"] = _mean_spectrum(sample, sample.real_nd)
    return numbers, arrays


def _made_apart(sample: Sample) -> dict[str, int]:
    """By label, images of which no two are of one group."""
    count_s = np.bincount(sample.label_b[sample.first_of_groups()], minlength=len(sample.labels))
    return dict(zip(sample.labels, count_s.tolist(), strict=True))


def _mean_spectrum(sample: Sample, embedding_bd: np.ndarray) -> np.ndarray:
    """Mean log-magnitude spectrum over images and channels: float32 [H, W]. (Paper section 7, released code.)"""
    images_bchw = embedding_bd.reshape(-1, *sample.shape)
    spectra = images_bchw if sample.spec.kind == "frequency" else log_spectrum(images_bchw)
    return np.asarray(spectra.mean(axis=(0, 1)))


def _structure(sample: Sample, work: Work, trained: Attributor | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Between the fingerprints."""
    most = images_for_pairs(len(sample.labels), int(np.prod(sample.shape)))
    looked_at = sample.at_most(most)
    artifact_bd, label_b = looked_at.artifact_bd, looked_at.label_b
    count_s = np.bincount(label_b, minlength=len(sample.labels))
    distances = fingerprint_distances(artifact_bd, label_b, len(sample.labels))
    numbers: dict[str, Any] = {
        "pair_images": dict(zip(sample.labels, count_s.tolist(), strict=True)),
        "distances": {name: distance_ss.tolist() for name, distance_ss in distances.items()},
        "separability": _separability(looked_at, work.seed),
        "alignment": None,
    }
    if work.designs is not None:
        feature_bf, seen = _features(sample, trained, work.seed, most)
        numbers["alignment"] = alignments(
            distances["energy_distance"], feature_bf, seen.label_b, sample.labels, work.designs, work.seed
        )
    return numbers, {}


def _separability(sample: Sample, seed: int) -> dict[str, Any] | None:
    """Of one image of each group, and without labels that have no two images that were made apart."""
    row_b = sample.first_of_groups()
    count_s = np.bincount(sample.label_b[row_b], minlength=len(sample.labels))
    row_b = row_b[count_s[sample.label_b[row_b]] > 1]
    if np.count_nonzero(count_s > 1) < 2:
        return None
    left_out = [label for label, count in zip(sample.labels, count_s, strict=True) if count < 2]
    found = separability(sample.artifact_bd[row_b], sample.label_b[row_b], seed)
    return found | {"images": len(row_b), "left_out": left_out}


def _maps(sample: Sample, work: Work, trained: Attributor | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """In the plane."""
    most = images_for_maps(len(sample.labels))
    of_artifacts = (*_features(sample, None, work.seed, most), "artifacts, 50 principal components")
    of_network = None if trained is None else (*_features(sample, trained, work.seed, most), "attributor's features")
    maps = []
    for found in (of_artifacts, of_network):
        if found is None or len(found[0]) < 4 or not (np.ptp(found[0], axis=0) > _EQUAL * np.abs(found[0]).max()).any():
            continue  # a map of equal points would show rounding
        feature_bf, seen, of = found
        for name, method in (("t-SNE", tsne), ("UMAP", umap)):
            place_b2 = method(feature_bf, work.seed).round(3)
            maps.append(
                {"method": name, "of": of, "x": place_b2[:, 0].tolist(), "y": place_b2[:, 1].tolist(),
                 "label": seen.label_b.tolist(), "image_id": list(seen.image_ids)}
            )  # fmt: skip
    return {"maps": maps}, {}


def _features(sample: Sample, trained: Attributor | None, seed: int, most: int) -> tuple[np.ndarray, Sample]:
    """Of so many images of each label, float [B, F]: an attributor's, of its test images; else principal components."""
    if trained is None:
        seen = sample.at_most(most)
        return principal(seen.artifact_bd, seed), seen
    seen = sample.of_rows(np.flatnonzero(sample.examples.side_n == TEST)).at_most(most)
    return trained.features(seen.artifact_bd.reshape(-1, *sample.shape)), seen


STAGES = {"overlap": _overlap, "structure": _structure, "maps": _maps}
