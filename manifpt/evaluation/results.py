"""Rows of a table from what methods left behind: accuracies, late fusions, and how sure their differences are.

Legend: N images, S labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifpt.attributor.examples import Examples
from manifpt.attributor.outputs import Outputs, read_outputs
from manifpt.attributor.splits import TEST
from manifpt.evaluation.fusion import fit_weights, fused
from manifpt.evaluation.methods import Candidate
from manifpt.evaluation.tables import Comparison, Row
from manifpt.evaluation.tasks import Work, outputs_uri
from manifpt.metrics.attribution import confusion, paired_bootstrap, precision_recall

__all__ = ["Fitted", "comparisons", "fusions", "merged_notes", "of_baseline", "of_candidate", "per_source"]

_FUSIONS = {
    "fusion without artifacts": ("control",),
    "fusion of artifacts": ("artifact",),
    "fusion with artifacts": ("control", "artifact"),
}
_PAPER = {("rgb", "nearest"): "ManiFPT_RGB", ("frequency", "nearest"): "ManiFPT_FREQ",
          ("supervised", "nearest"): "ManiFPT_SL", ("selfsupervised", "nearest"): "ManiFPT_SSL"}  # fmt: skip
_PAPER_BASELINES = {"mccloskey18": "McClo18"}
_NAMES = {"mccloskey18": "McCloskey18"}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A method at all seeds, with its place in the table."""

    row: Row
    folders: tuple[str, ...]

    def outputs(self, seed: int, side: str) -> Outputs:
        """What it said of a side."""
        return read_outputs([outputs_uri(self.folders[seed], side)])


def of_candidate(candidate: Candidate, works: Sequence[Work]) -> Fitted:
    """Artifacts or a control, at all seeds."""
    is_paper = not candidate.onto and not candidate.estimate.residual_first
    row = _row(
        works,
        kind="control" if candidate.is_control else "artifact",
        method=candidate.title,
        space=candidate.space.name,
        chosen=f"{candidate.network}; {candidate.estimate.label}",
        paper=_PAPER.get((candidate.space.name, candidate.estimate.name)) if is_paper else None,
        notes=_notes(works),
    )
    return Fitted(row, tuple(work.folder for work in works))


def of_baseline(name: str, works: Sequence[Work]) -> Fitted:
    """A baseline, at all seeds."""
    paper, method = _PAPER_BASELINES.get(name, name.capitalize()), _NAMES.get(name, name.capitalize())
    row = _row(works, kind="baseline", method=method, space="pixels", chosen="", paper=paper, notes=_notes(works))
    return Fitted(row, tuple(work.folder for work in works))


def _notes(works: Sequence[Work]) -> tuple[str, ...]:
    return merged_notes({work.seed: (work.done("fit") or {}).get("notes", ()) for work in works})


