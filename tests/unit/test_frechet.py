"""The Frechet distance and the FD ratio against a direct computation in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance

from manifpt.errors import ConfigError
from manifpt.metrics.frechet import fd_ratio, frechet_distance, frechet_distances
from manifpt.metrics.moments import Moments, Scatter, moments_of
from tests.helpers.shardings import sharding


def features(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Correlated, off the origin."""
    mixing_ff = rng.standard_normal((dim, dim)) / math.sqrt(dim)
    return rng.standard_normal((count, dim)) @ mixing_ff + 3 * rng.standard_normal(dim)


def direct(one_nf: np.ndarray, other_nf: np.ndarray) -> float:
    """The formula as it is written, with a general matrix square root."""
    one_ff, other_ff = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (one_nf, other_nf))
    root_ff = linalg.sqrtm(one_ff @ other_ff)
    gap_f = one_nf.mean(axis=0) - other_nf.mean(axis=0)
    return float(gap_f @ gap_f + np.trace(one_ff + other_ff - 2 * np.real(root_ff)))


@pytest.mark.parametrize(
    ("count", "other_count", "dim", "tolerance"),
    [
        (50, 70, 1, 1e-9),
        (50, 70, 8, 1e-9),
        (1000, 400, 64, 1e-9),
        (200, 300, 128, 1e-7),
        # Singular covariances: the direct form is the one that is off, by square roots of rounded zeros.
        (30, 40, 64, 1e-4),
        (30, 300, 64, 1e-4),
        (2, 2, 16, 1e-4),
    ],
)
def test_the_distance_is_the_formula(count: int, other_count: int, dim: int, tolerance: float) -> None:
    rng = np.random.default_rng(count + dim)
    one_nf, other_nf = features(rng, count, dim), features(rng, other_count, dim)
    expected = direct(one_nf, other_nf)
    scale = abs(expected) + np.trace(np.atleast_2d(np.cov(one_nf, rowvar=False)))
    one, other = moments_of(one_nf), moments_of(other_nf)
    assert frechet_distance(one, other) == pytest.approx(expected, abs=tolerance * scale)


def test_the_distance_of_known_gaussians() -> None:
    """Commuting covariances: the sum of squared differences of standard deviations; and one dimension of rank 1."""
    one = Moments(np.zeros(3), np.diag([1.0, 2.0, 0.0]))
    other = Moments(np.array([1.0, 0, 2]), np.diag([3.0, 2.0, 0.5]))
    assert frechet_distance(one, other) == pytest.approx(5 + 4 + 0 + 0.25, rel=1e-12)
    # Orthogonal covariances of rank 1 have nothing in common.
    one, other = moments_of(np.array([[1.0, 0], [-1, 0]])), moments_of(np.array([[0, 1.0], [0, -1]]))
    assert frechet_distance(one, other) == pytest.approx(2 + 2, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 40), other_count=st.integers(2, 40), dim=st.integers(1, 24))
