"""The work of an evaluation, one task a function: fit a method, and read the test images with it. Knows no Ray.

Legend: N images, S labels, F features.

Every task leaves its result in a folder of its own, `fit.json` or `test.json` last, and finds it there when it is
called again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from manifpt.artifacts import to_numpy
from manifpt.attributor.examples import Examples, Part
from manifpt.attributor.networks import AttributorNetwork, make_network, start_from
from manifpt.attributor.outputs import Outputs, read_outputs, write_outputs
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.training import (
    NOT_FINITE,
    Batch,
    Diverged,
    Recipe,
    Trainer,
    class_weights,
    fit,
    from_arrays,
    mean_and_std,
    outputs_of,
    rows_at_once,
)
from manifpt.errors import ConfigError
from manifpt.learning import State
from manifpt.metrics.frechet import fd_ratio_or_none
from manifpt.reader import ArtifactReader
from manifpt.resources import memory_bytes
from manifpt.spaces import SpaceSpec, View
from manifpt.storage import join, store_of

__all__ = [
    "Work",
    "artifacts_of",
    "batches_of",
    "end_stage",
    "end_test",
    "fit_attributor",
    "gathered",
    "outputs_uri",
    "refuse_large",
    "test_attributor",
    "trained_network",
]

# What a fit fills of a GPU. A small network leaves most of one idle; hand-crafted features make no use of it.
_GPUS = {"small": 0.25, "released": 0.25, "head": 0.25} | dict.fromkeys(
    ("mccloskey18", "durall20", "dzanic20", "marra19"), 0.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One method at one seed.

    Attributes:
        folder: of the result.
        key: what decides the result, for people who look into the folder.
        name: of the network or baseline.
        train, validation, test: rows; those of `test` may be of another run.
        recipe, start: of an attributor; see `Candidate`.
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
    start: SpaceSpec | None = None
    view: View | None = None
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    @property
    def gpus(self) -> float:
        """What it fills of one, where there is one."""
        return _GPUS.get(self.name, 1.0)

    @property
    def memory_bytes(self) -> int:
        """What it takes at most: its artifacts or pixels, twice while their parts are put together."""
        others = 0 if self.test_examples is self.examples else len(self.test_examples.label_n)
        images = len(self.examples.label_n) + others
        if self.view is not None:
            return 2 * images * 3 * (self.view.height_px or 0) * (self.view.width_px or 0)
        return 2 * np.dtype(self.examples.dtype).itemsize * images * int(np.prod(self.examples.shape))

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
    refuse_large(work)
    artifacts, label_n, _ = artifacts_of(examples, TRAIN)
    size = min(recipe.batch_size, len(label_n))
    blocks = (block.numpy() for block, _, _ in batches_of(artifacts, label_n, label_n))
    moments = mean_and_std(blocks, examples.shape)
    weight_s = class_weights(label_n, len(examples.labels), recipe.balanced)
    validation = artifacts_of(examples, VALIDATION)

    def trained(slower: float) -> tuple[AttributorNetwork, State]:
        torch.manual_seed(work.seed)
        network = make_network(work.name, examples.shape, len(examples.labels))
        if work.start is not None:
            start_from(network, work.start)
        network.standardize(*moments)
        at_rate = replace(recipe, learning_rate=slower * recipe.learning_rate)
        trainer = Trainer(network, at_rate, weight_s, len(label_n) // size, work.device)
        batches = from_arrays(artifacts, label_n, size, work.seed)
        return network, fit(trainer, batches, lambda: batches_of(*validation))

    begin = time.perf_counter()
    notes = ["from scratch"] if work.name == "resnet50" and work.start is None else []
    try:
        network, state = trained(1.0)
    except Diverged:  # one of many fits must not end an evaluation for good
        network, state = trained(0.1)
        notes.append("diverged; trained again at a tenth of the learning rate")
    seconds = time.perf_counter() - begin
    outputs = list(outputs_of(network, batches_of(*validation), work.device))
    write_outputs(work.outputs_uri("validation"), outputs)
    store = store_of(work.folder)
    store.write(join(work.folder, "model.safetensors"), save({k: v.contiguous() for k, v in state.best.items()}))
    return end_stage(work, "fit", {
        "validation_accuracy": max(epoch.validation_accuracy for epoch in state.history),
        "epochs": len(state.history),
        "train_s": seconds,
        "images_per_s": float(np.median([epoch.images_per_s for epoch in state.history])),
        "parameters": sum(p.numel() for p in network.parameters()),
        "notes": notes,
    })  # fmt: skip


def refuse_large(work: Work) -> None:
    """An evaluation keeps a method's images in memory.

    Raises:
        ConfigError: half of this machine's would not hold them.
    """
    if work.memory_bytes > memory_bytes() // 2:
        raise ConfigError(
            f"{work.name} takes {work.memory_bytes / 2**30:.0f} GiB for {len(work.examples.label_n):,} images of "
            f"{work.examples.run} here: lower --most-images, or use train_attributor, which streams, and give its "
            f"bundle to --attributor."
        )


def test_attributor(work: Work) -> dict[str, Any]:
    """Reads the test images with a network that `fit_attributor` trained."""
    done = work.done("test")
    if done is not None:
        return done
    torch.set_num_threads(work.threads)
    network = trained_network(work)
    test = artifacts_of(work.test_examples, TEST)
    begin = time.perf_counter()
    outputs = list(outputs_of(network, batches_of(*test), work.device))
    return end_test(work, outputs, time.perf_counter() - begin)


def trained_network(work: Work) -> AttributorNetwork:
    """What `fit_attributor` trained, on the work's device."""
    network = make_network(work.name, work.examples.shape, len(work.examples.labels)).to(work.device)
    network.load_state_dict(load(store_of(work.folder).read(join(work.folder, "model.safetensors"))))
    return network


