"""Training workers without Ray, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["LoneWorker"]


class LoneWorker:
    """What a training asks of `distributed.Worker`. A test says by `columns` which rows it gets.

    Attributes:
        folder: of the only checkpoint.
        stop_after: epoch after whose checkpoint it dies.
        streamed: passes over the rows.
    """

    device = "cpu"

    def __init__(
        self, folder: Path, stop_after: int | None = None, rank: int = 0, count: int = 1, memory_bytes: int = 1 << 30
    ) -> None:
        self.folder, self.stop_after, self.streamed = folder, stop_after, 0
        self.rank, self.count, self.memory_bytes = rank, count, memory_bytes

    def columns(self) -> dict[str, np.ndarray]:
        """All rows, of all workers."""
        raise NotImplementedError

    def stream(self) -> LoneWorker:
        return self

    def iter_batches(self, batch_size: int, batch_format: str, drop_last: bool = False, **shuffle: Any) -> Any:
        self.streamed += 1
        columns = self.columns()
        own = {n: values[self.rank :: self.count][: len(values) // self.count] for n, values in columns.items()}
        for start in range(0, len(own["row"]) - (batch_size - 1 if drop_last else 0), batch_size):
            yield {name: values[start : start + batch_size] for name, values in own.items()}

    def parallel(self, network: torch.nn.Module) -> torch.nn.Module:
        return network

    def summed(self, sums: np.ndarray) -> np.ndarray:
        return sums

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None]) -> None:
        self.folder.mkdir(exist_ok=True)
        save(self.folder)
        if metrics["epoch"] == self.stop_after:
            raise InterruptedError

    @contextlib.contextmanager
    def newest_checkpoint(self) -> Iterator[Path | None]:
        yield self.folder if self.folder.exists() else None
