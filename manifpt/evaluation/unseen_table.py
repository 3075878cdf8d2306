"""The tables of `evaluate_attributor --leave-one-out`, for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CHOSEN", "leave_one_out_markdown", "means"]

CHOSEN = "chosen"  # among a row's scores: whichever validation picked
_MEASURES = {
    "auroc": "AUROC",
    "fpr95": "FPR95",
    "oscr": "OSCR",
    "accuracy": "accuracy",
    "false_alarms": "false alarms",
    "found": "found",
}


def leave_one_out_markdown(document: Mapping[str, Any]) -> str:
    """Means over generators by method and score; then each generator by the chosen score.

    Args:
        document: as `leave_one_out.json` holds it.
    """
    names = " | ".join(_MEASURES.values())
    rule = " --- |" * len(_MEASURES)
    lines = [
        f"# {document['dataset']}: one source left out",
        "",
        f"{document['images']:,} images of {len(document['labels'])} labels, {document['seeds']} seed(s). Each "
        f"generator in turn is in neither training nor validation; known images are the test images of the others. "
        f"AUROC: known against unknown. FPR95: unknown images taken for known where 95 % of the known are. OSCR: area "
        f"under the rate of known images told rightly over that of unknown ones taken for known. At the threshold that "
        f"validation sets for {100 * document['false_alarms']:g} % false alarms: accuracy (of the known images, those "
        f"not called unknown and told rightly), false alarms, and unknown images found. In percent, means over seeds.",
        "",
        f"Mean over generators; `{CHOSEN}` is whichever score validation picked.",
        "",
        f"| method | space | accuracy without threshold | score | {names} |",
        f"| --- | --- | --- | --- |{rule}",
        *_by_method(document["rows"]),
        "",
        "Each generator, by the score that validation picked:",
        "",
        f"| left out | images | method | space | score | {names} |",
        f"| --- | --- | --- | --- | --- |{rule}",
        *_by_generator(document["rows"]),
        "",
        *(
            f"- {row['method']} ({row['space']}) without {row['left_out']}: {note}"
            for row in document["rows"]
            for note in row.get("notes", ())
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name by name, of mappings with the same names."""
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def _by_method(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    methods: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        methods.setdefault((row["method"], row["space"], row["network"]), []).append(row)
    return [
        f"| {method} | {space} | {_percent(statistics.fmean(row['closed_accuracy'] for row in of_method))} | {score} | "
        f"{_cells(means([row['scores'][score] for row in of_method]))} |"
        for (method, space, _), of_method in methods.items()
        for score in of_method[0]["scores"]
    ]


def _by_generator(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"| {row['left_out']} | {row['images']:,} | {row['method']} | {row['space']} | "
        f"{', '.join(sorted(set(row['chosen'])))} | {_cells(row['scores'][CHOSEN])} |"
        for row in sorted(rows, key=lambda row: str(row["left_out"]))
    ]


def _cells(found: Mapping[str, float]) -> str:
    return " | ".join(_percent(found[name]) for name in _MEASURES)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