def end_test(work: Work, outputs: list[Outputs], seconds: float) -> dict[str, Any]:
    """Writes what a method said of the test images, and what that is worth: the end of the stage `test`."""
    write_outputs(work.outputs_uri("test"), outputs)
    found = read_outputs([work.outputs_uri("test")])
    return end_stage(work, "test", {
        "accuracy": found.accuracy,
        "balanced_accuracy": found.balanced_accuracy,
        "fd_ratio": fd_ratio_or_none(found.features_bf, found.label_b, work.seed),
        "fd_half_images": int(np.unique(found.label_b, return_counts=True)[1].min() // 2),
        "features": found.features_bf.shape[1],
        "predict_s": seconds,
        "images": len(found.label_b),
    })  # fmt: skip


def end_stage(work: Work, stage: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes what a stage found, which ends it; see `Work.done`."""
    document = {"key": work.key, **facts}
    store_of(work.folder).write(join(work.folder, f"{stage}.json"), (json.dumps(document, indent=2) + "\n").encode())
    return document


def artifacts_of(examples: Examples, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A side's artifacts [N, *shape], labels and rows int64 [N]."""
    reader = ArtifactReader(examples.run, examples.spec.name)

    def of_part(part: Part) -> np.ndarray:
        artifacts = to_numpy(reader.read(part.shard, part.place_n)["artifact"])
        if not np.isfinite(artifacts).all():
            raise ConfigError(NOT_FINITE)
        return artifacts

    return gathered(examples.parts(side), of_part)


def gathered(parts: list[Part], of_part: Callable[[Part], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a function reads of each part, [N, ...], with labels and rows int64 [N]."""
    return (
        np.concatenate([of_part(part) for part in parts]),
        np.concatenate([part.label_n for part in parts]),
        np.concatenate([part.row_n for part in parts]),
    )


def batches_of(artifacts: np.ndarray, label_n: np.ndarray, row_n: np.ndarray) -> Iterator[Batch]:
    """What `artifacts_of` returns, as batches."""
    size = rows_at_once(artifacts.shape[1:])
    for start in range(0, len(label_n), size):
        block = slice(start, start + size)
        yield torch.from_numpy(artifacts[block]), torch.from_numpy(label_n[block]), torch.from_numpy(row_n[block])