def test_properties_of_a_distance(seed: int, count: int, other_count: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    one_nf, other_nf = features(rng, count, dim), features(rng, other_count, dim)
    one, other = moments_of(one_nf), moments_of(other_nf)
    distance = frechet_distance(one, other)
    scale = 1 + distance + np.vdot(one.root_kf, one.root_kf) + np.vdot(other.root_kf, other.root_kf)
    assert distance >= 0
    assert frechet_distance(one, one) <= 1e-12 * scale
    assert frechet_distance(other, one) == pytest.approx(distance, abs=1e-12 * scale)
    rotation_ff, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    shift_f = 10 * rng.standard_normal(dim)
    moved = (moments_of(rows @ rotation_ff + shift_f) for rows in (one_nf, other_nf))
    assert frechet_distance(*moved) == pytest.approx(distance, abs=1e-10 * scale)
    order_n = rng.permutation(count)
    assert frechet_distance(moments_of(one_nf[order_n]), other) == pytest.approx(distance, abs=1e-12 * scale)


@pytest.mark.parametrize(("count", "other_count", "dim"), [(60, 80, 2), (300, 250, 32), (900, 700, 128)])
def test_the_distance_is_that_of_torchmetrics(count: int, other_count: int, dim: int) -> None:
    rng = np.random.default_rng(count)
    one_nf, other_nf = features(rng, count, dim), features(rng, other_count, dim)
    as_they_are = torch.nn.Identity()
    as_they_are.num_features = dim  # type: ignore[assignment]
    theirs = FrechetInceptionDistance(as_they_are).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(one_nf), real=True)
    theirs.update(torch.from_numpy(other_nf), real=False)
    assert frechet_distance(moments_of(one_nf), moments_of(other_nf)) == pytest.approx(
        float(theirs.compute()), rel=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 40),
    dim=st.integers(1, 24),
    offset=st.sampled_from([0.0, 1e3, 1e8]),
)
def test_any_sharding_gives_the_moments_of_everything_at_once(seed: int, count: int, dim: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    rows_nf = features(rng, count, dim) + offset
    merged = Scatter.of(dim)
    for shard in sharding(rng, count):
        state = Scatter.of(dim)
        for block in sharding(rng, len(shard)):
            state = state.add(rows_nf[shard[block]])
        merged = state.merged(merged)
    found = merged.moments()
    assert merged.count == count
    assert len(found.root_kf) <= dim
    np.testing.assert_allclose(found.mean_f, rows_nf.mean(axis=0), rtol=1e-12, atol=1e-13)
    covariance_ff = np.atleast_2d(np.cov(rows_nf - offset, rowvar=False))
    largest, unit = np.abs(covariance_ff).max(), offset * 2.0**-50  # shards' means are float64 numbers, and so rounded
    tolerance = 1e-12 * largest + unit * (largest**0.5 + unit)
    np.testing.assert_allclose(found.root_kf.T @ found.root_kf, covariance_ff, rtol=0, atol=tolerance)


def test_distances_between_all_sets_are_those_of_each_two() -> None:
    rng = np.random.default_rng(4)
    moments = [moments_of(features(rng, count, 5)) for count in (3, 40, 4)]
    found_ss = frechet_distances(moments)
    for one, other in itertools.product(range(3), repeat=2):
        expected = frechet_distance(moments[one], moments[other]) if one != other else 0
        assert found_ss[one, other] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(found_ss, found_ss.T)


@pytest.mark.parametrize(("counts", "dim"), [((40, 60, 51), 6), ((12, 9, 30, 8), 40)])
def test_the_ratio_is_its_definition(counts: tuple[int, ...], dim: int) -> None:
    rng = np.random.default_rng(dim)
    rows = [features(rng, count, dim) for count in counts]
    label_b = np.repeat(np.arange(len(counts)) * 3, counts)
    found = fd_ratio(np.concatenate(rows).astype(np.float32), label_b, seed=5)
    # The same draws, in the direct form.
    drawing, half = np.random.default_rng(5), min(counts) // 2
    drawn = [part[drawing.permutation(len(part))[: 2 * half]].astype(np.float32).astype(np.float64) for part in rows]
    intra = np.mean([direct(part[:half], part[half:]) for part in drawn])
    inter = np.mean([direct(one[:half], other[:half]) for one, other in itertools.combinations(drawn, 2)])
    assert found.intra == pytest.approx(intra, rel=1e-4)
    assert found.inter == pytest.approx(inter, rel=1e-4)
    assert found.ratio == pytest.approx(inter / intra, rel=1e-4)
    assert (found.half_images, found.features) == (half, dim)


@pytest.mark.parametrize("dim", [4, 200])
@pytest.mark.parametrize("counts", [(40, 40, 40), (30, 300, 900)])
def test_sources_that_are_alike_have_a_ratio_near_one(counts: tuple[int, ...], dim: int) -> None:
    """The bias is the same between and within, also where sources differ in size and features outnumber images."""
    rng = np.random.default_rng(0)
    label_b = np.repeat(np.arange(len(counts)), counts)
    ratios = [fd_ratio(rng.standard_normal((len(label_b), dim)), label_b, seed).ratio for seed in range(30)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.12)


def test_the_ratio_rises_with_separation_and_does_not_depend_on_scale() -> None:
    rng = np.random.default_rng(1)
    label_b = np.repeat(np.arange(4), 50)
    noise_bf, direction_sf = rng.standard_normal((200, 16)), rng.standard_normal((4, 16))
    ratios = [fd_ratio(noise_bf + far * direction_sf[label_b], label_b, seed=0).ratio for far in (0, 1, 2, 4)]
    assert ratios == sorted(ratios)
    scaled = fd_ratio(1e3 * (noise_bf + direction_sf[label_b]) - 77, label_b, seed=0).ratio
    assert scaled == pytest.approx(ratios[1], rel=1e-9)


def test_constant_features() -> None:
    label_b = np.repeat([0, 1], 7)
    assert math.isnan(fd_ratio(np.full((14, 3), 0.1), label_b, seed=0).ratio)
    apart = fd_ratio(np.where(label_b[:, None] == 0, 0.1, 0.3) * np.ones(3), label_b, seed=0)
    assert apart.ratio == math.inf
    assert apart.intra == 0
    assert apart.inter == pytest.approx(3 * 0.04)


def test_what_can_not_be_compared_is_refused() -> None:
    rows_bf = np.zeros((9, 2))
    with pytest.raises(ConfigError, match=r"source 7 has 3 image\(s\)"):
        fd_ratio(rows_bf, np.array([0] * 6 + [7] * 3), seed=0)
    with pytest.raises(ConfigError, match="add another"):
        fd_ratio(rows_bf, np.zeros(9, np.int64), seed=0)
    rows_bf[:, 1] = np.nan
    with pytest.raises(ConfigError, match="finite"):
        fd_ratio(rows_bf, np.array([0] * 5 + [1] * 4), seed=0)


def test_few_images_of_many_features_need_small_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    label_b = np.repeat(np.arange(25), 60)
    features_bf = rng.standard_normal((1500, 2048), dtype=np.float32)
    decomposed, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda given, **how: decomposed.append(given.shape) or svd(given, **how))
    assert fd_ratio(features_bf, label_b, seed=0).ratio == pytest.approx(1, abs=0.1)
    assert sum(shape[0] for shape in decomposed) == 25 + 300
    assert {shape[1:] for shape in decomposed} == {(30, 30)}


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    label_b, features_bf = np.repeat(np.arange(9), 10), rng.standard_normal((90, 7))
    whole = fd_ratio(features_bf, label_b, seed=0)
    monkeypatch.setattr("manifpt.metrics.frechet._BLOCK_NUMBERS", 2 * 5 * 7)
    assert fd_ratio(features_bf, label_b, seed=0).ratio == pytest.approx(whole.ratio, rel=1e-12)
