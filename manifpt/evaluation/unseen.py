"""One source left out of training and validation, and how well its images are then told to be of none that is known.

Legend: N images, S labels.

Everything is chosen as for a bundle: on validation images of the labels that are left.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from manifpt.attributor.calibration import fit_temperature
from manifpt.attributor.examples import Examples
from manifpt.attributor.features import feature_statistics
from manifpt.attributor.openset import (
    SCORES,
    WITH_SPECTRUM,
    chosen_on,
    scorer,
    threshold_at,
    usual_of,
    validation_aurocs,
)
from manifpt.attributor.outputs import Outputs, joined
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.training import outputs_of
from manifpt.evaluation.tasks import Work, artifacts_of, batches_of, end_stage, fit_attributor, trained_network
from manifpt.metrics.openset import auroc, fpr_at_tpr, operating_point, oscr

__all__ = ["FALSE_ALARMS", "hold_out", "measure_unseen"]

FALSE_ALARMS = 0.05  # as `train_attributor` has it where nothing else is asked for


def hold_out(examples: Examples, label: str) -> tuple[Examples, Examples]:
    """The rows of all other labels, on the sides that they were on; and all rows of this one, to test on."""
    number = examples.labels.index(label)
    is_held_n = examples.label_n == number
    known, held = (
        replace(examples, table=examples.table.filter(pa.array(mask_n)), label_n=examples.label_n[mask_n],
                side_n=examples.side_n[mask_n])
        for mask_n in (~is_held_n, is_held_n)
    )  # fmt: skip
    others = tuple(name for name in examples.labels if name != label)
    known = replace(known, labels=others, label_n=known.label_n - (known.label_n > number))
    tested_n = np.full(len(held.label_n), TEST, np.int8)
    return known, replace(held, labels=(label,), label_n=np.zeros(len(tested_n), np.int64), side_n=tested_n)


def measure_unseen(work: Work) -> dict[str, Any]:
    """Trains without a source, and measures each score on the test images of the others and on all of its own.

    Args:
        work: its `examples` are without the source, its `test_examples` are the source's.
    """
    done = work.done("unseen")
    if done is not None:
        return done
    fitted = fit_attributor(work)
    torch.set_num_threads(work.threads)
    network = trained_network(work)

    def said(examples: Examples, side: int) -> Outputs:
        return joined(outputs_of(network, batches_of(*artifacts_of(examples, side)), work.device))

    train, known, unseen = said(work.examples, TRAIN), said(work.examples, TEST), said(work.test_examples, TEST)
    sizes = (len(work.examples.labels), train.features_bf.shape[1], train.spectrum_bk.shape[1])
    statistics = feature_statistics([train], *sizes)
    validation = said(work.examples, VALIDATION)
    temperature = fit_temperature(validation.logits_bs, validation.label_b)
    aurocs = validation_aurocs(validation, temperature, statistics)
    found = {}
    for name in (*SCORES, *(name + WITH_SPECTRUM for name in SCORES if name != "spectrum")):
        usual = usual_of(name.removesuffix(WITH_SPECTRUM), validation, temperature, statistics)
        score = scorer(name, temperature, statistics, usual)
        validation_n, known_n, unseen_n = (score(outputs) for outputs in (validation, known, unseen))
        threshold = threshold_at(validation_n, validation.label_b, FALSE_ALARMS)
        found[name] = {
            "auroc": auroc(known_n, unseen_n),
            "fpr95": fpr_at_tpr(known_n, unseen_n),
            "oscr": oscr(known_n, known.is_right_b, unseen_n),
            **asdict(operating_point(known_n, known.is_right_b, unseen_n, threshold)),
        }
    return end_stage(work, "unseen", {
        "validation_aurocs": aurocs,
        "chosen": chosen_on(validation, temperature, statistics, aurocs, FALSE_ALARMS).score,
        "closed_accuracy": known.accuracy,
        "known_images": len(known.label_b),
        "unseen_images": len(unseen.label_b),
        "scores": found,
        "notes": fitted.get("notes", []),
    })  # fmt: skip
