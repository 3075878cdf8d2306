"""Which exact search a space gets: measured on its own reference, when the reference is built.

Legend: N reference rows, W coordinates of a compact vector, M of its sketch.

The answer is the same whichever is chosen, so the choice is no part of a bundle's digest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifpt.documents import object_of
from manifpt.errors import ConfigError
from manifpt.search.distinct import without_copies
from manifpt.search.flat import FlatSearch
from manifpt.search.vectors import Vectors

__all__ = ["Choice", "choose_search", "is_small"]

FEW = 4_096  # rows, or
SMALL = 1 << 22  # numbers in a reference, below which a flat search takes no time
_SKETCHES = (128, 256, 384, 512)
_WIDEST_WHOLE = 8_192  # coordinates of which all are coded, where energy doesn't compact
_QUERIES = 256
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Choice:
    """A search.

    Attributes:
        method: `flat` or `pruned`.
        dims: M of the sketch, where pruned.
        estimated_us: microseconds a query that each choice would take over the whole reference.
    """

    method: str = "flat"
    dims: int = 0
    estimated_us: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a bundle."""
        return {"method": self.method, "dims": self.dims, "estimated_us": self.estimated_us}

    @staticmethod
    def from_json(fields: dict[str, Any] | None) -> Choice:
        """None, of a bundle that says nothing: flat.

        Raises:
            ConfigError: it says something else.
        """
        if not fields:
            return Choice()
        found = object_of(fields, "A search", {"method": str, "dims": int, "estimated_us": dict})
        if found["method"] not in ("flat", "pruned") or (found["method"] == "pruned") != (found["dims"] > 0):
            raise ConfigError(
                f"A search by {found['method']!r} with {found['dims']} dimensions: build the reference again."
            )
        return Choice(found["method"], found["dims"], found["estimated_us"])


def is_small(count: int, dim: int) -> bool:
    """Whether a reference of so many rows is searched flat without being timed."""
    return count < FEW or count * dim < SMALL


def choose_search(sample: Vectors, count: int, compact: Callable[[np.ndarray], np.ndarray], threads: int) -> Choice:
    """Times every search with reference images as queries, each without itself.

    Args:
        sample: some of the reference, as it lies.
        count: N of the whole.
        compact: see `PrunedSearch`.
        threads: CPU threads.
    """
    if is_small(count, sample.dim):
        return Choice()
    grown = count / sample.count  # before copies are left out, as every search leaves them out
    sample, _ = without_copies(sample, sample.at)
    from manifpt.search.basis import fit_basis, sample_of, torch_of
    from manifpt.search.pruned import PrunedSearch  # torch costs seconds, and small references do without

    rows = np.linspace(0, sample.count - 1, min(_QUERIES, sample.count)).astype(np.int64)
    query_bd, excluded = np.ascontiguousarray(sample.at(rows)), list(rows[:, None])
    flat = FlatSearch(sample, threads)
    estimated = {"flat": grown * _us_a_query(lambda: flat.search(query_bd, 2, excluded), len(rows))}
    width = compact(query_bd[:1]).shape[1]
    for dims in [d for d in _SKETCHES if d <= width // 2] + ([width] if width <= _WIDEST_WHOLE else []):
        basis = fit_basis(sample_of(sample, compact, dims), dims)
        search = PrunedSearch(sample, basis, compact, threads)
        fixed = _us_a_query(lambda b=basis: b.sketch(torch_of(compact(query_bd))), len(rows))  # type: ignore[misc]
        whole = _us_a_query(lambda s=search: s.search(query_bd, 2, excluded), len(rows))  # type: ignore[misc]
        estimated[str(dims)] = fixed + grown * max(0.0, whole - fixed)
    estimated = {name: round(us, 2) for name, us in estimated.items()}
    best = min(estimated, key=lambda name: estimated[name])
    return Choice("flat", 0, estimated) if best == "flat" else Choice("pruned", int(best), estimated)


def _us_a_query(call: Callable[[], Any], queries: int) -> float:
    """The fastest of a few rounds, since whatever else the machine does only makes them slower."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1e6 * min(seconds) / queries
