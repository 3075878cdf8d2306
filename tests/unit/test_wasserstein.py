"""The bound on W1 and the sliced distance, against SciPy's exact W1 in one dimension and POT's in several."""

from __future__ import annotations

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from manifpt.errors import ConfigError
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.sliced import Slices, directions, sliced_wasserstein
from manifpt.metrics.wasserstein import MeanNorm, wasserstein_bound
from tests.helpers.shardings import sharding


def norms_to(one_nf: np.ndarray, other_mf: np.ndarray) -> np.ndarray:
    """Of each one's difference to its nearest other."""
    return np.sqrt(Nearest.to(one_nf, 1).add(other_mf, np.arange(len(other_mf))).found.squared_bk[:, 0])


def bound(generated_mf: np.ndarray, real_nf: np.ndarray) -> float:
    forth, back = norms_to(generated_mf, real_nf), norms_to(real_nf, generated_mf)
    return wasserstein_bound(MeanNorm().add(forth), MeanNorm().add(back))


def exact(one_nf: np.ndarray, other_mf: np.ndarray) -> float:
    """W1 by linear programming."""
    return float(ot.emd2([], [], ot.dist(one_nf, other_mf, metric="euclidean")))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40), other_count=st.integers(1, 40))
def test_the_bound_holds_in_one_dimension(seed: int, count: int, other_count: int) -> None:
    rng = np.random.default_rng(seed)
    generated_m, real_n = rng.normal(rng.normal(), 1, count), rng.normal(0, rng.gamma(1), other_count)
    generated_m, real_n = generated_m.astype(np.float32), real_n.astype(np.float32)
    found = bound(generated_m[:, None], real_n[:, None])
    assert 0 < found <= wasserstein_distance(generated_m, real_n) * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 25), other_count=st.integers(1, 25), dim=st.integers(2, 30))
def test_the_bound_and_the_sliced_distance_are_at_most_w1(seed: int, count: int, other_count: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    generated_mf = rng.standard_normal((count, dim)) + rng.standard_normal(dim)
    real_nf = rng.standard_normal((other_count, dim))
    at_most = exact(generated_mf, real_nf) * (1 + 1e-6)
    assert 0 < bound(generated_mf, real_nf) <= at_most
    slices = (Slices.of(dim, seed, 16).add(rows) for rows in (generated_mf, real_nf))
    assert sliced_wasserstein(*slices) <= at_most


def test_the_bound_is_reached_where_all_images_are_moved_a_little() -> None:
    real_nf = 10.0 * np.arange(30)[:, None] * np.ones(4)
    generated_mf = real_nf + np.array([0.5, -0.5, 0.5, 0.5])
    assert bound(generated_mf, real_nf) == pytest.approx(1, rel=1e-12)
    assert exact(generated_mf, real_nf) == pytest.approx(1, rel=1e-9)


def test_a_generator_that_copies_one_real_is_seen_by_the_reverse_artifacts_only() -> None:
    real_nf = np.random.default_rng(0).standard_normal((50, 6))
    copied_mf = real_nf[np.zeros(20, np.int64)]
    assert MeanNorm().add(norms_to(copied_mf, real_nf)).result() == 0
    # All that is real must travel to this one image, so here the reverse bound is W1 itself.
    assert bound(copied_mf, real_nf) == pytest.approx(exact(copied_mf, real_nf), rel=1e-9)


@pytest.mark.parametrize(("count", "other_count"), [(60, 60), (60, 37)])
def test_the_sliced_distance_is_that_of_pot(count: int, other_count: int) -> None:
    rng = np.random.default_rng(1)
    one_nf, other_mf = rng.standard_normal((count, 20)), rng.standard_normal((other_count, 20)) + 0.3
    theirs = ot.sliced_wasserstein_distance(one_nf, other_mf, projections=directions(20, 5, 40).T, p=1)
    ours = sliced_wasserstein(Slices.of(20, 5, 40).add(one_nf), Slices.of(20, 5, 40).add(other_mf))
    assert ours == pytest.approx(theirs, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_any_sharding_gives_the_value_of_everything_at_once(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows_nf, other_mf = rng.standard_normal((count, 7)), rng.standard_normal((12, 7))
    distance_n, other = rng.random(count).astype(np.float32), Slices.of(7, 3, 8).add(other_mf)
    merged, norms = Slices.of(7, 3, 8), MeanNorm()
    for shard in sharding(rng, count):
        merged = Slices.of(7, 3, 8).add(rows_nf[shard]).merged(merged)
        norms = MeanNorm().add(distance_n[shard]).merged(norms)
    whole = Slices.of(7, 3, 8).add(rows_nf)
    assert sliced_wasserstein(merged, other) == pytest.approx(sliced_wasserstein(whole, other), rel=1e-6)
    assert norms.result() == pytest.approx(distance_n.mean(dtype=np.float64), rel=1e-12)


def test_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="no artifact"):
        wasserstein_bound(MeanNorm().add(np.ones(2)), MeanNorm())
    with pytest.raises(ConfigError, match="an image or more"):
        sliced_wasserstein(Slices.of(2, 0).add(np.ones((1, 2))), Slices.of(2, 0))
