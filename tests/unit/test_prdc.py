"""Precision, recall, density and coverage against the prdc package, and what they say of generators that copy."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifpt.errors import ConfigError
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.prdc import Balls, Prdc
from tests.helpers.shardings import sharding


def others(rows_nf: np.ndarray, k: int) -> Nearest:
    """Each one's k nearest others."""
    own_n = np.arange(len(rows_nf))
    return Nearest.to(rows_nf, k, own_n).add(rows_nf, own_n)


def before(real_nf: np.ndarray, generated_mf: np.ndarray, k: int) -> Balls:
    return Balls.of(others(real_nf, k).found, others(generated_mf, k).found)


def measured(real_nf: np.ndarray, generated_mf: np.ndarray, k: int) -> Prdc:
    state = before(real_nf, generated_mf, k)
    return state.add(real_nf, np.arange(len(real_nf)), generated_mf, np.arange(len(generated_mf))).result()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("dim", "shift"), [(2, 0.5), (16, 0.3), (300, 0.1)])
def test_the_numbers_are_those_of_the_prdc_package(k: int, dim: int, shift: float) -> None:
    rng = np.random.default_rng(dim)
    real_nf = rng.standard_normal((150, dim)).astype(np.float32).astype(np.float64)
    generated_mf = (0.8 * rng.standard_normal((110, dim)) + shift).astype(np.float32).astype(np.float64)
    found, theirs = measured(real_nf, generated_mf, k), prdc.compute_prdc(real_nf, generated_mf, k)
    for name, value in theirs.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(4, 40),
    other_count=st.integers(4, 40),
    tile_rows=st.integers(1, 20),
    is_grid=st.booleans(),
)
def test_any_sharding_of_both_sets_gives_the_numbers_of_everything_at_once(
    seed: int, count: int, other_count: int, tile_rows: int, is_grid: bool
) -> None:
    """On a grid of points many distances are just a radius."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, 4, (n, 3)) if is_grid else rng.standard_normal((n, 3)) for n in (count, other_count)]
    real_nf, generated_mf = ((rows / 10).astype(np.float32) for rows in drawn)
    state = before(real_nf, generated_mf, 3)
    parts = [
        state.add(real_nf[rows], rows, generated_mf[columns], columns)
        for columns in sharding(rng, other_count)
        for rows in sharding(rng, count)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("manifpt.metrics.tiles._TILE_ROWS", tile_rows)
        whole = state.add(real_nf, np.arange(count), generated_mf, np.arange(other_count))
    merged = state
    for place in rng.permutation(len(parts)):
        merged = merged.merged(parts[place])
    assert merged.result() == whole.result()
    np.testing.assert_array_equal(merged.balls_m, whole.balls_m)
    np.testing.assert_array_equal(merged.is_recalled_n, whole.is_recalled_n)
    np.testing.assert_array_equal(merged.is_covered_n, whole.is_covered_n)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_generator_that_copies_few_reals_has_precision_1_and_low_recall(offset: float) -> None:
    """Its artifacts are all 0: F_G = {0} says nothing of recall."""
    rng = np.random.default_rng(0)
    real_nf = (offset + rng.standard_normal((400, 24))).astype(np.float32)
    copied_mf = real_nf[rng.integers(0, 8, 200)]
    nearest = Nearest.to(copied_mf, 1).add(real_nf, np.arange(400)).found
    assert not (copied_mf - real_nf[nearest.row_bk[:, 0]]).any()
    assert not nearest.squared_bk.any()
    found = measured(real_nf, copied_mf, 5)
    assert found.precision == 1
    assert found.recall <= 8 / 400
    # Of each copy the other copies are 0 away, so its ball is a point; and of few reals a copy lies in the ball.
    assert found.coverage < 0.5


def test_the_fingerprint_is_zero_only_if_every_image_is_a_real() -> None:
    """One image beside the reals, however near, has an artifact; precision does not see it."""
    rng = np.random.default_rng(1)
    real_nf = rng.standard_normal((60, 5)).astype(np.float32)
    generated_mf = real_nf[:30].copy()
    generated_mf[7] = np.nextafter(generated_mf[7], np.float32(9))
    squared_m = Nearest.to(generated_mf, 1).add(real_nf, np.arange(60)).found.squared_bk[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(squared_m), [7])
    assert measured(real_nf, generated_mf, 3).precision == 1


def test_a_copy_of_reals_that_are_alike_lies_in_their_balls() -> None:
    """Their radius is 0, and balls are closed: an open one has nothing inside."""
    real_nf = np.zeros((4, 2))
    found = measured(real_nf, real_nf, 2)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(4 / 2)


def test_too_few_images_are_refused() -> None:
    rows_nf = np.random.default_rng(2).standard_normal((9, 2))
    with pytest.raises(ConfigError, match="3 generated images"):
        measured(rows_nf, rows_nf[:3], 3)
    with pytest.raises(ConfigError, match="0 real images"):
        measured(rows_nf[:0], rows_nf, 3)
