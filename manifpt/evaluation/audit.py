"""The codec audit of a run's images: what their files say before a pixel is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from manifpt.attributor.examples import Examples
from manifpt.errors import BadImage
from manifpt.fetch import fetch
from manifpt.metrics.codec import LEAST_IMAGES, audit, container_facts

__all__ = ["audit_codecs", "separable_sources"]

_IMAGES = 200  # of a label, evenly over its rows: headers of a sample say what all of a source went through


def audit_codecs(examples: Examples, equalized: bool, is_whole: bool = True) -> dict[str, Any]:
    """The audit, as JSON; with the kept column `went_through_jpeg` where the shards have it.

    Args:
        examples: whose images.
        equalized: as of the evaluation, to be told.
        is_whole: whether all labels have images. If not, those with few are left out, and of fewer than two labels
            there is nothing to tell: then no source is separable, and the accuracy is null.
    """
    count_s = np.bincount(examples.label_n, minlength=len(examples.labels))
    numbers = [n for n in range(len(examples.labels)) if is_whole or count_s[n] >= LEAST_IMAGES]
    if not is_whole and len(numbers) < 2:
        return {"accuracy": None, "chance": None, "separable": {}, "why": {}, "equalized": equalized}
    row_n = np.concatenate([_spread(np.flatnonzero(examples.label_n == n)) for n in numbers])
    label_n = np.searchsorted(numbers, examples.label_n[row_n])
    table = examples.table.take(pa.array(row_n))
    records = table.select(["uri", "container", "offset", "size_bytes"]).to_pylist()
    facts = [
        container_facts(data) if not isinstance(data, BadImage) else {"format": "unreadable"} for data in fetch(records)
    ]
    extra = {name: table[name].to_pylist() for name in ("went_through_jpeg",) if name in table.column_names}
    found = audit(facts, label_n, extra, [examples.labels[n] for n in numbers], seed=0)
    return {
        "accuracy": found.accuracy,
        "chance": found.chance,
        "separable": found.separable,
        "why": found.why,
        "equalized": equalized,
    }


def separable_sources(audits: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those that any of the audits tells apart."""
    return sorted({source for audit in audits for source, is_told in audit["separable"].items() if is_told})


def _spread(row_n: np.ndarray) -> np.ndarray:
    return row_n[np.linspace(0, len(row_n) - 1, min(_IMAGES, len(row_n))).astype(int)]
