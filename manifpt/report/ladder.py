"""The robustness ladder as a table and as curves. Takes the document of `ladder.json`.

Legend: A attributors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifpt.alterations import NONE
from manifpt.report.drawing import MARKERS, color_of, distinct, grid, in_legend, png
from manifpt.report.text import cell, plain

__all__ = ["draw_ladder", "ladder_markdown"]

_PANELS = (("accuracy", "accuracy, %"), ("unknown_rate", "called unknown, %"))


def ladder_markdown(document: Mapping[str, Any]) -> str:
    """A row a step, a column an attributor: accuracy, and what share is called unknown, in percent."""
    attributors, names = document["attributors"], _names(document["attributors"])
    lines = [
        "# Robustness ladder",
        "",
        "Every attributor on its own test images, altered: accuracy in percent, and after the stroke the share that is "
        "called unknown. All images come from sources that it knows, so each of those is an error.",
        "",
        "| step | " + " | ".join(cell(name) for name in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for step in document["steps"]:
        cells = [_cell(of_one["results"][step]) for of_one in attributors]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {cell(name)}: {_told(of_one)}" for name, of_one in zip(names, attributors, strict=True))]
    return "\n".join(lines) + "\n"


def _names(attributors: Sequence[Mapping[str, Any]]) -> list[str]:
    return distinct([of_one["attributor"].rstrip("/").rpartition("/")[2] for of_one in attributors], most=40)


def _cell(result: Mapping[str, Any]) -> str:
    if result["accuracy"] is None:
        return "-"
    return f"{100 * result['accuracy']:.1f} / {100 * result['unknown_rate']:.1f}"


def _told(of_one: Mapping[str, Any]) -> str:
    altered = ", ".join(of_one["altered"])
    rejected = {step: result["rejected"] for step, result in of_one["results"].items() if result["rejected"]}
    return (
        f"space {plain(of_one['space'])}, estimate {of_one['estimate']['name']}, network {of_one['network']}, "
        + (f"trained with altered copies ({altered})" if altered else "trained on images as they are")
        + f"; {of_one['test_images']:,} test images of {of_one['labels']} sources"
        + (f"; rejected: {', '.join(f'{count} at {step}' for step, count in rejected.items())}" if rejected else "")
        + "."
    )


def draw_ladder(document: Mapping[str, Any]) -> bytes:
    """Accuracy and unknown rate along the ladder, as PNG: a line an attributor, broken between kinds of alteration.

    Attributors of one space and estimate share a colour; those that altered copies were trained on are dashed. Each has
    a marker of its own, while there are some.
    """
    attributors, steps = document["attributors"], document["steps"]
    kinds = list(dict.fromkeys((of_one["space"], of_one["estimate"]["name"]) for of_one in attributors))
    figure, axes = grid(len(_PANELS), 1, 11.0, 3.4, sharex=True)
    for axis, (field, title) in zip(axes[:, 0], _PANELS, strict=True):
        for place_of_one, (name, of_one) in enumerate(zip(_names(attributors), attributors, strict=True)):
            number = kinds.index((of_one["space"], of_one["estimate"]["name"]))
            style = {
                "color": color_of(number, len(kinds)), "marker": MARKERS[place_of_one % len(MARKERS)], "markersize": 4,
                "linewidth": 1.4, "linestyle": "--" if of_one["altered"] else "-",
            }  # fmt: skip
            for places in _pieces(steps):
                values = [of_one["results"][steps[place]][field] for place in places]
                y = [float("nan") if value is None else 100 * value for value in values]
                axis.plot(places, y, label=in_legend(name) if places[0] == 0 else None, **style)
        axis.set_ylabel(title)
        axis.set_ylim(-2, 102)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[-1, 0].set_xticks(range(len(steps)), steps, rotation=60, ha="right", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return png(figure)


def _pieces(steps: Sequence[str]) -> list[list[int]]:
    """Places of the steps of each kind; `none` is one by itself."""
    pieces: dict[str, list[int]] = {}
    for place, step in enumerate(steps):
        pieces.setdefault(NONE if step == NONE else step.partition("-")[0], []).append(place)
    return list(pieces.values())
