"""The nearest rows of a reference: exact by proof, whichever of the searches finds them.

`flat` looks at everything, `pruned` at what bounds leave, `approximate` at what it guesses, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from manifpt.log import event
from manifpt.search.choose import Choice, choose_search, is_small
from manifpt.search.distinct import DistinctSearch, Search, without_copies
from manifpt.search.flat import FlatSearch
from manifpt.search.vectors import Found, Rows, Vectors

__all__ = ["Choice", "Found", "Rows", "Search", "Vectors", "choose_search", "is_small", "make_search"]


def make_search(
    embeddings_of: Callable[[Rows], np.ndarray],
    count: int,
    dim: int,
    *,
    choice: Choice,
    compact: Callable[[Any], Any],
    threads: int = 1,
    codes: np.ndarray | None = None,
) -> Search:
    """A search over N reference rows.

    Args:
        embeddings_of: rows -> float32 [M, D]; deterministic, and may be called again for a few rows.
        count, dim: N and D.
        choice: see `choose_search`; its method may be `approximate` too.
        compact: float32 [B, D] -> float32 [B, W], of NumPy or torch: linear, and no longer than what it is made of.
        threads: CPU threads.
        codes: [N, ...] that the embeddings are made of, and quicker to compare; None: the embeddings themselves.

    Raises:
        ConfigError: an embedding of the reference is no finite number.
    """
    vectors = Vectors(embeddings_of, count, dim)
    vectors, same_as = without_copies(vectors, vectors.at if codes is None else codes.__getitem__)
    search = _make(vectors, choice, compact, threads)
    return search if same_as is None else DistinctSearch(search, vectors, same_as)


def _make(vectors: Vectors, choice: Choice, compact: Callable[[Any], Any], threads: int) -> Search:
    if choice.method == "approximate":
        from manifpt.search.approximate import ApproximateSearch

        return ApproximateSearch(vectors, threads)
    if choice.method == "pruned":
        from manifpt.search.basis import fit_basis, sample_of
        from manifpt.search.pruned import PrunedSearch

        basis = fit_basis(sample_of(vectors, compact, choice.dims), choice.dims)
        on_device = (
            _on_device(vectors, lambda: PrunedSearch(vectors, basis, compact, threads, "cuda")) if has_gpu() else None
        )
        return on_device or PrunedSearch(vectors, basis, compact, threads)
    # Small ones are searched in no time, and torch takes seconds to load.
    if is_small(vectors.count, vectors.dim) or not has_gpu():
        return FlatSearch(vectors, threads)
    return _on_device(vectors, lambda: FlatSearch(vectors, threads, "cuda")) or FlatSearch(vectors, threads)


def _on_device(vectors: Vectors, make: Callable[[], Search]) -> Search | None:
    """A search of a GPU; None: others have filled it, and the CPU gives the same answers."""
    import torch

    from manifpt.search.device import InHalves

    try:
        return InHalves(make())
    except torch.cuda.OutOfMemoryError as error:
        event("search_on_cpu", why=error)
    vectors.release()
    torch.cuda.empty_cache()
    return None


def has_gpu() -> bool:
    """Whether this process was given one."""
    import torch

    return torch.cuda.is_available()
