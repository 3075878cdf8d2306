"""What each worker of a training does with its artifacts. Ray is behind `manifpt.distributed.Worker`.

Legend: N artifacts of a worker's share.

Training artifacts are streamed to the workers by Ray Data: see `manifpt.streaming`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors.torch import save

from manifpt.artifacts import to_numpy
from manifpt.attributor.examples import Part
from manifpt.attributor.features import STATISTICS, feature_statistics
from manifpt.attributor.networks import AttributorNetwork, make_network, start_from
from manifpt.attributor.outputs import write_outputs
from manifpt.attributor.spectrum import spectrum_size
from manifpt.attributor.training import (
    NOT_FINITE,
    Batch,
    Epoch,
    Recipe,
    Trainer,
    fit,
    mean_and_std,
    outputs_of,
    rows_at_once,
)
from manifpt.distributed import Worker
from manifpt.errors import ConfigError
from manifpt.following import write_json_lines
from manifpt.learning import State, load_state, save_state
from manifpt.reader import ArtifactReader
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of
from manifpt.streaming import KEPT_PART, StreamedRows

__all__ = ["Job", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all workers do.

    Attributes:
        output: the training's folder.
        run, space, shape, labels: of the artifacts.
        train_rows: training artifacts, of all workers.
        validation, test: which artifacts these are.
        network, recipe, weight_s: what is trained.
        weights: of a network space whose weights to start from.
        seed: of weights and order.
    """

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


def train(worker: Worker, job: Job) -> None:
    """Trains, from the newest checkpoint on; leaves `network.safetensors`, `features.safetensors` and
    `predictions/` in the output."""
    torch.manual_seed(job.seed)  # the same weights on every worker
    network = make_network(job.network, job.shape, len(job.labels))
    if job.weights is not None:
        start_from(network, job.weights)
    count = job.train_rows // worker.count
    rows = StreamedRows(worker, ("artifact", "label"), 4 * math.prod(job.shape), count, job.seed)
    network.standardize(*_mean_and_std(worker, job, rows))
    size = min(max(2, job.recipe.batch_size // worker.count), count)
    trainer = Trainer(network, job.recipe, job.weight_s, count // size, worker.device, worker.parallel, worker.summed)
    reader = ArtifactReader(job.run, job.space, torch.get_num_threads(), worker.device.partition(":")[0])
    validation = _Held(worker, reader, job.validation[worker.rank :: worker.count])
    with worker.newest_checkpoint() as folder:
        state = None if folder is None else load_state(folder, Epoch)

    def on_epoch(state: State) -> None:
        if worker.rank == 0:
            write_json_lines(join(job.output, "metrics.jsonl"), [asdict(epoch) for epoch in state.history])
        worker.report(asdict(state.history[-1]), lambda folder: save_state(state, folder))

    def batches(epoch: int) -> Iterable[Batch]:
        # Dropout differs from worker to worker, and is the same after a resume.
        torch.manual_seed(int(np.random.SeedSequence([job.seed, worker.rank, epoch]).generate_state(1, np.uint64)[0]))
        return (_tensors(*batch) for batch in rows.epoch(epoch, size))

    state = fit(trainer, batches, validation.batches, state, on_epoch)
    if worker.rank == 0:
        data = save({name: tensor.contiguous() for name, tensor in state.best.items()})
        store_of(job.output).write(join(job.output, "network.safetensors"), data)
    _write_statistics(worker, job, trainer.network, rows)
    test = _Held(worker, reader, job.test[worker.rank :: worker.count])
    for side, held in (("validation", validation), ("test", test)):
        outputs = list(outputs_of(network, held.batches(), worker.device))
        if outputs:  # there may be more workers than parts
            name = f"{side}-{worker.rank:05d}-of-{worker.count:05d}.parquet"
            write_outputs(join(job.output, "predictions", name), outputs)


def _mean_and_std(worker: Worker, job: Job, rows: StreamedRows) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = (block for (block,) in rows.all("artifact", rows=rows_at_once(job.shape)))
    return mean_and_std(blocks, job.shape, worker.summed)


def _write_statistics(worker: Worker, job: Job, network: AttributorNetwork, rows: StreamedRows) -> None:
    """What the training artifacts look like to the trained network; every worker adds its share."""
    batches = (_tensors(*block) for block in rows.all("artifact", "label", "row", rows=rows_at_once(job.shape)))
    blocks = outputs_of(network, batches, worker.device)
    sizes = (len(job.labels), network.classifier.in_features, spectrum_size(job.shape))
    statistics = feature_statistics(blocks, *sizes, worker.summed)
    if worker.rank == 0:
        store_of(job.output).write(join(job.output, STATISTICS), statistics.to_bytes())


def _tensors(artifacts: np.ndarray, label_b: np.ndarray, row_b: np.ndarray) -> Batch:
    """Copies: what Ray Data and Arrow hand out can't be written, of which torch warns."""
    return tuple(torch.from_numpy(np.array(values)) for values in (artifacts, label_b, row_b))  # type: ignore[return-value]


class _Held:
    """Artifacts of some parts, read by this worker, and kept if they take no more than half of what training may."""

    def __init__(self, worker: Worker, reader: ArtifactReader, parts: Sequence[Part]) -> None:
        self._reader, self._parts = reader, parts
        self._limit_bytes = KEPT_PART * worker.memory_bytes / 2
        self._kept: list[tuple[np.ndarray, Part]] | None = None

    def batches(self) -> Iterator[Batch]:
        """In the order of the shards."""
        for artifacts, part in self._kept if self._kept is not None else self._read():
            size = rows_at_once(artifacts.shape[1:])
            for start in range(0, len(part.row_n), size):
                block = slice(start, start + size)
                yield _tensors(artifacts[block], part.label_n[block], part.row_n[block])

    def _read(self) -> Iterator[tuple[np.ndarray, Part]]:
        kept, held_bytes = [], 0
        for part in self._parts:
            artifacts = to_numpy(self._reader.read(part.shard, part.place_n)["artifact"])
            if not np.isfinite(artifacts).all():
                raise ConfigError(NOT_FINITE)
            held_bytes += artifacts.nbytes
            if held_bytes <= self._limit_bytes:
                kept.append((artifacts, part))
            yield artifacts, part
        if held_bytes <= self._limit_bytes:
            self._kept = kept
