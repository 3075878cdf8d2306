from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.errors import ConfigError
from manifpt.projection import NearestProjector, nearer_of
from manifpt.search.flat import FlatSearch, rounding
from manifpt.search.vectors import Batch, Found, Vectors


def brute_force(query_bd: np.ndarray, reference_nd: np.ndarray) -> np.ndarray:
    """Squared distances float64 [B, N], by differences."""
    difference = query_bd[:, None].astype(np.float64) - reference_nd[None].astype(np.float64)
    return (difference**2).sum(axis=-1)


def projector(reference_nd: np.ndarray) -> NearestProjector:
    return NearestProjector(lambda rows: reference_nd[rows], *reference_nd.shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    queries=st.integers(1, 30),
    dim=st.integers(1, 24),
    offset=st.sampled_from([0.0, 10.0, 1e4]),
    levels=st.sampled_from([2, 4, 256]),
)
def test_the_nearest_of_all_with_ties_to_the_smallest_row(
    seed: int, count: int, queries: int, dim: int, offset: float, levels: int
) -> None:
    # Few levels make many exact ties; a large offset makes float32 GEMM distances worthless.
    rng = np.random.default_rng(seed)
    reference_nd = (offset + rng.integers(0, levels, (count, dim)) / levels).astype(np.float32)
    query_bd = (offset + rng.integers(0, levels, (queries, dim)) / levels).astype(np.float32)
    found = projector(reference_nd).project(query_bd)
    squared_bn = brute_force(query_bd, reference_nd)
    assert (found.neighbor_b == squared_bn.argmin(axis=1)).all()  # argmin takes the first of equals
    np.testing.assert_allclose(found.distance_b, np.sqrt(squared_bn.min(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(found.artifact_bd, query_bd - reference_nd[found.neighbor_b])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), real=st.integers(1, 12), copies=st.integers(1, 30), parts=st.integers(1, 4))
def test_the_next_real_is_no_copy_of_the_nearest_in_one_part_or_several(
    seed: int, real: int, copies: int, parts: int
) -> None:
    rng = np.random.default_rng(seed)
    reference_nd = rng.integers(0, 9, (real, 6)).astype(np.float32)[rng.integers(0, real, real * copies)]
    query_bd = rng.integers(0, 9, (10, 6)).astype(np.float32)
    excluded = [np.flatnonzero(rng.random(len(reference_nd)) < 0.2) for _ in query_bd]
    squared_bn = brute_force(query_bd, reference_nd)
    for b, rows in enumerate(excluded):
        squared_bn[b, rows] = np.inf
    first_b = squared_bn.min(axis=1)
    farther_bn = np.where(squared_bn > first_b[:, None], squared_bn, np.inf)
    found = projector(reference_nd).project(query_bd, excluded)
    np.testing.assert_allclose(found.second_b, np.sqrt(farther_bn.min(axis=1)), rtol=1e-6)
    merged: tuple[Found, np.ndarray] | None = None
    for rows in np.array_split(np.arange(len(reference_nd)), parts):
        if not len(rows):
            continue
        part = projector(reference_nd[rows])
        local = [np.flatnonzero(np.isin(rows, of_query)) for of_query in excluded]
        here = part.with_next(query_bd, part.nearest(query_bd, 2, local), local)
        here = Found(np.where(here.row_bk < 0, -1, here.row_bk + rows[0]), here.squared_bk)
        codes = reference_nd[np.maximum(here.row_bk[:, 0], 0)]
        merged = (here, codes) if merged is None else nearer_of(*merged, here, codes)
    assert merged is not None
    np.testing.assert_array_equal(merged[0].row_bk[:, 0], found.neighbor_b)
    np.testing.assert_array_equal(np.sqrt(merged[0].squared_bk[:, 1]).astype(np.float32), found.second_b)


def test_a_near_copy_of_a_real_that_the_reference_holds_twice_is_marked() -> None:
    """The second nearest is then as near, and says nothing."""
    rng = np.random.default_rng(8)
    reference_nd = rng.standard_normal((40, 30)).astype(np.float32)
    query_bd = reference_nd[[3]] + np.float32(0.01)
    for copies in (0, 1, 20, 100):
        held_nd = np.vstack([reference_nd, np.repeat(reference_nd[[3]], copies, axis=0)])
        assert projector(held_nd).project(query_bd).near_copy_b.tolist() == [True], copies
    alone_nd = np.repeat(reference_nd[[3]], 5, axis=0)
    assert projector(alone_nd).project(query_bd).near_copy_b.tolist() == [False], "nothing to compare it with"


def test_near_ties_that_float32_gets_wrong() -> None:
    """Neighbours that differ by less than the rounding of a float32 GEMM: a plain flat search picks wrong ones."""
    import faiss

    rng = np.random.default_rng(0)
    base_d = rng.random(3072, dtype=np.float32) * 100
    reference_nd = base_d + (rng.random((500, 3072), dtype=np.float32) - 0.5) * 1e-2
    query_bd = base_d + (rng.random((64, 3072), dtype=np.float32) - 0.5) * 1e-2
    exact_b = brute_force(query_bd, reference_nd).argmin(axis=1)
    flat = faiss.IndexFlatL2(3072)
    flat.add(reference_nd)
    _, flat_b1 = flat.search(query_bd, 1)
    assert (flat_b1[:, 0] != exact_b).any(), "the case is no longer hard: nothing is shown"
    assert (projector(reference_nd).project(query_bd).neighbor_b == exact_b).all()


def test_a_distance_does_not_depend_on_what_else_is_asked() -> None:
    """Else equal rows are told apart by the last bit of a sum, where one is the last of a batch."""
    row_1d, query_1d = np.random.default_rng(6).standard_normal((2, 1, 20_001)).astype(np.float32)
    vectors = Vectors(lambda rows: np.repeat(row_1d, 5, axis=0)[rows], 5, 20_001)
    many_p = vectors.exact_pair_distances(Batch(query_1d), np.zeros(5, np.int64), np.arange(5))
    one_p = vectors.exact_pair_distances(Batch(query_1d), np.zeros(1, np.int64), np.array([4]))
    assert (many_p == one_p[0]).all()


def test_float64_search_agrees_when_no_candidate_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    reference_nd = rng.standard_normal((300, 48)).astype(np.float32)
    reference_nd[200:] = reference_nd[:100]  # every neighbour below 100 has a twin
    query_bd = rng.standard_normal((70, 48)).astype(np.float32)
    monkeypatch.setattr("manifpt.search.vectors._BLOCK_BYTES", 48 * 4 * 64)  # several blocks
    one = FlatSearch(Vectors(lambda rows: reference_nd[rows], *reference_nd.shape))
    found = one._in_float64(Batch(query_bd), 2, [np.empty(0, np.int64)] * 70)
    squared_bn = brute_force(query_bd, reference_nd)
    order_bn = np.argsort(squared_bn, axis=1, kind="stable")[:, :2]
    assert (found.row_bk == order_bn).all()
    np.testing.assert_allclose(found.squared_bk, np.take_along_axis(squared_bn, order_bn, 1), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), most=st.integers(0, 90))
