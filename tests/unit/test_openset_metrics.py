"""Metrics of unknown sources against scikit-learn, and against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from manifpt.errors import ConfigError
from manifpt.metrics.openset import OperatingPoint, auroc, fpr_at_tpr, operating_point, oscr

# Few values, so that there are ties; and the infinite ones that a score may have.
scores = st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 0.1, 1.0, 5.0, np.inf]), min_size=1, max_size=30).map(np.array)
finite = st.lists(st.floats(-3, 3).map(lambda x: round(x, 1)), min_size=1, max_size=40).map(np.array)


def both(known_n: np.ndarray, unknown_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat([0, 1], [len(known_n), len(unknown_m)]), np.concatenate([known_n, unknown_m])


@given(finite, finite)
def test_the_area_is_scikit_learns(known_n: np.ndarray, unknown_m: np.ndarray) -> None:
    assert auroc(known_n, unknown_m) == pytest.approx(theirs.roc_auc_score(*both(known_n, unknown_m)))


@given(scores, scores)
def test_the_area_counts_pairs_and_of_ties_half(known_n: np.ndarray, unknown_m: np.ndarray) -> None:
    pairs = [(u > k) + 0.5 * (u == k) for k in known_n for u in unknown_m]
    assert auroc(known_n, unknown_m) == pytest.approx(np.mean(pairs))
    assert auroc(known_n, unknown_m) + auroc(unknown_m, known_n) == pytest.approx(1)


@given(finite, finite, st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_the_rate_is_that_of_scikit_learns_curve(known_n: np.ndarray, unknown_m: np.ndarray, tpr: float) -> None:
    """With known as the positive class, whose score is the one turned round."""
    is_unknown_b, score_b = both(known_n, unknown_m)
    fpr_t, tpr_t, _ = theirs.roc_curve(1 - is_unknown_b, -score_b, drop_intermediate=False)
    assert fpr_at_tpr(known_n, unknown_m, tpr) == pytest.approx(fpr_t[np.argmax(tpr_t >= tpr - 1e-9)])


def test_ninety_five_percent_of_twenty_are_nineteen() -> None:
    known_n = np.arange(20.0)
    assert fpr_at_tpr(known_n, np.array([18.0, 18.5])) == 0.5
    assert fpr_at_tpr(known_n, np.array([18.5]), 1.0) == 1


@settings(max_examples=60)
@given(scores, scores, st.data())
def test_oscr_is_the_area_under_the_curve_of_all_thresholds(
    known_n: np.ndarray, unknown_m: np.ndarray, data: st.DataObject
) -> None:
    is_right_n = np.array(data.draw(st.lists(st.booleans(), min_size=len(known_n), max_size=len(known_n))))
    thresholds = sorted({*known_n, *unknown_m})
    told = [0.0, *(np.mean((known_n <= t) & is_right_n) for t in thresholds)]
    accepted = [0.0, *(np.mean(unknown_m <= t) for t in thresholds)]
    assert oscr(known_n, is_right_n, unknown_m) == pytest.approx(np.trapezoid(told, accepted))
    assert oscr(known_n, is_right_n, unknown_m) <= is_right_n.mean() + 1e-12
    all_right_n = np.ones(len(known_n), bool)
    assert oscr(known_n, all_right_n, unknown_m) == pytest.approx(auroc(known_n, unknown_m))


@given(scores, scores, st.data())
def test_an_operating_point_lies_on_the_curve(known_n: np.ndarray, unknown_m: np.ndarray, data: st.DataObject) -> None:
    is_right_n = np.array(data.draw(st.lists(st.booleans(), min_size=len(known_n), max_size=len(known_n))))
    threshold = data.draw(st.sampled_from([-np.inf, 0.0, 0.5, 1.0, np.inf]))
    found = operating_point(known_n, is_right_n, unknown_m, threshold)
    told = [right and not score > threshold for right, score in zip(is_right_n, known_n, strict=True)]
    assert found.accuracy == pytest.approx(np.mean(told))
    assert found.false_alarms == pytest.approx(np.mean([score > threshold for score in known_n]))
    assert found.found == pytest.approx(np.mean([score > threshold for score in unknown_m]))


def test_without_a_threshold_it_is_the_closed_set_accuracy() -> None:
    found = operating_point(np.arange(4.0), np.array([True, True, True, False]), np.array([9.0]), np.inf)
    assert found == OperatingPoint(0.75, 0, 0)


def test_what_is_told_apart_and_what_is_not() -> None:
    low_n, high_m = np.arange(50.0), np.arange(60.0, 90.0)
    right_n = np.arange(50) % 2 == 0
    assert (auroc(low_n, high_m), fpr_at_tpr(low_n, high_m), oscr(low_n, right_n, high_m)) == (1, 0, 0.5)
    assert (auroc(high_m, low_n), fpr_at_tpr(high_m, low_n)) == (0, 1)
    assert auroc(np.zeros(5), np.zeros(7)) == 0.5 and fpr_at_tpr(np.zeros(5), np.zeros(7)) == 1


@given(finite, finite, st.floats(0.1, 9))
def test_only_the_order_of_scores_counts(known_n: np.ndarray, unknown_m: np.ndarray, scale: float) -> None:
    is_right_n = np.arange(len(known_n)) % 3 > 0
    moved = [scale * values + 1 for values in (known_n, unknown_m)]
    if len({*moved[0], *moved[1]}) < len({*known_n, *unknown_m}):
        return  # rounding made a tie
    assert auroc(*moved) == auroc(known_n, unknown_m)
    assert fpr_at_tpr(*moved) == fpr_at_tpr(known_n, unknown_m)
    assert oscr(moved[0], is_right_n, moved[1]) == oscr(known_n, is_right_n, unknown_m)


def test_what_can_not_be_measured_is_refused() -> None:
    one_n, none_n = np.zeros(1), np.zeros(0)
    for known_n, unknown_m in ((one_n, none_n), (none_n, one_n)):
        with pytest.raises(ConfigError, match="at least one of each"):
            auroc(known_n, unknown_m)
    with pytest.raises(ConfigError, match="not a number"):
        fpr_at_tpr(one_n, np.array([np.nan]))
    with pytest.raises(ConfigError, match="true-positive rate of 95 is none"):
        fpr_at_tpr(one_n, one_n, 95)
    with pytest.raises(ConfigError, match="1 known images and 2 answers"):
        oscr(one_n, np.ones(2, bool), one_n)
