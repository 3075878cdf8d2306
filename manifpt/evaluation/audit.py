"""The codec audit of a run's images: what their files say before a pixel is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from manifpt.attributor.examples import Examples
from manifpt.errors import BadImage
from manifpt.fetch import fetch
from manifpt.metrics.codec import audit, container_facts

__all__ = ["audit_codecs"]

_IMAGES = 200  # of a label, evenly over its rows: headers of a sample say what all of a source went through


def audit_codecs(examples: Examples, equalized: bool) -> dict[str, Any]:
    """The audit, as JSON; with the kept column `went_through_jpeg` where the shards have it."""
    row_n = np.concatenate([_spread(np.flatnonzero(examples.label_n == n)) for n in range(len(examples.labels))])
    table = examples.table.take(pa.array(row_n))
    records = table.select(["uri", "container", "offset", "size_bytes"]).to_pylist()
    facts = [
        container_facts(data) if not isinstance(data, BadImage) else {"format": "unreadable"} for data in fetch(records)
    ]
    extra = {name: table[name].to_pylist() for name in ("went_through_jpeg",) if name in table.column_names}
    found = audit(facts, examples.label_n[row_n], extra, examples.labels, seed=0)
    return {
        "accuracy": found.accuracy,
        "chance": found.chance,
        "separable": found.separable,
        "why": found.why,
        "equalized": equalized,
    }


def _spread(row_n: np.ndarray) -> np.ndarray:
    return row_n[np.linspace(0, len(row_n) - 1, min(_IMAGES, len(row_n))).astype(int)]
