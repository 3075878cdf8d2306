"""The work of an evaluation, one task a function: fit a method, and read the test images with it. Knows no Ray.

Legend: N images, S labels, F features.

Every task leaves its result in a folder of its own, `fit.json` or `test.json` last, and finds it there when it is
called again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from manifpt.artifacts import tensor_column, to_numpy
from manifpt.attributor.examples import Examples, Part
from manifpt.attributor.networks import make_network
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.training import (
    Outputs,
    Recipe,
    Trainer,
    class_weights,
    fit,
    from_arrays,
    outputs_of,
)
from manifpt.baselines import make_baseline
from manifpt.decode import decode
from manifpt.errors import BadImage, ConfigError
from manifpt.fetch import fetch
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.reader import ArtifactReader
from manifpt.spaces import View
from manifpt.storage import join, store_of

__all__ = ["Work", "fit_attributor", "fit_baseline", "read_outputs", "test_attributor"]

_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One method at one seed.

    Attributes:
        folder: of the result.
        key: what decides the result, for people who look into the folder.
        name: of the network or baseline.
        train, validation, test: rows; those of `test` may be of another run.
        recipe: of an attributor.
        view: the pixels that a baseline sees.
        seed: of weights and order.
        threads, device: to compute with.
    """

    folder: str
    key: dict[str, Any]
    name: str
    examples: Examples
    test_examples: Examples
    recipe: Recipe | None = None
    view: View | None = None
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a stage left, if it has ended."""
        try:
            found: dict[str, Any] = json.loads(store_of(self.folder).read(join(self.folder, f"{stage}.json")))
        except FileNotFoundError:
            return None
        return found


def fit_attributor(work: Work) -> dict[str, Any]:
    """Trains a network on artifacts and keeps its weights and its validation logits; the test images stay unread."""
    done = work.done("fit")
    if done is not None:
        return done
    assert work.recipe is not None
    torch.set_num_threads(work.threads)
    examples, recipe = work.examples, work.recipe
    _refuse_large(examples)
    artifacts, label_n, _ = _artifacts(examples, TRAIN)
    torch.manual_seed(work.seed)
    network = make_network(work.name, examples.shape, len(examples.labels))
    network.standardize(*_mean_and_std(artifacts))
    size = min(recipe.batch_size, len(label_n))
    weight_s = class_weights(label_n, len(examples.labels), recipe.balanced)
    trainer = Trainer(network, recipe, weight_s, len(label_n) // size, work.device)
    validation = _artifacts(examples, VALIDATION)
    begin = time.perf_counter()
    state = fit(trainer, from_arrays(artifacts, label_n, size, work.seed), lambda: _batches(*validation))
    seconds = time.perf_counter() - begin
    outputs = list(outputs_of(network, _batches(*validation), work.device))
    _write_outputs(work.folder, "validation", outputs)
    from safetensors.torch import save

    store = store_of(work.folder)
    store.write(join(work.folder, "model.safetensors"), save({k: v.contiguous() for k, v in state.best.items()}))
    return _end(work, "fit", {
        "validation_accuracy": max(epoch.validation_accuracy for epoch in state.history),
        "epochs": len(state.history),
        "train_s": seconds,
        "images_per_s": float(np.median([epoch.images_per_s for epoch in state.history])),
        "parameters": sum(p.numel() for p in network.parameters()),
    })  # fmt: skip


def _refuse_large(examples: Examples) -> None:
    """Evaluation keeps artifacts in memory, once as they are and once in float32."""
    needed_bytes = 8 * len(examples.label_n) * int(np.prod(examples.shape))
    has_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > has_bytes // 2:
        raise ConfigError(
            f"{len(examples.label_n):,} artifacts of {examples.run} take {needed_bytes / 2**30:.0f} GiB here: lower "
            f"--most-images, or use train_attributor, which streams, and give its bundle to --attributor."
        )


def test_attributor(work: Work) -> dict[str, Any]:
    """Reads the test images with a network that `fit_attributor` trained."""
    done = work.done("test")
    if done is not None:
        return done
    from safetensors.torch import load

    torch.set_num_threads(work.threads)
    network = make_network(work.name, work.examples.shape, len(work.examples.labels)).to(work.device)
    network.load_state_dict(load(store_of(work.folder).read(join(work.folder, "model.safetensors"))))
    test = _artifacts(work.test_examples, TEST)
    begin = time.perf_counter()
    outputs = list(outputs_of(network, _batches(*test), work.device))
    return _tested(work, outputs, time.perf_counter() - begin)


def fit_baseline(work: Work) -> dict[str, Any]:
    """Fits a baseline on pixels and reads validation and test images with it."""
    done = work.done("test")
    if done is not None:
        return done
    assert work.view is not None
    torch.set_num_threads(work.threads)
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
        outputs[side] = [Outputs(baseline.predict(pixels), baseline.features(pixels), label_n, row_n)]
    _write_outputs(work.folder, "validation", outputs[VALIDATION])
    found = outputs[VALIDATION][0]
    _end(work, "fit", {
        "validation_accuracy": _balanced(found.logits_bs, found.label_b),
        "train_s": seconds,
        "notes": list(getattr(baseline, "notes", ())),
    })  # fmt: skip
    return _tested(work, outputs[TEST], time.perf_counter() - begin)


def read_outputs(folder: str, side: str) -> Outputs:
    """What a method said of a side, in the order of the rows."""
    data = store_of(folder).read(join(folder, f"{side}.parquet"))
    table = pq.read_table(pa.BufferReader(data)).combine_chunks().sort_by("row")
    return Outputs(
        to_numpy(table["logits"]), to_numpy(table["features"]), table["label"].to_numpy(), table["row"].to_numpy()
    )


def _tested(work: Work, outputs: list[Outputs], seconds: float) -> dict[str, Any]:
    _write_outputs(work.folder, "test", outputs)
    features_nf = np.concatenate([found.features_bf for found in outputs])
    label_n = np.concatenate([found.label_b for found in outputs])
    logits_ns = np.concatenate([found.logits_bs for found in outputs])
    return _end(work, "test", {
        "accuracy": float((logits_ns.argmax(1) == label_n).mean()),
        "balanced_accuracy": _balanced(logits_ns, label_n),
        "fd_ratio": fd_ratio_or_none(features_nf, label_n, work.seed),
        "fd_half_images": int(np.unique(label_n, return_counts=True)[1].min() // 2),
        "features": features_nf.shape[1],
        "predict_s": seconds,
        "images": len(label_n),
    })  # fmt: skip


def _end(work: Work, stage: str, facts: dict[str, Any]) -> dict[str, Any]:
    document = {"key": work.key, **facts}
    store_of(work.folder).write(join(work.folder, f"{stage}.json"), (json.dumps(document, indent=2) + "\n").encode())
    return document


def _balanced(logits_ns: np.ndarray, label_n: np.ndarray) -> float:
    is_right_n = logits_ns.argmax(1) == label_n
    return float(np.mean([is_right_n[label_n == label].mean() for label in np.unique(label_n)]))


def _write_outputs(folder: str, side: str, outputs: list[Outputs]) -> None:
    logits_ns, features_nf, label_n, row_n = (
        np.concatenate([getattr(found, name) for found in outputs])
        for name in ("logits_bs", "features_bf", "label_b", "row_b")
    )
    columns = {"row": row_n, "label": label_n, "logits": tensor_column(np.asarray(logits_ns, np.float32))}
    table = pa.table(columns | {"features": tensor_column(np.asarray(features_nf, np.float32))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store_of(folder).write(join(folder, f"{side}.parquet"), sink.getvalue().to_pybytes())


def _artifacts(examples: Examples, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A side's artifacts [N, *shape], labels and rows int64 [N]."""
    reader = ArtifactReader(examples.run, examples.spec.name)

    def of_part(part: Part) -> np.ndarray:
        artifacts = to_numpy(reader.read(part.shard, part.place_n)["artifact"])
        if not np.isfinite(artifacts).all():
            raise ConfigError(f"Artifacts of {examples.run} hold numbers that are not finite: compute them again.")
        return artifacts

    return _gathered(examples.parts(side), of_part)


