"""Training an attributor: Ray Train's workers against a plain loop over the same tensors in one process.

Rates are those of training steps, after a first epoch that warms both up; starting Ray is not in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from manifpt import cluster, pipeline
from manifpt.artifacts import to_numpy
from manifpt.attributor import worker
from manifpt.attributor.choice import Choice
from manifpt.attributor.examples import Examples, select_examples
from manifpt.attributor.networks import make_network
from manifpt.attributor.splits import TEST, TRAIN, VALIDATION
from manifpt.attributor.training import RECIPES, class_weights
from manifpt.config import ArtifactsConfig
from manifpt.distributed import run_workers
from manifpt.learning import autocast
from manifpt.reader import ArtifactReader
from manifpt.resources import TrainingShares
from manifpt.runs import compute_artifacts, sample_config
from tests.benchmarks.measure import median

__all__ = ["run"]

_EPOCHS = 5
_BATCH = 64


def run(rounds: int, threads: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Images a second: the released small network, on artifacts of the shipped sample."""
    artifacts = str(folder / "run")
    compute_artifacts(sample_config(ArtifactsConfig(output=artifacts)))
    examples = select_examples(artifacts, "rgb", Choice(labels={}))
    cluster.connect()
    tensors, label_n = _tensors(examples)
    contenders: dict[str, Callable[[int], float]] = {
        "plain loop, all threads": lambda _: plain(tensors, label_n, threads),
        "one worker, all threads": lambda n: ours(examples, folder / f"all-{n}", 1, threads),
        "one worker, one thread": lambda n: ours(examples, folder / f"one-{n}", 1, 1),
        f"{threads} workers, one thread each": lambda n: ours(examples, folder / f"each-{n}", threads, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rates[name].append(contenders[name](number))
    for name, found in rates.items():
        say(f"  train  {name:<30}{median(found):>9.1f} images/s")
    medians = [median(found) for found in rates.values()]
    return {
        "results": rates,
        "ratios": {"train_vs_plain": medians[1] / medians[0], "train_workers_vs_one": medians[3] / medians[2]},
    }


def _tensors(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """The training artifacts, as both sides see them."""
    reader = ArtifactReader(examples.run, examples.spec.name)
    parts = examples.parts(TRAIN)
    artifacts = [to_numpy(reader.read(part.shard, part.place_n)["artifact"]) for part in parts]
    return np.concatenate(artifacts), np.concatenate([part.label_n for part in parts])


def plain(tensors: np.ndarray, label_n: np.ndarray, threads: int) -> float:
    """What anyone would write: all in memory, shuffled indices, channels_last, the same network, optimiser and
    precision."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = make_network("released", tensors.shape[1:], int(label_n.max()) + 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    artifacts, labels = torch.from_numpy(tensors), torch.from_numpy(label_n)
    rates = []
    network.train()
    for _ in range(_EPOCHS):
        order = torch.randperm(len(labels))
        begin = time.perf_counter()
        images = 0
        for start in range(0, len(order) - _BATCH + 1, _BATCH):
            rows = order[start : start + _BATCH]
            with autocast("cpu"):
                logits_bs = network(artifacts[rows].float())
            loss = F.cross_entropy(logits_bs.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            images += len(rows)
        rates.append(images / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return median(rates[1:])


def ours(examples: Examples, folder: Path, workers: int, threads: int) -> float:
    """The same through Ray Train, its streaming, checkpoints and validation."""
    count_s = np.bincount(examples.label_n[examples.side_n == TRAIN])
    recipe = replace(RECIPES["released"], epochs=_EPOCHS, batch_size=_BATCH)
    job = worker.Job(
        output=str(folder), run=examples.run, space=examples.spec.name, shape=examples.shape, labels=examples.labels,
        train_rows=int(count_s.sum()), validation=examples.parts(VALIDATION), test=examples.parts(TEST),
        network="released", recipe=recipe, weights=None, seed=0,
        weight_s=class_weights(examples.label_n, len(examples.labels), recipe.balanced),
    )  # fmt: skip
    shares = TrainingShares(workers, 0.5, threads, 0.5, False)
    rows = pipeline.artifact_rows({job.run: examples.parts(TRAIN)}, job.space, shares.task_cpus)
    run_workers(worker.train, job, job.output, shares, rows)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return median([json.loads(line)["images_per_s"] for line in lines[1:]])
