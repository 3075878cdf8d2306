"""MMD and energy distance against torchmetrics, SciPy and their formulas written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist, pdist
from torchmetrics.image.kid import KernelInceptionDistance

from manifpt.errors import ConfigError
from manifpt.metrics.energy import NegativeDistance, energy_distance
from manifpt.metrics.mmd import CubicKernel, GaussianKernel, median_distance, squared_mmd
from manifpt.metrics.pairs import PairFunction, PairSums
from tests.helpers.shardings import sharding


def sums_of(functions: tuple[PairFunction, ...], *sets: np.ndarray) -> PairSums:
    """Of everything at once."""
    set_n = np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
    return PairSums.of(functions, len(sets)).add_own(np.concatenate(sets), set_n)


def test_kid_is_that_of_torchmetrics() -> None:
    """One subset that holds everything: then nothing is left to chance."""
    rng = np.random.default_rng(0)
    one_nf, other_nf = rng.standard_normal((2, 120, 48)) + np.array([0.0, 0.3])[:, None, None]
    theirs = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=120)
    theirs.update(torch.from_numpy(one_nf), real=True)
    theirs.update(torch.from_numpy(other_nf), real=False)
    found_ss = squared_mmd(sums_of((CubicKernel(48),), one_nf, other_nf), CubicKernel(48))
    assert found_ss[0, 1] == pytest.approx(float(theirs.compute()[0]), rel=1e-10)
    np.testing.assert_array_equal(np.diagonal(found_ss), 0)


def test_energy_in_one_dimension_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    one_n, other_m = rng.standard_normal(40), 2 * rng.standard_normal(70) + 1
    function = NegativeDistance()
    sums = sums_of((function,), one_n[:, None], other_m[:, None])
    own_s = -np.diagonal(sums.mean(function)) / [40, 70]
    expected = stats.energy_distance(one_n, other_m) ** 2
    assert energy_distance(sums)[0, 1] + own_s.sum() == pytest.approx(expected, rel=1e-10)


def test_energy_in_many_dimensions_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    sets = [rng.standard_normal((count, 9)) + shift for count, shift in ((30, 0), (12, 1), (25, 0.2))]
    found_ss = energy_distance(sums_of((NegativeDistance(),), *sets))
    for one, other in itertools.combinations(range(3), 2):
        across = 2 * cdist(sets[one], sets[other]).mean()
        expected = across - pdist(sets[one]).mean() - pdist(sets[other]).mean()
        assert found_ss[one, other] == pytest.approx(expected, rel=1e-9)
        assert found_ss[other, one] == found_ss[one, other]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(6, 50), sets=st.integers(1, 4), rows=st.integers(1, 20))
def test_any_sharding_gives_the_sums_of_everything_at_once(seed: int, count: int, sets: int, rows: int) -> None:
    """Shards hold images of several sets; each shard's own pairs and each two shards' pairs are added once."""
    rng = np.random.default_rng(seed)
    features_nf = rng.standard_normal((count, 5))
    set_n = rng.integers(0, sets, count)
    functions = CubicKernel(5), GaussianKernel(2.0), NegativeDistance()
    empty = PairSums.of(functions, sets)
    shards = sharding(rng, count)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("manifpt.metrics.tiles._TILE_ROWS", rows)
        patched.setattr("manifpt.metrics.pairs._OWN_ROWS", 7)
        parts = [empty.add_own(features_nf[shard], set_n[shard]) for shard in shards]
        for one, other in itertools.combinations(shards, 2):
            parts.append(empty.add(features_nf[one], set_n[one], features_nf[other], set_n[other]))
    merged = empty
    for place in rng.permutation(len(parts)):
        merged = merged.merged(parts[place])
    is_set_sn = set_n == np.arange(sets)[:, None]
    inner_nn, squared_nn = features_nf @ features_nf.T, cdist(features_nf, features_nf, "sqeuclidean")
    for place, function in enumerate(functions):
        value_nn = function(inner_nn, squared_nn)
        np.fill_diagonal(value_nn, 0)
        expected_ss = is_set_sn @ value_nn @ is_set_sn.T
        np.testing.assert_allclose(merged.total_kss[place], expected_ss, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(merged.pairs_ss, is_set_sn @ (1.0 - np.eye(count)) @ is_set_sn.T)


def test_sets_that_are_alike_are_0_apart_on_average() -> None:
    rng = np.random.default_rng(3)
    kernel, distance = CubicKernel(6), NegativeDistance()
    mmds, energies = [], []
    for _ in range(200):
        sums = sums_of((kernel, distance), *rng.standard_normal((2, 20, 6)))
        mmds.append(squared_mmd(sums, kernel)[0, 1])
        energies.append(energy_distance(sums)[0, 1])
    for values in (mmds, energies):
        assert min(values) < 0
        assert abs(np.mean(values)) < 3.5 * np.std(values) / len(values) ** 0.5


def test_the_median_distance_is_the_median_of_all_pairs() -> None:
    sample_nf = np.random.default_rng(4).standard_normal((61, 4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("manifpt.metrics.tiles._TILE_ROWS", 13)
        assert median_distance(sample_nf) == pytest.approx(np.median(pdist(sample_nf)), rel=1e-9)
    for few_nf in (sample_nf[:0], sample_nf[:1], np.ones((5, 2))):
        with pytest.raises(ConfigError, match="two different images"):
            median_distance(few_nf)


def test_a_set_of_one_image_is_refused() -> None:
    kernel = CubicKernel(2)
    with pytest.raises(ConfigError, match="sets 1 and 1 have no pair"):
        squared_mmd(sums_of((kernel,), np.eye(2), np.ones((1, 2))), kernel)
