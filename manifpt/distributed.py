"""Workers that train together: the only module that imports `ray.train`.

A worker function asks here who it is, shares sums, leaves checkpoints and finds the newest one. What the user has to
know (a `ConfigError` in a worker) ends all workers at once: Ray Train would try again what can't succeed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from torch import nn

from manifpt.cluster import environment
from manifpt.errors import ConfigError, TooManyRejected, WorkerError
from manifpt.resources import TrainingShares, memory_bytes, network_env
from manifpt.storage import join, store_of

if TYPE_CHECKING:
    import ray.data

__all__ = ["Worker", "run_workers", "told_in"]

logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # its errors reach us as exceptions

_MAX_FAILURES = 16


@dataclass(frozen=True, slots=True)
class Worker:
    """One process among those that train together.

    Attributes:
        rank: 0 to `count` - 1.
        count: of all workers.
        device: `cpu` or `cuda:N`.
        memory_bytes: of its node, divided among the node's workers.
    """

    rank: int
    count: int
    device: str
    memory_bytes: int

    def stream(self) -> ray.data.DataIterator:
        """Its equal share of the training rows."""
        return ray.train.get_dataset_shard("train")

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, with gradients shared over all workers. Buffers start as the first worker's, and are then each
        worker's own: to send them at every step costs two workers of a small network a fourteenth."""
        return ray.train.torch.prepare_model(network, parallel_strategy_kwargs={"forward_sync_buffers": False})

    def summed(self, sums: np.ndarray) -> np.ndarray:
        """float64, the sum over all workers."""
        if self.count == 1:
            return sums
        device = self.device if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(sums, dtype=torch.float64, device=device)  # a copy: all_reduce writes into what it gets
        torch.distributed.all_reduce(total)
        return total.cpu().numpy()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, through which gradients pass.

        Going back, every worker's gradient is the sum of all workers': of `count` equal losses, as if they were added.
        `parallel` then takes the mean over workers, and what is left is the gradient of one.
        """
        if self.count == 1:
            return value
        found: torch.Tensor = _Total.apply(value)
        return found

    def report(self, metrics: Mapping[str, Any], save: Callable[[Path], None]) -> None:
        """Leaves a checkpoint; all workers call it, and the first one saves."""
        with tempfile.TemporaryDirectory(prefix="manifpt-checkpoint-") as folder:
            checkpoint = None
            if self.rank == 0:
                save(Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(dict(metrics), checkpoint=checkpoint)

    @contextlib.contextmanager
    def newest_checkpoint(self) -> Iterator[Path | None]:
        """The folder of the newest checkpoint, of this call or of one that was killed."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)


class _Total(torch.autograd.Function):
    """PyTorch's own differentiable sum is deprecated, and what replaces it is private."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(value: torch.Tensor) -> torch.Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def run_workers(
    work: Callable[[Worker, Any], None],
    job: Any,
    output: str,
    shares: TrainingShares,
    train: ray.data.Dataset | None = None,
) -> None:
    """Runs a function in every worker, again from its newest checkpoint where one died.

    Args:
        work: called with the worker and the job.
        job: what all workers need to know.
        output: a folder; checkpoints lie below.
        shares: how many workers, and what each has.
        train: rows that are dealt to the workers.

    Raises:
        ConfigError, TooManyRejected: of a worker.
        WorkerError: workers died again and again.
    """
    error_uri = join(output, "errors", f"{uuid.uuid4().hex}.txt")
    resources = {"CPU": shares.worker_cpus} | ({"GPU": 1.0} if shares.gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"work": work, "job": job, "threads": shares.threads, "error_uri": error_uri,
                           "environment": environment()},
        scaling_config=ScalingConfig(num_workers=shares.workers, use_gpu=shares.gpu, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[call-arg]  # version 2's: types are those of version 1
            name="checkpoints",
            storage_path=output,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env=network_env(shares.gpu),
        ),
        datasets={"train": train} if train is not None else None,
        dataset_config=DataConfig(datasets_to_split=["train"]),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        last = str(error).strip().splitlines()
        raise WorkerError(
            f"Training workers failed {_MAX_FAILURES + 1} times; the same command goes on from the newest checkpoint. "
            f"The last error: {last[-1] if last else type(error).__name__}"
        ) from error
    told = _read(error_uri)
    if told is not None:
        kind, text = told
        raise TooManyRejected(text) if kind == TooManyRejected.__name__ else ConfigError(text)


def _work(config: dict[str, Any]) -> None:
    os.environ.update(config["environment"])
    if _read(config["error_uri"]) is not None:
        return
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    own_bytes = memory_bytes() // max(1, context.get_local_world_size())
    device = str(ray.train.torch.get_device())
    try:
        config["work"](Worker(context.get_world_rank(), context.get_world_size(), device, own_bytes), config["job"])
    except Exception as error:
        told = told_in(error)
        if told is not None:
            kind = TooManyRejected.__name__ if isinstance(error, TooManyRejected) else ConfigError.__name__
            store_of(config["error_uri"]).write(config["error_uri"], json.dumps([kind, told]).encode())
        raise


def told_in(error: Exception) -> str | None:
    """The sentence of an error that the user has to know; of a reading task's, Ray Data leaves the text only."""
    found = re.search(r"^manifpt\.errors\.(?:ConfigError|PlanMismatch): (.+)$", str(error), re.MULTILINE)
    return found[1] if found else str(error) if isinstance(error, ConfigError | TooManyRejected) else None


def _read(uri: str) -> list[str] | None:
    try:
        found: list[str] = json.loads(store_of(uri).read(uri))
        return found
    except FileNotFoundError:
        return None
