"""The work of an evaluation, one task a function: fit a method, and read the test images with it. Knows no Ray.

Legend: N images, S labels, F features.

Every task leaves its result in a folder of its own, `fit.json` or `test.json` last, and finds it there when it is
called again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from manifpt.artifacts import to_numpy
from manifpt.attributor.examples import Examples, Part
from manifpt.attributor.networks import make_network
from manifpt.attributor.outputs import Outputs, read_outputs, write_outputs
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.training import (
    NOT_FINITE,
    Recipe,
    Trainer,
    class_weights,
    fit,
    from_arrays,
    mean_and_std,
    outputs_of,
)
from manifpt.baselines import make_baseline
from manifpt.decode import decode
from manifpt.errors import BadImage, ConfigError
from manifpt.fetch import fetch
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.reader import ArtifactReader
from manifpt.resources import memory_bytes
from manifpt.spaces import View
from manifpt.storage import join, store_of

__all__ = ["Work", "fit_attributor", "fit_baseline", "outputs_uri", "test_attributor"]

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

    def outputs_uri(self, side: str) -> str:
        """Where what it says of a side lies."""
        return outputs_uri(self.folder, side)

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a stage left, if it has ended."""
        try:
            found: dict[str, Any] = json.loads(store_of(self.folder).read(join(self.folder, f"{stage}.json")))
        except FileNotFoundError:
            return None
        return found


def outputs_uri(folder: str, side: str) -> str:
    """Where what a method said of a side lies."""
    return join(folder, f"{side}.parquet")


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
    blocks = (block.numpy() for block, _, _ in _batches(artifacts, label_n, label_n))
    network.standardize(*mean_and_std(blocks, examples.shape))
    size = min(recipe.batch_size, len(label_n))
    weight_s = class_weights(label_n, len(examples.labels), recipe.balanced)
    trainer = Trainer(network, recipe, weight_s, len(label_n) // size, work.device)
    validation = _artifacts(examples, VALIDATION)
    begin = time.perf_counter()
    state = fit(trainer, from_arrays(artifacts, label_n, size, work.seed), lambda: _batches(*validation))
    seconds = time.perf_counter() - begin
    outputs = list(outputs_of(network, _batches(*validation), work.device))
    write_outputs(work.outputs_uri("validation"), outputs)
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
    if needed_bytes > memory_bytes() // 2:
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
    write_outputs(work.outputs_uri("validation"), outputs[VALIDATION])
    _end(work, "fit", {
        "validation_accuracy": outputs[VALIDATION][0].balanced_accuracy,
        "train_s": seconds,
        "notes": list(baseline.notes),
    })  # fmt: skip
    return _tested(work, outputs[TEST], time.perf_counter() - begin)


def _tested(work: Work, outputs: list[Outputs], seconds: float) -> dict[str, Any]:
    write_outputs(work.outputs_uri("test"), outputs)
    found = read_outputs([work.outputs_uri("test")])
    return _end(work, "test", {
        "accuracy": found.accuracy,
        "balanced_accuracy": found.balanced_accuracy,
        "fd_ratio": fd_ratio_or_none(found.features_bf, found.label_b, work.seed),
        "fd_half_images": int(np.unique(found.label_b, return_counts=True)[1].min() // 2),
        "features": found.features_bf.shape[1],
        "predict_s": seconds,
        "images": len(found.label_b),
    })  # fmt: skip


def _end(work: Work, stage: str, facts: dict[str, Any]) -> dict[str, Any]:
    document = {"key": work.key, **facts}
    store_of(work.folder).write(join(work.folder, f"{stage}.json"), (json.dumps(document, indent=2) + "\n").encode())
    return document


def _artifacts(examples: Examples, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A side's artifacts [N, *shape], labels and rows int64 [N]."""
    reader = ArtifactReader(examples.run, examples.spec.name)

    def of_part(part: Part) -> np.ndarray:
        artifacts = to_numpy(reader.read(part.shard, part.place_n)["artifact"])
        if not np.isfinite(artifacts).all():
            raise ConfigError(NOT_FINITE)
        return artifacts

    return _gathered(examples.parts(side), of_part)


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
