"""An evaluation as a table for people and as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manifpt.recipes.tables import paper_accuracies
from manifpt.report.text import cell

__all__ = ["Comparison", "Row", "table_json", "table_markdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one data set, over all seeds.

    Attributes:
        kind: `baseline`, `control`, `artifact` or `fusion`.
        method, space: in words.
        chosen: parameters and network that validation picked.
        accuracies: of the test images, one a seed.
        balanced: the same, mean of every source's.
        validation: mean over seeds, by which it was picked; None: a bundle, which was trained before.
        fd_ratios: one a seed; empty for a fusion, which has no features.
        train_s, predict_s: mean over seeds; None of a bundle's training.
        paper: the row of the paper's Table 2 that it answers to.
        notes: what a reader must know of it.
    """

    kind: str
    method: str
    space: str
    chosen: str
    accuracies: tuple[float, ...]
    balanced: tuple[float, ...]
    validation: float | None
    fd_ratios: tuple[float, ...] = ()
    train_s: float | None = None
    predict_s: float = 0.0
    paper: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method's accuracy less another's, in points; an interval a seed (paired bootstrap over test images, 95 %)."""

    one: str
    other: str
    mean: float
    intervals: tuple[tuple[float, float], ...]

    @property
    def is_clear(self) -> bool:
        """Whether no seed's interval has zero or less."""
        return all(low > 0 for low, _ in self.intervals)


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table_json(
    dataset: str, rows: Sequence[Row], codec_separable: Sequence[str], tested_on: str | None = None
) -> list[dict[str, Any]]:
    """Accuracies in percent; `tested_on` names the set of the test images where it isn't the one of training."""
    out = []
    for row in rows:
        (mean, std), (balanced, balanced_std) = _mean_std(row.accuracies), _mean_std(row.balanced)
        out.append(
            {
                "dataset": dataset,
                "tested_on": tested_on,
                "method": row.method,
                "space": row.space,
                "accuracy_mean": 100 * mean,
                "accuracy_std": 100 * std,
                "fd_ratio": statistics.fmean(row.fd_ratios) if row.fd_ratios else None,
                "seeds": len(row.accuracies),
                "codec_separable": list(codec_separable),
                "kind": row.kind,
                "chosen": row.chosen,
                "balanced_accuracy_mean": 100 * balanced,
                "balanced_accuracy_std": 100 * balanced_std,
                "validation_accuracy": None if row.validation is None else 100 * row.validation,
                "train_s": row.train_s,
                "predict_s": row.predict_s,
                "notes": list(row.notes),
            }
        )
    return out


_KINDS = {
    "baseline": "Published baselines",
    "control": "Controls",
    "artifact": "Artifacts",
    "fusion": "Late fusion",
}


def table_markdown(
    dataset: str,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    audits: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
    paper_column: str | None = None,
) -> str:
    """Shaped as the paper's Table 2, with its numbers (or its Table 4's) beside ours where the set has a column there.

    Args:
        dataset: of training.
        rows, comparisons: to be told.
        audits: the codec audit of the images of training, under "", and of another set's that are tested on.
        facts: counts of images by side, `labels`, `seeds`, `own_splits` (whether seeds differ in their splits), and
            `tested_on`, the other set's name or None.
        paper_column: of the paper's table.
    """
    paper = paper_accuracies(paper_column) if paper_column else {}
    tested = f"{facts['train']:,} to train, {facts['validation']:,} to choose"
    if facts["tested_on"]:
        tested += f"). **Tested on {facts['test']:,} images of {facts['tested_on']}**, none of which training has"
    else:
        tested += f", {facts['test']:,} to test)"
    split = "every seed has its own split" if facts["own_splits"] else "one split for all"
    lines = [
        f"# {dataset}" + (f", tested on {facts['tested_on']}" if facts["tested_on"] else ""),
        "",
        f"{facts['images']:,} images of {len(facts['labels'])} sources, {facts['seeds']} seeds; {split} ({tested}. "
        f"Accuracy in percent, mean and standard deviation over seeds. Whatever a row chose, it chose on validation.",
        "",
        "| method | space | accuracy | mean of sources | FD ratio | train | predict | chosen |"
        + (" paper |" if paper else ""),
        "| --- | --- | --- | --- | --- | --- | --- | --- |" + (" --- |" if paper else ""),
    ]
    for kind, title in _KINDS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            lines.append(f"| **{title}** | | | | | | | |" + (" |" if paper else ""))
        lines += [_line(row) + (f" {paper.get(row.paper or '', '-')} |" if paper else "") for row in of_kind]
    lines += ["", *_compared(comparisons)]
    for name, audit in audits.items():
        lines += _audited(audit, name)
    lines += [f"- {row.method} ({row.space}): {note}" for row in rows for note in row.notes]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    mean, std = _mean_std(row.accuracies)
    balanced = _mean_std(row.balanced)[0]
    accuracy = f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if len(row.accuracies) > 1 else "")
    ratio = f"{statistics.fmean(row.fd_ratios):.1f}" if row.fd_ratios else "-"
    cells = [
        row.method, row.space, accuracy, f"{100 * balanced:.1f}", ratio,
        "-" if row.train_s is None else f"{row.train_s:.0f} s", f"{row.predict_s:.1f} s", row.chosen,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _compared(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    lines = ["In points of accuracy, with the 95 % interval of each seed (paired bootstrap over test images):", ""]
    for compared in comparisons:
        intervals = ", ".join(f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in compared.intervals)
        lines.append(f"- {compared.one} less {compared.other}: **{100 * compared.mean:+.1f}** ({intervals})")
    return [*lines, ""]


def _audited(audit: Mapping[str, Any], name: str) -> list[str]:
    lines = [f"Of {name}:"] if name else []
    if audit.get("equalized"):
        lines.append("All images were re-encoded alike (JPEG, quality 75, 4:2:0) before anything looked at them.")
    else:
        lines.append("Images are as they were published.")
    if audit["accuracy"] is None:
        return [" ".join([*lines, "Its images are of too few sources for a codec audit."]), ""]
    separable = [source for source, is_separable in audit["separable"].items() if is_separable]
    lines.append(
        f"Codec audit: facts of the files alone name the source of {100 * audit['accuracy']:.1f} % of images (chance "
        f"{100 * audit['chance']:.1f} %)."
    )
    if separable:
        told = "; ".join(f"{cell(source)} ({audit['why'][source]})" for source in separable)
        lines.append(f"**Told apart by their files: {told}.** What a row says of these may be a codec, no fingerprint.")
    else:
        lines.append("No source is told apart by its files.")
    return [" ".join(lines), ""]
