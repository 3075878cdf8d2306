"""Metrics of attribution against scikit-learn, definitions written out, and simulations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs
from sklearn.calibration import calibration_curve

from manifpt.errors import ConfigError
from manifpt.metrics.attribution import (
    Difference,
    accuracy,
    balanced_accuracy,
    confusion,
    paired_bootstrap,
    precision_recall,
)
from manifpt.metrics.calibration import reliability


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 80), sources=st.integers(2, 7))
def test_as_scikit_learn_has_them(seed: int, count: int, sources: int) -> None:
    rng = np.random.default_rng(seed)
    label_b, predicted_b = rng.integers(0, sources, (2, count))
    names = [str(source) for source in range(sources)]
    assert accuracy(label_b, predicted_b) == pytest.approx(theirs.accuracy_score(label_b, predicted_b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are not there, or alone
        expected = theirs.balanced_accuracy_score(label_b, predicted_b)
    assert balanced_accuracy(label_b, predicted_b) == pytest.approx(expected)
    table_ss = confusion(label_b, predicted_b, names)
    assert table_ss.dtype == np.int64
    np.testing.assert_array_equal(table_ss, theirs.confusion_matrix(label_b, predicted_b, labels=range(sources)))
    precision_s, recall_s, _, _ = theirs.precision_recall_fscore_support(
        label_b, predicted_b, labels=range(sources), zero_division=np.nan
    )
    found_precision_s, found_recall_s = precision_recall(table_ss)
    np.testing.assert_allclose(found_precision_s, precision_s)  # NaN where theirs is
    np.testing.assert_allclose(found_recall_s, recall_s)


def test_precision_and_recall_are_undefined_where_nothing_is() -> None:
    precision_s, recall_s = precision_recall(np.array([[3, 1, 0], [0, 0, 0], [2, 0, 0]]))
    np.testing.assert_allclose(precision_s, [0.6, 0, np.nan])
    np.testing.assert_allclose(recall_s, [0.75, np.nan, 0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), bins=st.integers(1, 20), sharp=st.floats(0.1, 9))
def test_calibration_error_by_its_definition(seed: int, count: int, bins: int, sharp: float) -> None:
    rng = np.random.default_rng(seed)
    logit_bs = sharp * rng.standard_normal((count, 4))
    probability_bs = np.exp(logit_bs) / np.exp(logit_bs).sum(axis=1, keepdims=True)
    label_b = rng.integers(0, 4, count)
    expected = 0.0
    for m in range(1, bins + 1):
        inside = [b for b in range(count) if (m - 1) / bins < max(probability_bs[b]) <= m / bins]
        if inside:
            right = np.mean([probability_bs[b].argmax() == label_b[b] for b in inside])
            sure = np.mean([max(probability_bs[b]) for b in inside])
            expected += len(inside) / count * abs(right - sure)
    assert reliability(probability_bs, label_b, bins).error == pytest.approx(expected, abs=1e-12)


def test_calibration_error_with_the_bins_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    sure_b = rng.uniform(0.5, 1, 5_000)
    label_b = (rng.random(5_000) > sure_b**2).astype(np.int64)  # of two sources, less often the first than it says
    found = reliability(np.stack([sure_b, 1 - sure_b], axis=1), label_b, bins=10).error
    right_m, sure_m = calibration_curve(label_b == 0, sure_b, n_bins=10)
    share_m = np.histogram(sure_b, np.linspace(0.5, 1, 6))[0] / len(sure_b)
    assert found == pytest.approx((share_m * np.abs(right_m - sure_m)).sum(), abs=1e-12)
    assert found == pytest.approx(np.mean(sure_b - sure_b**2), abs=0.02)


def test_calibration_error_at_its_ends() -> None:
    sure_bs = np.eye(3)[[0, 1, 2, 0]]
    assert reliability(sure_bs, np.array([0, 1, 2, 0])).error == 0
    assert reliability(sure_bs, np.array([1, 2, 0, 1])).error == 1
    assert reliability(sure_bs.astype(np.float16), np.array([0, 1, 0, 0])).error == 0.25


def by_hand(gain_b: np.ndarray, group_b: np.ndarray, seed: int, rounds: int) -> np.ndarray:
    """The bootstrap as it is told: draw as many groups as there are, join their images, take the mean."""
    rng = np.random.default_rng(seed)
    groups = [gain_b[group_b == group] for group in np.unique(group_b)]
    drawn = rng.integers(0, len(groups), (rounds, len(groups)))
    return np.array([np.concatenate([groups[g] for g in row]).mean() for row in drawn])


@pytest.mark.parametrize("grouped", [False, True])
def test_the_bootstrap_is_the_plain_one(grouped: bool) -> None:
    rng = np.random.default_rng(1)
    a_b, b_b = rng.random(120) < 0.7, rng.random(120) < 0.5
    group_b = rng.integers(0, 30, 120) if grouped else np.arange(120)
    found = paired_bootstrap(a_b, b_b, seed=0, rounds=20_000, group_b=group_b if grouped else None)
    plain_r = by_hand(a_b.astype(int) - b_b, group_b, seed=1, rounds=20_000)
    low, high = np.quantile(plain_r, [0.025, 0.975])
    assert found.mean == pytest.approx(a_b.mean() - b_b.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_blocks_of_rounds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    a_b, b_b, group_b = rng.random(90) < 0.6, rng.random(90) < 0.5, rng.integers(0, 20, 90)
    whole = paired_bootstrap(a_b, b_b, seed=3, rounds=500, group_b=group_b)
    monkeypatch.setattr("manifpt.metrics.attribution._BLOCK_CELLS", 64)
    assert paired_bootstrap(a_b, b_b, seed=3, rounds=500, group_b=group_b) == whole
    assert paired_bootstrap(a_b, b_b, seed=4, rounds=500, group_b=group_b) != whole


def test_groups_of_one_are_no_groups() -> None:
    rng = np.random.default_rng(4)
    a_b, b_b = rng.random(50) < 0.6, rng.random(50) < 0.5
    alone = paired_bootstrap(a_b, b_b, seed=0)
    assert paired_bootstrap(a_b, b_b, seed=0, group_b=np.arange(50)[::-1]) == alone
    assert paired_bootstrap(a_b, b_b, seed=0, group_b=np.full(50, -1)) == alone


def test_what_both_methods_find_hard_cancels() -> None:
    is_easy_b = np.arange(400) % 2 == 0
    better_b = is_easy_b | (np.arange(400) % 40 == 1)
    found = paired_bootstrap(better_b, is_easy_b, seed=0)
    assert found.mean == pytest.approx(0.025)
    assert 0 < found.low < 0.025 < found.high < 0.05
    assert paired_bootstrap(is_easy_b, is_easy_b, seed=0) == Difference(0.0, 0.0, 0.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over 400 simulated test sets: by images where they are independent, by groups where only groups are."""
    rng = np.random.default_rng(5)
    covered = {"images": 0, "groups": 0, "images, of groups": 0}
    trials, truth = 400, 0.2
    group_b = np.repeat(np.arange(60), 5)
    for trial in range(trials):
        hard_b = rng.random(300)
        a_b, b_b = hard_b < 0.7, np.where(rng.random(300) < 0.5, hard_b, rng.random(300)) < 0.5
        alone = paired_bootstrap(a_b, b_b, seed=trial, rounds=600)
        covered["images"] += alone.low <= truth <= alone.high
        a_b, b_b = (np.repeat(rng.random(60) < share, 5) for share in (0.7, 0.5))
        apart = paired_bootstrap(a_b, b_b, seed=trial, rounds=600)
        covered["images, of groups"] += apart.low <= truth <= apart.high
        whole = paired_bootstrap(a_b, b_b, seed=trial, rounds=600, group_b=group_b)
        covered["groups"] += whole.low <= truth <= whole.high
    assert 0.92 <= covered["images"] / trials <= 0.98
    assert 0.92 <= covered["groups"] / trials <= 0.98
    assert covered["images, of groups"] / trials < 0.8, "images of a group may be taken for independent"


def test_what_is_no_comparison_is_refused() -> None:
    one_b, none_b = np.ones(4, bool), np.ones(0, bool)
    with pytest.raises(ConfigError, match="at least one"):
        accuracy(none_b, none_b)
    with pytest.raises(ConfigError, match="4 and 3"):
        balanced_accuracy(np.arange(4), np.arange(3))
    with pytest.raises(ConfigError, match="label 2 is none of 2"):
        confusion(np.array([0, 1]), np.array([1, 2]), ["a", "b"])
    with pytest.raises(ConfigError, match="label -1"):
        confusion(np.array([0, 1]), np.array([1, -1]), ["a", "b"])
    with pytest.raises(ConfigError, match="softmax"):
        reliability(np.array([[2.0, -1.0]]), np.array([0]))
    with pytest.raises(ConfigError, match="softmax"):
        reliability(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(ConfigError, match="1 group"):
        paired_bootstrap(one_b, ~one_b, seed=0, group_b=np.zeros(4, np.int64))
    with pytest.raises(ConfigError, match="level 95"):
        paired_bootstrap(one_b, ~one_b, seed=0, level=95)