def merged_notes(notes_of_seed: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """Each note once; with its seeds, where it isn't true of all."""
    seeds_of: dict[str, list[int]] = {}
    for seed, notes in notes_of_seed.items():
        for note in dict.fromkeys(notes):
            seeds_of.setdefault(note, []).append(seed)

    def told(note: str, seeds: list[int]) -> str:
        if len(seeds) == len(notes_of_seed):
            return note
        return f"{note} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"

    return tuple(told(note, seeds) for note, seeds in seeds_of.items())


def _row(works: Sequence[Work], **fields: Any) -> Row:
    fits, tests = ([work.done(stage) or {} for work in works] for stage in ("fit", "test"))
    return Row(
        accuracies=tuple(test["accuracy"] for test in tests),
        balanced=tuple(test["balanced_accuracy"] for test in tests),
        validation=statistics.fmean(fit["validation_accuracy"] for fit in fits),
        fd_ratios=tuple(test["fd_ratio"] for test in tests if test["fd_ratio"] is not None),
        train_s=statistics.fmean(fit["train_s"] for fit in fits),
        predict_s=statistics.fmean(test["predict_s"] for test in tests),
        **fields,
    )


def fusions(fitted: Sequence[Fitted]) -> tuple[list[tuple[Row, list[Outputs]]], dict[str, Any]]:
    """Late fusions, each with what it says of the test images, by seed."""
    out, weights = [], {}
    for name, kinds in _FUSIONS.items():
        parts = [found for found in fitted if found.row.kind in kinds]
        if len(parts) < 2 or {found.row.kind for found in parts} != set(kinds):
            continue
        outputs, validations, of_seed = [], [], []
        for seed in range(len(parts[0].folders)):
            validation = [found.outputs(seed, "validation") for found in parts]
            test = [found.outputs(seed, "test") for found in parts]
            label_n = validation[0].label_b
            weight_m = fit_weights([v.logits_bs for v in validation], label_n)
            of_seed.append({f"{p.row.method} | {p.row.space}": float(w) for p, w in zip(parts, weight_m, strict=True)})
            validations.append(_fused(validation, weight_m).balanced_accuracy)
            outputs.append(_fused(test, weight_m))
        row = Row(
            kind="fusion", method=name, space="several", chosen=f"{len(parts)} methods, weights by validation",
            accuracies=tuple(found.accuracy for found in outputs),
            balanced=tuple(found.balanced_accuracy for found in outputs),
            validation=statistics.fmean(validations),
        )  # fmt: skip
        out.append((row, outputs))
        weights[name] = of_seed
    return out, weights


def _fused(outputs: Sequence[Outputs], weight_m: np.ndarray) -> Outputs:
    assert all(np.array_equal(of_method.row_b, outputs[0].row_b) for of_method in outputs), "of the same images"
    return replace(outputs[0], logits_bs=fused([of_method.logits_bs for of_method in outputs], weight_m))


def comparisons(
    fitted: Sequence[Fitted],
    fused_rows: Sequence[tuple[Row, list[Outputs]]],
    tested: Sequence[Examples],
) -> list[Comparison]:
    """The best artifact method against the best baseline and the best control; fusion with artifacts and without.
    Best is what validation says."""
    right: dict[str, list[np.ndarray]] = {}
    rows: dict[str, Row] = {}
    for found in fitted:
        name = f"{found.row.method} ({found.row.space})"
        rows[name] = found.row
        right[name] = [found.outputs(seed, "test").is_right_b for seed in range(len(found.folders))]
    for row, outputs in fused_rows:
        rows[row.method], right[row.method] = row, [of_seed.is_right_b for of_seed in outputs]
    best = {
        kind: max(
            (n for n, row in rows.items() if row.kind == kind), key=lambda n: rows[n].validation or 0.0, default=None
        )
        for kind in ("artifact", "baseline", "control")
    }
    pairs = [(best["artifact"], best["baseline"]), (best["artifact"], best["control"])]
    pairs.append(("fusion with artifacts", "fusion without artifacts"))
    out = []
    for one, other in pairs:
        if one in right and other in right:
            assert one is not None and other is not None
            found_by_seed = [
                paired_bootstrap(a_n, b_n, seed, group_b=_groups(tested[seed]))
                for seed, (a_n, b_n) in enumerate(zip(right[one], right[other], strict=True))
            ]
            mean = statistics.fmean(found.mean for found in found_by_seed)
            out.append(Comparison(one, other, mean, tuple((found.low, found.high) for found in found_by_seed)))
    return out


def _groups(found: Examples) -> np.ndarray | None:
    """Of the test rows: which images must be resampled together."""
    if found.group is None:
        return None
    values = found.table[found.group].take(pa.array(np.flatnonzero(found.side_n == TEST)))
    codes = pc.dictionary_encode(values.combine_chunks().cast(pa.string()))
    empty = np.array([value in (None, "") for value in values.to_pylist()])
    return np.where(empty, -1, codes.indices.to_numpy(zero_copy_only=False))


def per_source(found: Fitted, labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and confusion over all seeds' test images."""
    total_ss = np.zeros((len(labels), len(labels)), np.int64)
    for seed in range(len(found.folders)):
        outputs = found.outputs(seed, "test")
        total_ss += confusion(outputs.label_b, outputs.predicted_b, labels)
    precision_s, recall_s = precision_recall(total_ss)
    return {
        "precision": {label: _number(value) for label, value in zip(labels, precision_s, strict=True)},
        "recall": {label: _number(value) for label, value in zip(labels, recall_s, strict=True)},
        "confusion": total_ss.tolist(),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
