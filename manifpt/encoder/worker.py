"""What each worker of a pretraining does. Ray is behind `manifpt.distributed.Worker`.

Legend: B images of a batch.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from manifpt.distributed import Worker
from manifpt.encoder.augment import make_policy
from manifpt.encoder.loss import barlow_twins
from manifpt.encoder.network import TwinNetwork
from manifpt.encoder.normalization import globalized
from manifpt.encoder.probe import Probe, Probing, standardized
from manifpt.errors import ConfigError, TooManyRejected
from manifpt.following import json_lines, write_json_lines
from manifpt.learning import State, autocast, cosine, load_state, save_state
from manifpt.spaces import SpaceSpec
from manifpt.storage import join, store_of
from manifpt.streaming import StreamedRows
from manifpt.trained import WEIGHTS

__all__ = ["Job", "Pass", "pretrain"]

_LEARNING_RATE, _WEIGHT_DECAY, _WARM_UP = 1e-3, 1e-4, 0.1
_TELL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all workers do.

    Attributes:
        output: the encoder's folder.
        backbone, policy, epochs, batch_size, seed: as of `EncoderConfig`.
        pixels: whose view the encoder sees.
        size_px: its side.
        images: of the manifest.
        most_rejected: of them may be damaged or too small.
        probe: if there are labels.
    """

    output: str
    backbone: str
    policy: str
    epochs: int
    batch_size: int
    seed: int
    pixels: SpaceSpec
    size_px: int
    images: int
    most_rejected: int
    probe: Probe | None


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over the images showed: a line of `metrics.jsonl`.

    Attributes:
        epoch: from 1; 0 before training.
        loss: the mean of its steps.
        images: seen in it, over all workers; of epoch 0, those that can be used.
        knn_accuracy: of the probe, if there is one.
    """

    epoch: int
    loss: float | None
    images: int
    images_per_s: float
    seconds: float
    eta_s: float
    learning_rate: float
    knn_accuracy: float | None


def pretrain(worker: Worker, job: Job) -> None:
    """Trains, from the newest checkpoint on; leaves weights in the output."""
    training = _Training(worker, job)
    probe = Probing(job.probe, job.pixels, worker.device) if job.probe is not None and worker.rank == 0 else None
    with worker.newest_checkpoint() as folder:
        state = None if folder is None else load_state(folder, Pass)
    if state is None:
        history = [
            Pass(0, None, training.images, 0.0, 0.0, 0.0, 0.0, probe.accuracy(training.network) if probe else None)
        ]
    else:
        training.network.load_state_dict(state.network)
        training.optimizer.load_state_dict(state.optimizer)
        history = state.history
    told = _Told(worker, job, training.steps, history)
    while len(history) <= job.epochs:
        epoch, begin = len(history), time.perf_counter()
        loss, images = training.epoch(epoch, told)
        train_s = time.perf_counter() - begin
        accuracy = probe.accuracy(training.network) if probe else None
        seconds = time.perf_counter() - begin
        history.append(
            Pass(
                epoch, loss, images, images / train_s, seconds, (job.epochs - epoch) * seconds,
                training.optimizer.param_groups[0]["lr"], accuracy,
            )
        )  # fmt: skip
        told.all(history)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in training.network.state_dict().items()}
        done = State(weights, training.optimizer.state_dict(), weights, history)
        worker.report({"epoch": epoch}, functools.partial(save_state, done))
    if worker.rank == 0:
        backbone = training.network.backbone.state_dict()
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in backbone.items()})
        store_of(job.output).write(join(job.output, WEIGHTS), data)


class _Training:
    """The network, its optimiser and its images; one pass of all three."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self._worker, self._job = worker, job
        torch.manual_seed(job.seed)  # the same weights on every worker
        network = TwinNetwork(job.backbone, job.size_px)
        if worker.count > 1 and worker.device.startswith("cuda"):
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        elif worker.count > 1:
            globalized(network, worker.total)
        self.network = network.to(worker.device).to(memory_format=torch.channels_last)
        self._parallel, self.optimizer = worker.parallel(self.network), _optimizer(self.network)
        self._size = job.batch_size // worker.count
        count = job.images // worker.count
        self._rows = StreamedRows(worker, ("view",), 3 * job.size_px**2, count, job.seed)
        kept = count if self._rows.kept is None else self._rows.kept
        self.images, self.steps = kept * worker.count, kept // self._size
        self._check(self.images)
        self._policy = make_policy(job.policy, job.size_px)

    def epoch(self, number: int, told: _Told) -> tuple[float, int]:
        """One pass. Returns the mean loss and the images seen, over all workers."""
        losses, all_steps = [], self._job.epochs * self.steps
        self.network.train()
        for step, (one_bchw, other_bchw) in enumerate(self._pairs(number)):
            done = ((number - 1) * self.steps + step) / all_steps
            for group in self.optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * cosine(min(done, 1.0), _WARM_UP, 1 / all_steps)
            with autocast(self._worker.device):
                one_bd, other_bd = self._parallel(one_bchw, other_bchw)
            loss = barlow_twins(one_bd.float(), other_bd.float(), self._worker.total)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            told.step(number, step + 1, losses)
        if len(losses) < self.steps:  # of a share that is too large to be counted before
            self._check((len(losses) + 1) * self._size * self._worker.count)
        mean = float(torch.stack(losses).mean()) if losses else math.nan
        if not math.isfinite(mean):
            raise ConfigError(f"The loss is {mean} in epoch {number}; choose a larger --batch-size.")
        return mean, len(losses) * self._size * self._worker.count

    def _check(self, images: int) -> None:
        """Whether so many are enough. Equal shares leave out as many as there are workers, but for one."""
        rejected = self._job.images - images - (self._worker.count - 1)
        if rejected > self._job.most_rejected or images < self._job.batch_size:
            kind = TooManyRejected if rejected > self._job.most_rejected else ConfigError
            raise kind(
                f"{images} of {self._job.images} images can be used: the others are damaged, or not of "
                f"{self._job.size_px} px. Correct them or --size-px, or allow it: --max-rejected, and a --batch-size "
                f"of {images} or less."
            )

    def _pairs(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Two views of each image of each batch, standardised; the same after a resume."""
        for step, (views_bchw, _) in enumerate(self._rows.epoch(epoch, self._size)):
            images_bchw = torch.from_numpy(np.array(views_bchw)).to(self._worker.device, non_blocking=True)
            sequence = np.random.SeedSequence([self._job.seed, self._worker.rank, epoch, step])
            one_bchw, other_bchw = self._policy(images_bchw, int(sequence.generate_state(1)[0]))
            yield standardized(one_bchw, self._job.pixels), standardized(other_bchw, self._job.pixels)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """AdamW; normalisations and biases don't decay. (The released code's LARS is for batches of 2,048.)"""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, _LEARNING_RATE)


class _Told:
    """`metrics.jsonl`: a line a pass, and within long passes one every half minute."""

    def __init__(self, worker: Worker, job: Job, steps: int, history: Sequence[Pass]) -> None:
        self._uri = join(job.output, "metrics.jsonl")
        self._is_first, self._images = worker.rank == 0, job.batch_size // worker.count * worker.count
        self._all, self._steps = steps * job.epochs, steps
        passes = [line for line in json_lines(self._uri) if line["epoch"] < len(history)] if self._is_first else []
        self._lines = passes or [asdict(history[0])]
        self._begin = self._last = time.monotonic()
        self._first: int | None = None
        self._write()

    def step(self, epoch: int, step: int, losses: Sequence[torch.Tensor]) -> None:
        """After each step."""
        done = (epoch - 1) * self._steps + step
        self._first = done - 1 if self._first is None else self._first
        now = time.monotonic()
        if not self._is_first or now - self._last < _TELL_S or step >= self._steps:
            return
        self._last = now
        step_s = (now - self._begin) / (done - self._first)
        loss = float(torch.stack(list(losses[-50:])).mean())
        self._lines.append({"epoch": epoch, "step": step, "steps": self._steps, "loss": loss,
                            "images_per_s": self._images / step_s,
                            "eta_s": round((self._all - done) * step_s)})  # fmt: skip
        self._write()

    def all(self, history: Sequence[Pass]) -> None:
        """After each pass."""
        self._lines.append(asdict(history[-1]))
        self._write()

    def _write(self) -> None:
        if self._is_first:
            write_json_lines(self._uri, self._lines)
