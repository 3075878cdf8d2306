"""Training over workers: the only module that imports `ray.train`.

Legend: N artifacts of a worker's share, S labels.

Training artifacts are streamed to the workers by Ray Data, to each an equal share. A share that fits in a quarter of a
worker's memory is kept after the first pass, and shuffled anew for each epoch; a larger one is streamed again for each
epoch, its shards in a new order, and shuffled in a buffer of that size.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig

from manifpt import pipeline
from manifpt.artifacts import tensor_column, to_numpy
from manifpt.attributor.checkpoint import load_state, save_state
from manifpt.attributor.examples import Part
from manifpt.attributor.networks import AttributorNetwork, make_network
from manifpt.attributor.training import Batch, Recipe, State, Trainer, fit, from_arrays, outputs_of
from manifpt.errors import ConfigError, WorkerError
from manifpt.reader import ArtifactReader
from manifpt.resources import TrainingShares
from manifpt.spaces import SpaceSpec
from manifpt.spaces.weights import load_state as load_weights
from manifpt.storage import join, store_of

__all__ = ["Job", "run_training"]

logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # its errors reach us as exceptions

_MAX_FAILURES = 16
_KEPT_PART = 0.25  # of a worker's memory
_EVALUATION_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all workers do.

    Attributes:
        attempt: a name of this call.
        output: the training's folder.
        run, space, shape, labels: of the artifacts.
        train_rows: training artifacts.
        validation, test: which artifacts these are.
        network, recipe, weight_s: what is trained.
        weights: of a network space whose weights to start from.
        seed: of weights and order.
        shares: how it is spread.
    """

    attempt: str
    output: str
    run: str
    space: str
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    train_rows: int
    validation: Sequence[Part]
    test: Sequence[Part]
    network: str
    recipe: Recipe
    weight_s: torch.Tensor
    weights: SpaceSpec | None
    seed: int
    shares: TrainingShares


