"""Silhouette and leave-one-out accuracy against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, silhouette_samples
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from manifpt.errors import ConfigError
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.separability import leave_one_out_accuracy, silhouette
from tests.helpers.shardings import sharding

LABEL_B = np.repeat(np.arange(3), [30, 12, 20])


def clouds(far: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((62, 4)) + far * np.eye(3, 4)[LABEL_B]


def test_leave_one_out_accuracy_is_that_of_scikit_learn_in_any_sharding() -> None:
    rng = np.random.default_rng(1)
    features_bf = clouds(1.5)
    predicted_b = cross_val_predict(KNeighborsClassifier(1), features_bf, LABEL_B, cv=LeaveOneOut())
    right, counted = [], []
    for queries in sharding(rng, 62, 3):
        state = Nearest.to(features_bf[queries], 1, own_b=queries)
        for shard in sharding(rng, 62, 4):
            state = state.add(features_bf[shard], shard)
        np.testing.assert_array_equal(LABEL_B[state.found.row_bk[:, 0]], predicted_b[queries])
        right.append(state.found.row_bk)
        counted.append(queries)
    queries = np.concatenate(counted)
    found = Nearest.to(features_bf, 1, own_b=np.arange(62)).add(features_bf, np.arange(62)).found
    np.testing.assert_array_equal(np.concatenate(right), found.row_bk[queries])
    expected = balanced_accuracy_score(LABEL_B, predicted_b)
    assert leave_one_out_accuracy(found, LABEL_B, LABEL_B) == pytest.approx(expected)
    assert 0.5 < expected < 1


def test_separation_grows_with_the_distance_of_sources() -> None:
    values = [silhouette(clouds(far), LABEL_B) for far in (0, 2, 5, 50)]
    assert values == sorted(values)
    assert values[0] < 0.05
    assert values[-1] > 0.9
    assert values[1] == pytest.approx(silhouette_samples(clouds(2), LABEL_B).mean(), rel=1e-12)


def test_what_can_not_be_separated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 source\(s\)"):
        silhouette(clouds(0), np.zeros(62))
    with pytest.raises(ConfigError, match="62 source"):
        silhouette(clouds(0), np.arange(62))
    lonely = Nearest.to(np.zeros((1, 2)), 1, own_b=np.zeros(1, np.int64)).add(np.zeros((1, 2)), np.zeros(1, np.int64))
    with pytest.raises(ConfigError, match="no other image"):
        leave_one_out_accuracy(lonely.found, np.zeros(1, np.int64), np.zeros(1, np.int64))
