"""Nearest neighbours over blocks against brute force, and distances of tiles against differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from manifpt.errors import ConfigError
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.tiles import TOLERANCE, tiles
from manifpt.search.vectors import sum_by_halves
from tests.helpers.shardings import sharding


def brute_force(query_bf: np.ndarray, rows_nf: np.ndarray, k: int, own_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By differences, the smallest row first among equal ones."""
    squared_bn = np.stack([sum_by_halves(np.square(x_f.astype(np.float64) - rows_nf)) for x_f in query_bf])
    is_own_bn = np.arange(len(rows_nf)) == own_b[:, None]
    squared_bn[is_own_bn] = np.inf
    row_bk = np.argsort(squared_bn, axis=1, kind="stable")[:, :k]
    squared_bk = np.take_along_axis(squared_bn, row_bk, 1)
    missing = max(0, k - row_bk.shape[1])
    row_bk = np.pad(np.where(np.isinf(squared_bk), -1, row_bk), ((0, 0), (0, missing)), constant_values=-1)
    return row_bk, np.pad(squared_bk, ((0, 0), (0, missing)), constant_values=np.inf)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 30),
    count=st.integers(1, 60),
    dim=st.integers(1, 12),
    k=st.integers(1, 5),
    offset=st.sampled_from([0.0, 100.0, 1e6]),
)
def test_any_sharding_gives_the_bits_of_brute_force(
    seed: int, queries: int, count: int, dim: int, k: int, offset: float
) -> None:
    """Also with copies, ties, and an offset that leaves the product form few digits."""
    rng = np.random.default_rng(seed)
    rows_nf = offset + rng.integers(0, 4, (count, dim)) + rng.choice([0, 1e-3], 1) * rng.standard_normal((count, dim))
    rows_nf = rows_nf.astype(np.float32)
    query_bf = np.concatenate([rows_nf, offset + rng.standard_normal((queries, dim))])[-queries:].astype(np.float32)
    own_b = np.where(rng.random(queries) < 0.5, rng.integers(0, count, queries), -1)
    states = []
    for shard in sharding(rng, count):
        state = Nearest.to(query_bf, k, own_b)
        for block in sharding(rng, len(shard)):
            state = state.add(rows_nf[shard[block]], shard[block])
        states.append(state)
    merged = states[0]
    for state in states[1:]:
        merged = state.merged(merged)
    row_bk, squared_bk = brute_force(query_bf, rows_nf, k, own_b)
    np.testing.assert_array_equal(merged.found.row_bk, row_bk)
    np.testing.assert_array_equal(merged.found.squared_bk, squared_bk)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8])
def test_distances_of_tiles_keep_their_digits_and_copies_are_0_apart(offset: float) -> None:
    rng = np.random.default_rng(0)
    one_nf = offset + rng.standard_normal((70, 33)) * 10.0 ** rng.integers(-6, 1, (70, 1))
    other_mf = np.concatenate([one_nf[:5], offset + rng.standard_normal((40, 33))])
    squared_nm, inner_nm = np.full((2, 70, 45), np.nan)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("manifpt.metrics.tiles._TILE_ROWS", 32)
        for tile in tiles(one_nf, other_mf):
            squared_nm[tile.one, tile.other] = tile.squared_nm
            inner_nm[tile.one, tile.other] = tile.inner_nm
    np.testing.assert_allclose(squared_nm, cdist(one_nf, other_mf, "sqeuclidean"), rtol=TOLERANCE, atol=0)
    assert (squared_nm[range(5), range(5)] == 0).all()
    scale = np.linalg.norm(one_nf, axis=1).max() * np.linalg.norm(other_mf, axis=1).max()
    np.testing.assert_allclose(inner_nm, one_nf @ other_mf.T, rtol=0, atol=1e-14 * scale)


def test_what_is_no_number_is_refused() -> None:
    broken_nf = np.array([[0.0], [np.nan]])
    with pytest.raises(ConfigError, match="finite"):
        Nearest.to(np.zeros((1, 1)), 1).add(broken_nf, np.arange(2))
