"""Random partitions of rows, as shards and blocks have them."""

from __future__ import annotations

import numpy as np


def sharding(rng: np.random.Generator, count: int, parts: int | None = None) -> list[np.ndarray]:
    """Rows 0 to count - 1 in random order, in a few parts of random size; no part is empty."""
    parts = parts or int(rng.integers(1, min(count, 5) + 1))
    cuts = np.sort(rng.choice(np.arange(1, count), parts - 1, replace=False)) if parts > 1 else []
    return np.split(rng.permutation(count), cuts)
