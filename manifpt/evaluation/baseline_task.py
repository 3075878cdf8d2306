"""The task of a baseline: fitted on pixels, it reads validation and test images. Knows no Ray; see `tasks`.

Legend: N images.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from manifpt.attributor.examples import Examples, Part
from manifpt.attributor.outputs import Outputs, write_outputs
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.baselines import make_baseline
from manifpt.evaluation.tasks import Work, end_stage, end_test, gathered, refuse_large
from manifpt.fetch import fetch
from manifpt.reader import image_of_run
from manifpt.spaces import View

__all__ = ["fit_baseline"]


def fit_baseline(work: Work) -> dict[str, Any]:
    """Fits a baseline on pixels and reads validation and test images with it."""
    done = work.done("test")
    if done is not None:
        return done
    assert work.view is not None
    torch.set_num_threads(work.threads)
    refuse_large(work)
    images = {side: _images(work.examples, side, work.view) for side in (TRAIN, VALIDATION)}
    height_px, width_px = images[TRAIN][0].shape[2:]
    baseline = make_baseline(work.name, len(work.examples.labels), (height_px, width_px), work.seed, work.threads)
    begin = time.perf_counter()
    baseline.fit(images[TRAIN][0], images[TRAIN][1], images[VALIDATION][0], images[VALIDATION][1])
    seconds = time.perf_counter() - begin
    images[TEST] = _images(work.test_examples, TEST, work.view)
    outputs = {}
    for side in (VALIDATION, TEST):
        pixels, label_n, row_n = images[side]
        begin = time.perf_counter()
        no_spectrum = np.empty((len(row_n), 0), np.float32)
        said = (baseline.predict(pixels), baseline.features(pixels), no_spectrum)
        outputs[side] = [Outputs(*said, label_n, row_n)]
    write_outputs(work.outputs_uri("validation"), outputs[VALIDATION])
    end_stage(work, "fit", {
        "validation_accuracy": outputs[VALIDATION][0].balanced_accuracy,
        "train_s": seconds,
        "notes": list(baseline.notes),
    })  # fmt: skip
    return end_test(work, outputs[TEST], time.perf_counter() - begin)


def _images(examples: Examples, side: int, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A side's pixels uint8 [N, 3, H, W], as a pixel space sees them, with labels and rows."""

    def of_part(part: Part) -> np.ndarray:
        columns = ["uri", "container", "offset", "size_bytes", "content_hash"]
        rows = examples.table.take(pa.array(part.row_n)).select(columns).to_pylist()
        return np.stack([view.of(image_of_run(row, data)) for row, data in zip(rows, fetch(rows), strict=True)])

    return gathered(examples.parts(side), of_part)
