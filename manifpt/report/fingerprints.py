"""The report of `analyze_fingerprints`: which numbers stand where, and what they say in words.

Legend: S labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from manifpt.manifest import REAL
from manifpt.report.designs import designs_section
from manifpt.report.figures import (
    draw_confusion,
    draw_distances,
    draw_map,
    draw_means,
    draw_norms,
)
from manifpt.report.page import Figure, Section, Table, render_page
from manifpt.report.scatter import scatter_item, scatter_script
from manifpt.storage import join, store_of

__all__ = ["publish_report", "report_sections"]

Arrays = Mapping[str, Mapping[str, np.ndarray]]

_OVERLAP = (
    ("images", "images"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("mean |a|", "mean_artifact_norm"),
    ("mean reverse |a|", "mean_reverse_norm"),
    ("W1 at least", "wasserstein_bound"),
    ("sliced W1", "sliced_wasserstein"),
    ("energy distance", "energy_distance"),
    ("Frechet distance", "frechet_distance"),
    ("MMD² cubic (KID)", "kid"),
    ("MMD² Gaussian", "mmd_gaussian"),
)


def publish_report(document: Mapping[str, Any], arrays: Arrays, output: str) -> None:
    """Writes the figures and `report.json`, then `report.html`, with which the report is whole."""
    store = store_of(output)
    sections = report_sections(document, arrays, _preview(document["run"]))
    for section in sections:
        for part in section.parts:
            if isinstance(part, Figure):
                store.write(join(output, "figures", f"{part.name}.png"), part.png)
    text = json.dumps(document, allow_nan=False) + "\n"
    store.write(join(output, "report.json"), text.encode())
    facts = [
        ("Run", document["run"]),
        ("Reference", f"digest {document['reference_digest'][:16]}"),
        ("Projection", _estimate(document["estimate"])),
        ("Seed", str(document["seed"])),
        ("Made", f"{document['created']}, by manifpt {document['versions']['manifpt']}, in {document['seconds']} s"),
    ]
    page = render_page("Fingerprint report", facts, sections, scatter_script())
    store.write(join(output, "report.html"), page)


def report_sections(document: Mapping[str, Any], arrays: Arrays, preview: bytes | None) -> list[Section]:
    """The report's sections: how to read it, one a space, then designs and attributors."""
    sections = [_introduction(document, preview)]
    for space, found in document["spaces"].items():
        sections.append(_space(space, found, arrays[space], document["stored_as"]))
    if document["designs"] is not None:
        sections.append(designs_section(document))
    for space, reached in document["attributors"].items():
        sections.append(_attributor(space, reached))
    return sections


def _preview(run: str) -> bytes | None:
    uri = join(run, "preview.png")
    store = store_of(uri)
    return store.read(uri) if store.stat(uri) is not None else None


def _estimate(identity: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "name" else f"{name} {value}" for name, value in identity.items())


def _introduction(document: Mapping[str, Any], preview: bytes | None) -> Section:
    paragraphs = (
        "An artifact is an embedded image less its projection onto the real images; the fingerprint of a generator is "
        "the set of its artifacts. Each section below looks at one embedding space: how generated images lie among the "
        "real ones, and how the fingerprints of generators lie to each other.",
        "Numbers are of samples, so they differ between runs with other images. Held-out real images, where the run "
        f"has them under the label “{REAL}”, show what new images of the same kind reach; compare with that row, not "
        "with an ideal. Values that depend on the number of images can be compared between rows of equal numbers only.",
    )
    if preview is None:
        return Section("How to read this", paragraphs)
    text = "Some images of up to 8 sources of the run: image, projection and artifact, in each space. Grey is zero."
    return Section(
        "How to read this", paragraphs, (Figure("preview", "Images, projections, artifacts", text, preview),)
    )


def _space(space: str, found: Mapping[str, Any], arrays: Mapping[str, np.ndarray], stored_as: str) -> Section:
    labels = list(found["images"])
    parts: list[Table | Figure] = []
    paragraphs = [
        f"{sum(found['images'].values()):,} images of {len(labels)} labels, embedded as {found['shape']} numbers."
    ]
    if found["left_out"]:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in found["left_out"].items())
        paragraphs.append(f"Left out: {reasons}.")
    if found["in_reference"]:
        paragraphs.append(
            f"{found['in_reference']:,} of them are in the reference itself: they were projected without themselves, "
            f"and take no part in the comparison with the reals."
        )
    if found["overlap"] is not None:
        parts.append(_overlap_table(space, found, stored_as))
    else:
        paragraphs.append(
            "Embeddings can't be told from artifacts of this projection, so generated and real images are not "
            "compared: analyse a run with --estimate nearest for that."
        )
    text = (
        "Box plots of artifact norms by label, boxes from the 25th to the 75th percentile, whiskers from the 5th to "
        "the 95th; the table below has the percentiles."
    )
    norms = draw_norms(arrays["distance_b"], arrays["label_b"], labels)
    parts.append(Figure(f"{space}-norms", f"{space}: artifact norms", text, norms))
    shares = tuple(next(iter(found["norms"].values())))
    rows = tuple((label, *(of_label[share] for share in shares)) for label, of_label in found["norms"].items())
    head = ("label", *(f"{100 * float(share):g} %" for share in shares))
    parts.append(Table(f"{space}: percentiles of artifact norms", head, rows))
    if "mean_artifact_schw" in arrays:
        spectra = arrays.get("mean_spectrum_shw"), arrays.get("real_spectrum_hw")
        pictures = draw_means(labels, arrays["mean_artifact_schw"], *spectra)
        text = (
            "For each label its mean artifact (grey is zero, each to its own scale); where embeddings are known also "
            "its mean log spectrum, zero frequency in the middle, and that less the mean log spectrum of the reals "
            "(red is more, blue is less; one scale for all)."
        )
        parts.append(Figure(f"{space}-means", f"{space}: mean artifacts and spectra", text, pictures))
    parts += _structure_parts(space, found, labels)
    for number, of_map in enumerate(found["maps"], start=1):
        text = (
            f"{len(of_map['x']):,} images by {of_map['method']} of {of_map['of']}, a colour and a shape for each "
            f"label. Neighbourhoods mean something; distances between islands and their sizes don't."
        )
        title = f"{space}: {of_map['method']} of {of_map['of']}"
        parts.append(
            Figure(f"{space}-map-{number}", title, text, draw_map(of_map, labels), scatter_item(of_map, labels))
        )
    return Section(f"Space {space}", tuple(paragraphs), tuple(parts))