def test_excluded_rows_are_never_chosen(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    reference_nd = rng.integers(0, 3, (100, 5)).astype(np.float32)
    query_bd = reference_nd[rng.integers(0, 100, 12)]
    excluded = [np.sort(rng.choice(100, rng.integers(0, most + 1), replace=False)) for _ in query_bd]
    found = projector(reference_nd).project(query_bd, excluded)
    squared_bn = brute_force(query_bd, reference_nd)
    for b, rows in enumerate(excluded):
        squared_bn[b, rows] = np.inf
    assert (found.neighbor_b == squared_bn.argmin(axis=1)).all()


def test_all_excluded_has_no_neighbor() -> None:
    reference_nd = np.ones((3, 4), np.float32)
    found = projector(reference_nd).project(np.ones((2, 4), np.float32), [np.arange(3), np.arange(0)])
    assert found.neighbor_b.tolist() == [-1, 0]
    assert np.isnan(found.artifact_bd[0]).all()
    assert found.distance_b[1] == 0


def test_no_queries() -> None:
    found = projector(np.ones((3, 4), np.float32)).project(np.empty((0, 4), np.float32))
    assert found.neighbor_b.shape == (0,)
    assert found.artifact_bd.shape == (0, 4)


def test_numbers_that_are_none_are_refused() -> None:
    good = np.ones((3, 4), np.float32)
    with pytest.raises(ConfigError, match="no finite numbers: its network"):
        projector(np.full((3, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="finite"):
        projector(good).project(np.full((1, 4), np.inf, np.float32))


def test_an_outlier_of_huge_norm_does_not_spoil_the_proof() -> None:
    """A black image has a log-spectrum of -27.6 everywhere; the other images' proofs must not pay for it."""
    rng = np.random.default_rng(2)
    reference_nd = rng.standard_normal((400, 512)).astype(np.float32)
    reference_nd[7] = -27.6 * 100
    query_bd = rng.standard_normal((50, 512)).astype(np.float32)
    one = FlatSearch(Vectors(lambda rows: reference_nd[rows], *reference_nd.shape))
    _, proved_b = one._by_candidates(Batch(query_bd), 2, [np.empty(0, np.int64)] * 50, 15)
    assert proved_b.mean() > 0.9


@pytest.mark.parametrize("dim", [16, 3072, 12288])
def test_the_rounding_bound_holds_for_float32_expansions(dim: int) -> None:
    rng = np.random.default_rng(3)
    x_bd = (rng.standard_normal((64, dim)) * 3).astype(np.float32)
    y_nd = (rng.standard_normal((64, dim)) * 3).astype(np.float32)
    computed_bn = (x_bd**2).sum(1)[:, None] + (y_nd**2).sum(1) - 2 * (x_bd @ y_nd.T)
    norms_bn = np.linalg.norm(x_bd, axis=1)[:, None] + np.linalg.norm(y_nd, axis=1)
    assert (np.abs(computed_bn - brute_force(x_bd, y_nd)) <= rounding(dim, norms_bn)).all()
