"""Training rows as they reach a worker: streamed by Ray Data, to each worker an equal share.

A share that fits in a quarter of a worker's memory is kept after the first pass, and shuffled anew for each epoch; a
larger one is streamed again for each epoch, and shuffled in a buffer of that size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from manifpt.distributed import Worker

__all__ = ["KEPT_PART", "StreamedRows", "shuffled"]

KEPT_PART = 0.25  # of a worker's memory
_BLOCK_ROWS = 1024
_RANKS = 1_000_003  # apart from each other in the seeds


def shuffled(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Row numbers int64 [batch_size], in an order that follows from seed and epoch.

    All batches are of one size, since batch normalisation can't take a single row.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


class StreamedRows:
    """One worker's share of the rows of `Worker.stream`, which have a column `row`: their number."""

    def __init__(self, worker: Worker, columns: Sequence[str], row_bytes: int, count: int, seed: int) -> None:
        """Makes the first pass, if the share can be kept.

        Args:
            worker: it.
            columns: to read.
            row_bytes: of one row in memory.
            count: of rows in the share; rows that the stream has beyond are left out, and it may have fewer.
            seed: of all workers' orders.
        """
        self._stream, self._columns = worker.stream(), (*columns, "row")
        self._seed = seed * _RANKS + worker.rank
        self._count = count
        self._buffer_rows = max(_BLOCK_ROWS, int(KEPT_PART * worker.memory_bytes / row_bytes))
        self._kept: dict[str, np.ndarray] | None = None
        # All or none, where some have less memory: a stream waits until every worker asks for it again.
        if worker.summed(np.array([count <= self._buffer_rows], np.float64))[0] == worker.count:
            self._kept = self._gathered()
            # They come in any order, and the seed's must follow from what there is.
            self._order_n = np.argsort(self._kept["row"]) if self._kept else np.empty(0, np.int64)

    def _gathered(self) -> dict[str, np.ndarray]:
        """The share, once in memory: {} of none."""
        kept: dict[str, np.ndarray] = {}
        done = 0
        for block in self._blocks(_BLOCK_ROWS):
            count = min(len(block["row"]), self._count - done)
            for name in self._columns:
                if name not in kept:
                    kept[name] = np.empty((self._count, *block[name].shape[1:]), block[name].dtype)
                kept[name][done : done + count] = block[name][:count]
            done += count
        return {name: values[:done] for name, values in kept.items()}

    def _blocks(self, rows: int) -> Iterator[dict[str, np.ndarray]]:
        found: Iterator[dict[str, np.ndarray]] = self._stream.iter_batches(  # type: ignore[assignment]
            batch_size=rows, batch_format="numpy"
        )
        yield from found

    @property
    def kept(self) -> int | None:
        """Rows of the share, if it is kept."""
        return None if self._kept is None else len(next(iter(self._kept.values()), ()))

    def all(self, *columns: str, rows: int = _BLOCK_ROWS) -> Iterator[tuple[np.ndarray, ...]]:
        """Every row's values once, in blocks of so many rows."""
        if self._kept is not None:
            for start in range(0, self.kept or 0, rows):
                row_n = self._order_n[start : start + rows]
                yield tuple(self._kept[name][row_n] for name in columns)
        else:
            yield from (tuple(block[name] for name in columns) for block in self._blocks(rows))

    def epoch(self, number: int, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Shuffled batches of the columns and `row`, as many on each worker."""
        if self._kept is not None:
            for row_b in shuffled(self.kept or 0, batch_size, self._seed, number):
                yield tuple(self._kept[name][self._order_n[row_b]] for name in self._columns)
            return
        streamed: Any = self._stream.iter_batches(
            batch_size=batch_size, batch_format="numpy", drop_last=True,
            local_shuffle_buffer_size=self._buffer_rows, local_shuffle_seed=self._seed + number,
        )  # fmt: skip
        for batch in itertools.islice(streamed, self._count // batch_size):
            yield tuple(batch[name] for name in self._columns)