def _overlap_table(space: str, found: Mapping[str, Any], stored_as: str) -> Table:
    rows = tuple(
        (label, *(row.get(key) for _, key in _OVERLAP)) for label, row in found["overlap"].items()
    )  # fmt: skip
    notes = (
        f"Against {found['reals']:,} images drawn from the reference; |a| is the distance to the nearest of the whole "
        f"reference (not known of other projections), reverse |a| that of a real to its nearest generated image. "
        f"Precision, recall, density and coverage by balls of 5 neighbours.",
        "W1 at least: the mean norms are lower bounds of the Wasserstein distance to these reals (our derivation: "
        "manifpt/metrics/wasserstein.py). Unbiased estimates (MMD², energy) may be below zero.",
        f"Embeddings are artifact plus projection, as exact as artifacts are stored ({stored_as}).",
        *_siblings(found),
    )
    return Table(f"{space}: generated against real", ("label", *(name for name, _ in _OVERLAP)), rows, notes)


def _siblings(found: Mapping[str, Any]) -> list[str]:
    """A warning, where images were made together."""
    apart = found["made_apart"]
    told = [
        f"{label} ({apart[label]:,} of {count:,})" for label, count in found["images"].items() if apart[label] < count
    ]
    if not told:
        return []
    return [
        "Images that were made together, as of one latent, count here as if each were made by itself: they are like "
        "each other, so that their sets look farther from all others, and less diverse, than they are. Groups of "
        f"images: {', '.join(told)}."
    ]


def _structure_parts(space: str, found: Mapping[str, Any], labels: list[str]) -> list[Table | Figure]:
    parts: list[Table | Figure] = []
    apart, distance_ss = found["separability"], np.array(found["distances"]["energy_distance"])
    least = min(found["pair_images"].values())
    if apart is not None:
        rows = (
            ("nearest other artifact is of the same label", apart["leave_one_out_accuracy"], apart["chance"]),
            ("silhouette (-1 to 1)", apart["silhouette"], 0.0),
            ("FD ratio (1: alike; grows with the number of images)", apart["fd_ratio"], 1.0),
        )  # fmt: skip
        alone = apart.get("left_out") or []
        note = (
            f"Nothing was trained. Of {least:,} images a label or more, as many as all pairs could be looked at of; of "
            f"those that were made together one, {apart['images']:,} in all."
            + (f" Without labels that are one group: {', '.join(alone)}." if alone else ""),
        )
        parts.append(Table(f"{space}: separability of fingerprints", ("measure", "value", "by chance"), rows, note))
    if len(labels) > 1:
        text = (
            "A tree of labels by average linkage of the energy distance of their artifacts, and the distances in the "
            "tree's order. Labels that join far from their names have unlike fingerprints; report.json has all numbers."
        )
        text = " ".join([text, *_siblings(found)])
        picture = draw_distances(labels, distance_ss, "energy distance")
        parts.append(Figure(f"{space}-distances", f"{space}: distances between fingerprints", text, picture))
        nearest = []
        for number, label in enumerate(labels):
            others = [other for other in range(len(labels)) if other != number]
            closest = min(others, key=lambda other, n=number: distance_ss[n, other])  # type: ignore[misc]
            nearest.append((label, labels[closest], float(distance_ss[number, closest])))
        head = ("label", "most alike", "energy distance")
        parts.append(Table(f"{space}: the most alike fingerprints", head, tuple(nearest)))
    return parts


def _attributor(space: str, reached: Mapping[str, Any]) -> Section:
    labels = reached["labels"]
    rows = tuple(
        zip(labels, reached["test_images"], reached["precision"], reached["recall"], strict=True)
    )  # fmt: skip
    text = (
        f"On test images it tells {100 * reached['accuracy']:.1f} % of the labels (mean over labels "
        f"{100 * reached['balanced_accuracy']:.1f} %). Network {reached['network']}, weights "
        f"{reached['weights_sha256'][:16]}."
    )
    picture = draw_confusion(np.array(reached["confusion"]), labels)
    alt = (
        "Shares of each label's test images told to be of each label; the diagonal is right. Counts are in report.json."
    )
    parts = (
        Table(f"{space}: by label", ("label", "test images", "precision", "recall"), rows),
        Figure(f"{space}-confusion", f"{space}: confusion matrix of the attributor", alt, picture),
    )
    return Section(f"Attributor of {space}", (text,), parts)