def run_training(job: Job, train: Sequence[Part]) -> None:
    """Trains, or goes on from the newest checkpoint; leaves `network.safetensors` and `predictions/` in the output.

    Raises:
        ConfigError: what a worker found in the artifacts.
        WorkerError: the workers died again and again.
    """
    shares = job.shares
    resources = {"CPU": shares.worker_cpus} | ({"GPU": 1.0} if shares.gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": job, "s3": pipeline.environment()},
        scaling_config=ScalingConfig(num_workers=shares.workers, use_gpu=shares.gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=job.output,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": pipeline.artifact_rows(job.run, job.space, train, shares.task_cpus)},
        dataset_config=DataConfig(datasets_to_split=["train"]),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        last = str(error).strip().splitlines()
        raise WorkerError(
            f"Training workers failed {_MAX_FAILURES + 1} times; the same command goes on from the newest checkpoint. "
            f"The last error: {last[-1] if last else type(error).__name__}"
        ) from error
    told = _told_by_worker(job)
    if told is not None:
        raise ConfigError(told)


def _work(config: dict[str, Any]) -> None:
    """One worker. What the user has to know is left as a file: Ray Train would try again what can't succeed."""
    job: Job = config["job"]
    os.environ.update(config["s3"])
    if _told_by_worker(job) is not None:
        return
    try:
        _train(job)
    except ConfigError as error:
        store_of(job.output).write(_error_uri(job), str(error).encode())
        raise


def _error_uri(job: Job) -> str:
    return join(job.output, "errors", f"{job.attempt}.txt")


def _told_by_worker(job: Job) -> str | None:
    try:
        return store_of(job.output).read(_error_uri(job)).decode()
    except FileNotFoundError:
        return None


def _train(job: Job) -> None:
    workers = job.shares.workers
    torch.set_num_threads(job.shares.threads)
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), str(ray.train.torch.get_device())
    torch.manual_seed(job.seed)  # the same weights on every worker
    network = make_network(job.network, job.shape, len(job.labels))
    if job.weights is not None:
        start = {name: t for name, t in load_weights(job.weights).items() if not name.startswith("fc.")}
        network.body.load_state_dict(start)
    torch.manual_seed(job.seed * 1_000_003 + rank)  # dropout differs
    rows = _Rows(job, rank)
    network.standardize(*_mean_and_std(rows.all(), job.shape))
    batch_size = max(2, job.recipe.batch_size // workers)
    size = min(batch_size, rows.count)
    trainer = Trainer(network, job.recipe, job.weight_s, rows.count // size, device,
                      ray.train.torch.prepare_model, _summed)  # fmt: skip
    reader = ArtifactReader(job.run, job.space, job.shares.threads, "cuda" if job.shares.gpu else "cpu")
    validation = _Held(reader, job.validation[rank::workers])

    def on_epoch(state: State) -> None:
        if rank == 0:
            store_of(job.output).write(join(job.output, "metrics.jsonl"), _lines(state).encode())
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                save_state(state, Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(asdict(state.history[-1]), checkpoint=checkpoint)

    state = fit(trainer, lambda epoch: rows.epoch(epoch, size), validation.batches, _resumed(), on_epoch)
    if rank == 0:
        _write_tensors(job.output, state)
    test = _Held(reader, job.test[rank::workers])
    for side, held in (("validation", validation), ("test", test)):
        _write_predictions(job.output, f"{side}-{rank:05d}", network, held.batches(), device)


def _resumed() -> State | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return load_state(Path(folder))


def _lines(state: State) -> str:
    return "".join(json.dumps({k: _rounded(v) for k, v in asdict(epoch).items()}) + "\n" for epoch in state.history)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _write_tensors(output: str, state: State) -> None:
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in state.best.items()})
    store_of(output).write(join(output, "network.safetensors"), data)


def _write_predictions(
    output: str, name: str, network: AttributorNetwork, batches: Iterable[Batch], device: str
) -> None:
    """Rows, logits and features of one worker's share of a side."""
    found = list(outputs_of(network, batches, device))
    if not found:
        return  # more workers than parts
    row_n, logits_ns, features_nf = (
        np.concatenate([getattr(batch, name) for batch in found]) for name in ("row_b", "logits_bs", "features_bf")
    )
    table = pa.table({"row": row_n, "logits": tensor_column(logits_ns), "features": tensor_column(features_nf)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store_of(output).write(join(output, "predictions", f"{name}.parquet"), sink.getvalue().to_pybytes())


def _summed(sums: np.ndarray) -> np.ndarray:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return sums
    device = ray.train.torch.get_device() if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.from_numpy(np.asarray(sums, np.float64)).to(device)
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()


def _mean_and_std(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every coordinate over all workers' training artifacts, float [shape] both.

    Raises:
        ConfigError: an artifact holds a number that is not finite.
    """
    sums = np.zeros((3, *shape))
    for block in blocks:
        sums[0] += len(block)
        sums[1] += block.sum(axis=0, dtype=np.float64)
        sums[2] += np.square(block, dtype=np.float64).sum(axis=0)
    count, total, squares = _summed(sums)
    if not np.isfinite(squares).all():
        raise ConfigError("Artifacts hold numbers that are not finite: compute them again.")
    mean = total / np.maximum(count, 1)
    variance = np.maximum(squares / np.maximum(count, 1) - mean**2, 0)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.sqrt(variance)).float()


class _Rows:
    """One worker's share of the training artifacts."""

    def __init__(self, job: Job, rank: int) -> None:
        self._shard = ray.train.get_dataset_shard("train")
        self._seed = job.seed * 1_000_003 + rank
        self.count = job.train_rows // job.shares.workers  # equal shares: what is left over is left out
        row_bytes = 4 * int(np.prod(job.shape))
        budget_bytes = _KEPT_PART * _memory_bytes() / max(1, ray.train.get_context().get_local_world_size())
        self._buffer_rows = max(1024, int(budget_bytes / row_bytes))
        self._kept: tuple[np.ndarray, np.ndarray] | None = None
        if self.count <= self._buffer_rows:
            blocks = [(block["artifact"], block["label"]) for block in self._blocks()]
            artifacts, labels = (np.concatenate(list(part)) for part in zip(*blocks, strict=True))
            self._kept = artifacts, labels
            self.count = len(labels)

    def _blocks(self) -> Iterator[dict[str, np.ndarray]]:
        yield from self._shard.iter_batches(batch_size=1024, batch_format="numpy")

    def all(self) -> Iterator[np.ndarray]:
        """Every artifact once, [M, *shape]."""
        if self._kept is not None:
            yield from (self._kept[0][start : start + 1024] for start in range(0, len(self._kept[0]), 1024))
        else:
            yield from (block["artifact"] for block in self._blocks())

    def epoch(self, number: int, batch_size: int) -> Iterable[Batch]:
        """Shuffled batches, as many on each worker."""
        if self._kept is not None:
            return from_arrays(*self._kept, batch_size, self._seed)(number)
        streamed = self._shard.iter_batches(
            batch_size=batch_size, batch_format="numpy", drop_last=True,
            local_shuffle_buffer_size=self._buffer_rows, local_shuffle_seed=self._seed + number,
        )  # fmt: skip
        batches = (tuple(torch.from_numpy(np.array(b[key])) for key in ("artifact", "label", "row")) for b in streamed)
        return itertools.islice(batches, self.count // batch_size)  # type: ignore[arg-type]


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Held:
    """Artifacts of some parts, read by this worker, and kept if they take no more than a training share may."""

    def __init__(self, reader: ArtifactReader, parts: Sequence[Part]) -> None:
        self._reader, self._parts = reader, parts
        self._kept: list[tuple[np.ndarray, Part]] | None = None

    def batches(self) -> Iterator[Batch]:
        """In the order of the shards."""
        kept = self._kept
        for artifacts, part in kept if kept is not None else self._read():
            for start in range(0, len(part.row_n), _EVALUATION_BATCH):
                block = slice(start, start + _EVALUATION_BATCH)
                found = (artifacts[block], part.label_n[block], part.row_n[block])
                yield tuple(torch.from_numpy(np.array(values)) for values in found)  # type: ignore[misc]

    def _read(self) -> Iterator[tuple[np.ndarray, Part]]:
        limit_bytes = _KEPT_PART * _memory_bytes() / max(1, ray.train.get_context().get_local_world_size()) / 2
        kept, held_bytes = [], 0
        for part in self._parts:
            artifacts = to_numpy(self._reader.read(part.shard, part.place_n)["artifact"])
            if held_bytes <= limit_bytes:
                held_bytes += artifacts.nbytes
                kept.append((artifacts, part))
            yield artifacts, part
        if held_bytes <= limit_bytes:
            self._kept = kept