def _mean_and_std(artifacts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every coordinate, float [*shape] both; block by block, since all of them as float64 take four times as much
    memory as they have in float16."""
    blocks = [artifacts[start : start + _BATCH] for start in range(0, len(artifacts), _BATCH)]
    mean = np.sum([block.sum(axis=0, dtype=np.float64) for block in blocks], axis=0) / len(artifacts)
    squares = np.zeros(artifacts.shape[1:])
    for block in blocks:
        squares += np.square(block - mean).sum(axis=0)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(squares / len(artifacts))).float()


def _gathered(parts: list[Part], of_part: Callable[[Part], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.concatenate([of_part(part) for part in parts]),
        np.concatenate([part.label_n for part in parts]),
        np.concatenate([part.row_n for part in parts]),
    )


def _batches(artifacts: np.ndarray, label_n: np.ndarray, row_n: np.ndarray) -> Any:
    for start in range(0, len(label_n), _BATCH):
        block = slice(start, start + _BATCH)
        yield tuple(torch.from_numpy(values[block]) for values in (artifacts, label_n, row_n))


def _images(examples: Examples, side: int, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A side's pixels uint8 [N, 3, H, W], as a pixel space sees them, with labels and rows."""

    def of_part(part: Part) -> np.ndarray:
        rows = (
            examples.table.take(pa.array(part.row_n)).select(["uri", "container", "offset", "size_bytes"]).to_pylist()
        )
        return np.stack([_view(row, data, view) for row, data in zip(rows, fetch(rows), strict=True)])

    return _gathered(examples.parts(side), of_part)


def _view(row: dict[str, Any], data: bytes | BadImage, view: View) -> np.ndarray:
    try:
        if isinstance(data, BadImage):
            raise data
        return view.of(decode(data))
    except BadImage as bad:
        raise ConfigError(
            f"{row['uri']} can't be read any more ({bad.reason.value}): run compute_artifacts anew."
        ) from bad
