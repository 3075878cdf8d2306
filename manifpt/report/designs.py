"""The section of a report on design choices: do clusters of fingerprints follow them, and how sure is that?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifpt.report.figures import draw_alignment
from manifpt.report.page import Figure, Section, Table

__all__ = ["designs_section", "same_divisions"]

_PAPER_CHOICES = ("upsampling", "nonlinearity", "normalization", "downsampling", "skip", "loss")
_SURE = 0.05


def designs_section(document: Mapping[str, Any]) -> Section:
    """Of a report with designs: the table, NMI beside the paper's, and what chance gives."""
    designs, choices = document["designs"], tuple(document["designs"]["choices"])
    rows = tuple(
        (label, *(_cell(values[name], name in designs["unverified"].get(label, ())) for name in choices))
        for label, values in designs["generators"].items()
    )
    notes: tuple[str, ...] = ("A value with a question mark was not checked in the generator's code.",)
    parts: list[Table | Figure] = [Table("Design choices", ("label", *choices), rows, notes)]
    by_space: dict[str, dict[str, float | None]] = {}
    not_judged: dict[str, str] = {}
    scores: list[tuple[str | float | int | None, ...]] = []
    for space, found in document["spaces"].items():
        by_space[space] = {}
        for name, aligned in found["alignment"].items():
            if "why_not" in aligned:
                by_space[space][name] = None
                not_judged[name] = aligned["why_not"]
                continue
            by_space[space][name] = aligned["images"]["at_values"]["nmi"]["value"]
            for unit in ("images", "tree"):
                at_values, mean = aligned[unit]["at_values"], aligned[unit]["mean"]
                scores.append(
                    (f"{space}, {name}", unit, aligned["generators"], aligned["values"], at_values["nmi"]["value"],
                     at_values["nmi"]["chance"], at_values["nmi"]["low"], at_values["nmi"]["high"],
                     at_values["nmi"]["p_value"], at_values["ari"]["value"], aligned["least_p"],
                     mean["nmi"]["value"], mean["nmi"]["p_value"])
                )  # fmt: skip
    paper = {f"paper: {method}": dict(row) for method, row in document["paper_table5"].items()}
    shown = [name for name in choices if any(row.get(name) is not None for row in by_space.values())]
    table = tuple((name, *(row.get(choice) for choice in choices)) for name, row in {**by_space, **paper}.items())
    notes = (
        "Ours: images clustered by k-means into as many clusters as the choice has values. How the paper clusters, "
        "what and into how many, is not known, and its generators are others: no comparison cell by cell.",
        "With few generators and many values NMI is high by chance: the next table says how high.",
    )
    parts.append(
        Table("NMI of clusters and design choices, as in the paper's Table 5", ("space", *choices), table, notes)
    )
    head = ("space, choice", "clustered", "generators", "values", "NMI", "by chance", "interval from", "to", "p",
            "ARI", "p can be", "NMI, mean of sweep", "p of sweep")  # fmt: skip
    notes = (
        "images: k-means on features; tree: generators by the energy distance of their fingerprints. By chance and p: "
        "the values permuted among the generators. The interval resamples generators, and with few of them lies too "
        "high. The sweep goes over 2 to 10 clusters (fewer than generators) and the number of values, so that no lucky "
        "number is picked. “p can be” is the least that so few generators allow. p is not corrected for the number of "
        "choices and spaces.",
    )
    parts.append(Table("How sure that is", head, tuple(scores), notes))
    if shown:
        text = f"NMI of clusters with {', '.join(shown)}; a row for each space and for each of the paper's."
        picture = draw_alignment({**by_space, **paper}, [*shown, *(c for c in _PAPER_CHOICES if c not in shown)])
        parts.append(Figure("designs-nmi", "NMI of clusters and design choices", text, picture))
    paragraphs = _found(scores, not_judged)
    same = same_divisions(designs["generators"], shown)
    if same:
        told = "; ".join(" and ".join(names) for names in same)
        paragraphs.append(f"These divide the generators here in the same way, so nothing can tell them apart: {told}.")
    return Section("Design choices", tuple(paragraphs), tuple(parts))


def _found(scores: Sequence[tuple[Any, ...]], not_judged: Mapping[str, str]) -> list[str]:
    """What the clusters of images say, and what they can't."""
    of_images = [row for row in scores if row[1] == "images"]
    able = [row for row in of_images if row[-3] <= _SURE]
    sure = ", ".join(f"{row[0]} (p = {row[-1]:.2g})" for row in able if row[-1] <= _SURE)
    paragraphs = []
    if sure:
        paragraphs.append(
            f"Over the sweep, clusters of images follow {sure} more than chance explains at 5 %, with nothing "
            f"corrected for how many were tried."
        )
    elif able:
        paragraphs.append("Over the sweep, no choice is followed more than chance explains at 5 %.")
    unable = ", ".join(str(row[0]) for row in of_images if row[-3] > _SURE)
    if unable:
        paragraphs.append(f"Too few generators to tell at 5 %, whatever the clusters: {unable}.")
    by_reason: dict[str, list[str]] = {}
    for name, why in not_judged.items():
        by_reason.setdefault(why, []).append(name)
    if by_reason:
        told = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
        paragraphs.append(f"Not judged: {told}.")
    return paragraphs


def same_divisions(generators: Mapping[str, Mapping[str, str | None]], choices: Sequence[str]) -> list[list[str]]:
    """Choices that put the same generators together, whatever the values are called."""
    by_division: dict[tuple[int, ...], list[str]] = {}
    for name in choices:
        number: dict[str | None, int] = {None: -1}
        of_generators = (number.setdefault(values[name], len(number)) for values in generators.values())
        by_division.setdefault(tuple(of_generators), []).append(name)
    return [names for names in by_division.values() if len(names) > 1]


def _cell(value: str | None, unverified: bool) -> str | None:
    return f"{value} ?" if value is not None and unverified else value
