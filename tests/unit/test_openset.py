"""Statistics of features, scores of unknownness, and the threshold that validation sets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.covariance import oas as their_oas

from manifpt.attributor.features import FeatureStatistics, feature_statistics, oas
from manifpt.attributor.openset import SCORES, OpenSet, chosen_on, scorer, threshold_at, usual_of, validation_aurocs
from manifpt.attributor.outputs import Outputs
from manifpt.metrics.openset import auroc


def features_of(seed: int, count: int = 300, labels: int = 4, features: int = 6, apart: float = 3.0) -> Outputs:
    """Labels that lie apart, with features of unequal spread; and logits that follow them."""
    rng = np.random.default_rng(seed)
    label_n = rng.permutation(np.arange(count) % labels)
    mean_sf = apart * np.random.default_rng(99).standard_normal((labels, features))
    features_nf = mean_sf[label_n] + rng.standard_normal((count, features)) * np.linspace(0.1, 2, features)
    logits_ns = -cdist(features_nf, mean_sf) + 0.1 * rng.standard_normal((count, labels))
    spectrum_nk = label_n[:, None] + (1 + label_n[:, None]) * rng.standard_normal((count, 3)) * [1, 2, 0.1]
    said = (values.astype(np.float32) for values in (logits_ns, features_nf, spectrum_nk))
    return Outputs(*said, label_n, np.arange(count))


def statistics_of(found: Outputs) -> FeatureStatistics:
    return feature_statistics([found], found.logits_bs.shape[1], found.features_bf.shape[1], found.spectrum_bk.shape[1])


def by_hand(features_nf: np.ndarray, label_n: np.ndarray, labels: int) -> tuple[np.ndarray, np.ndarray]:
    features_nf = features_nf.astype(np.float64)
    mean_sf = np.stack([features_nf[label_n == label].mean(axis=0) for label in range(labels)])
    rest_nf = features_nf - mean_sf[label_n]
    return mean_sf, rest_nf.T @ rest_nf / len(rest_nf)


# --- statistics ---


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), block=st.integers(1, 70), offset=st.sampled_from([0.0, 1e4]))
def test_blocks_and_offsets_change_no_statistic(seed: int, block: int, offset: float) -> None:
    found = features_of(seed, count=90)
    features_nf = found.features_bf + offset
    moved = replace(found, features_bf=features_nf)
    blocks = [moved.take(np.arange(n, min(n + block, 90))) for n in range(0, 90, block)]
    merged = feature_statistics(blocks, 4, 6, 3)
    mean_sf, within_ff = by_hand(features_nf, found.label_b, 4)
    np.testing.assert_allclose(merged.mean_sf, mean_sf, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.within_ff, within_ff, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(merged.mean_f, features_nf.mean(axis=0, dtype=np.float64), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(merged.total_ff, np.cov(features_nf.astype(float).T, bias=True), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(merged.count_s, np.bincount(found.label_b))
    for label in range(4):
        spectrum_nk = found.spectrum_bk[found.label_b == label].astype(float)
        np.testing.assert_allclose(merged.spectrum_sk[label], spectrum_nk.mean(axis=0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(merged.spread_skk[label], np.cov(spectrum_nk.T, bias=True), rtol=1e-7, atol=1e-9)


def test_workers_together_have_what_one_would() -> None:
    """Of which one has none of a label."""
    found = features_of(1)
    order_n = np.argsort(found.label_b, kind="stable")
    shares = [order_n[:100], order_n[100:170], order_n[170:]]
    given: list[np.ndarray] = [np.zeros(0)] * len(shares)
    all_gave = Barrier(len(shares))

    def worked(rank: int) -> FeatureStatistics:
        def reduce(sums: np.ndarray) -> np.ndarray:
            given[rank] = sums
            all_gave.wait(10)
            total = np.asarray(sum(given))
            all_gave.wait(10)  # before any worker gives its next
            return total

        return feature_statistics([found.take(shares[rank])], 4, 6, 3, reduce)

    alone = statistics_of(found)
    with ThreadPoolExecutor(len(shares)) as pool:
        for merged in pool.map(worked, range(len(shares))):
            for name in ("count_s", "mean_sf", "within_ff", "spectrum_sk", "spread_skk"):
                np.testing.assert_allclose(getattr(merged, name), getattr(alone, name), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(2, 60), features=st.integers(2, 40))
def test_shrinkage_is_scikit_learns(seed: int, count: int, features: int) -> None:
    rows_nf = np.random.default_rng(seed).standard_normal((count, features)) * np.linspace(0.1, 3, features)
    expected_ff, _ = their_oas(rows_nf)
    np.testing.assert_allclose(oas(np.cov(rows_nf.T, bias=True), count), expected_ff, rtol=1e-9, atol=1e-12)


def test_a_covariance_that_lacks_rank_has_it_afterwards() -> None:
    """As where a unit never fires, or all images are one."""
    for covariance_ff in (np.diag([1.0, 2.0, 0.0]), np.zeros((3, 3))):
        assert np.linalg.eigvalsh(oas(covariance_ff, 50)).min() > 0


def test_statistics_survive_their_file() -> None:
    known = statistics_of(features_of(2))
    again = FeatureStatistics.from_bytes(known.to_bytes())
    for name in ("count_s", "mean_sf", "within_ff", "spectrum_sk", "spread_skk"):
        np.testing.assert_array_equal(getattr(again, name), getattr(known, name))


def test_axes_are_the_principal_ones_with_a_sign() -> None:
    known = statistics_of(features_of(3))
    axes_af = known.axes()
    np.testing.assert_allclose(axes_af @ axes_af.T, np.eye(6), atol=1e-12)
    variance_a = np.diag(axes_af @ known.total_ff @ axes_af.T)
    assert (np.diff(variance_a) <= 1e-9).all() and variance_a.sum() == pytest.approx(np.trace(known.total_ff))
    assert all(axis_f[np.abs(axis_f).argmax()] > 0 for axis_f in axes_af)


def test_coordinates_and_the_rest_keep_all_distances_from_the_mean() -> None:
    found = features_of(4, features=40)
    known = statistics_of(found)
    openset = OpenSet(known, known.axes(), 1.0, "distance", {}, 1.0)
    feature_ba = openset.coordinates(found.features_bf)
    assert feature_ba.shape == (300, 33) and feature_ba.dtype == np.float32 and (feature_ba[:, -1] >= 0).all()
    lengths_b = np.linalg.norm(found.features_bf - known.mean_f, axis=1)
    np.testing.assert_allclose(np.linalg.norm(feature_ba, axis=1), lengths_b, rtol=1e-5)
    assert openset.coordinates(found.features_bf[:0]).shape == (0, 33)


# --- scores ---


def test_scores_by_their_definitions() -> None:
    found = features_of(5)
    known, logits_bs = statistics_of(found), found.logits_bs.astype(np.float64)
    say = {name: scorer(name, 1.7, known)(found) for name in SCORES}
    assert all(score_b.dtype == np.float32 and score_b.shape == (300,) for score_b in say.values())
    probability_bs = np.exp(logits_bs / 1.7) / np.exp(logits_bs / 1.7).sum(axis=1, keepdims=True)
    largest_b = probability_bs.max(axis=1)
    np.testing.assert_allclose(say["softmax"], np.log((1 - largest_b) / largest_b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(say["energy"], -np.log(np.exp(logits_bs).sum(axis=1)), rtol=1e-5, atol=1e-6)
    within_ff, total_ff = (np.linalg.inv(oas(covariance, 300)) for covariance in (known.within_ff, known.total_ff))
    squared_b = cdist(found.features_bf, known.mean_sf, "mahalanobis", VI=within_ff).min(axis=1) ** 2
    background_b = cdist(found.features_bf, known.mean_f[None], "mahalanobis", VI=total_ff)[:, 0] ** 2
    np.testing.assert_allclose(say["distance"], squared_b, rtol=1e-5)
    np.testing.assert_allclose(say["relative_distance"], squared_b - background_b, rtol=1e-4, atol=1e-4)
    predicted_b = logits_bs.argmax(axis=1)
    pooled_kk = np.mean(known.spread_skk, axis=0)  # labels are of one size
    for n in range(0, 300, 7):
        spectrum_nk = found.spectrum_bk[found.label_b == predicted_b[n]].astype(float)
        count = len(spectrum_nk)
        spread_kk = oas((count * np.cov(spectrum_nk.T, bias=True) + 3 * pooled_kk) / (count + 3), count + 3)
        apart_k = found.spectrum_bk[n] - spectrum_nk.mean(axis=0)
        squared = apart_k @ np.linalg.solve(spread_kk + 1e-4 * np.eye(3), apart_k)
        assert say["spectrum"][n] == pytest.approx(np.sqrt(squared), rel=1e-4)
    usual = usual_of("energy", found, 1.7, known)
    parts = [
        np.maximum((say[name] - np.median(say[name])) / np.subtract(*np.quantile(say[name], [0.75, 0.25])), -1)
        for name in ("energy", "spectrum")
    ]
    both_b = scorer("energy+spectrum", 1.7, known, usual)(found)
    np.testing.assert_allclose(both_b, np.sum(parts, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "energy", "distance", "relative_distance"])
def test_certainty_does_not_outweigh_an_odd_spectrum(name: str) -> None:
    """An unseen source of large artifacts makes a network surer than any known one does."""
    found = features_of(11)
    known = statistics_of(found)
    sure_bs = 40 * np.eye(4, dtype=np.float32)[found.label_b]
    odd = Outputs(sure_bs, known.mean_sf[found.label_b], found.spectrum_bk + 40, found.label_b, found.row_b)
    usual = usual_of(name, found, 1.0, known)
    alone, added = (
        auroc(*(scorer(each, 1.0, known, usual)(outputs) for outputs in (found, odd)))
        for each in (name, f"{name}+spectrum")
    )
    assert alone < 0.1 and added > 0.95


def test_a_label_of_few_images_has_the_spread_of_all() -> None:
    """One image has none of its own; that of two is a line, off which everything would be odd."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(np.arange(4), [400, 400, 2, 1])
    spectrum_nk = (0.2 * rng.standard_normal((803, 12))).astype(np.float32)
    known = statistics_of(Outputs(np.zeros((803, 4)), np.zeros((803, 6)), spectrum_nk, label_n, label_n))

    def score(spectrum_bk: np.ndarray, label: int) -> np.ndarray:
        number_b = np.full(len(spectrum_bk), label)
        sure_bs = np.eye(4)[number_b]
        return scorer("spectrum", 1.0, known)(
            Outputs(sure_bs, np.zeros((len(number_b), 6)), spectrum_bk, number_b, number_b)
        )

    usual = float(np.quantile(score(spectrum_nk, 0), 0.95))
    for label in (2, 3):
        usual_here = score((0.2 * rng.standard_normal((500, 12))).astype(np.float32), label)
        assert np.median(usual_here) < 2 * usual
        assert (score(spectrum_nk[:50] + 2, label) > 2 * np.quantile(usual_here, 0.95)).all()


def test_images_that_are_all_alike_have_a_score() -> None:
    found = features_of(12).take(np.zeros(40, np.int64))
    found = replace(found, label_b=np.arange(40) % 4)
    known = statistics_of(found)
    score_b = scorer("energy+spectrum", 1.0, known, usual_of("energy", found, 1.0, known))(found)
    assert np.isfinite(score_b).all() and len(set(score_b.tolist())) == 1


def test_what_is_nearly_sure_has_no_ties() -> None:
    logits_bs = np.array([[50.0, 0.0], [60.0, 0.0], [80.0, 0.0]], np.float32)
    said = Outputs(logits_bs, np.zeros((3, 6)), np.zeros((3, 3)), np.zeros(3, np.int64), np.arange(3))
    score_b = scorer("softmax", 1.0, statistics_of(features_of(6)))(said)
    assert 0 > score_b[0] > score_b[1] > score_b[2]


@pytest.mark.parametrize("name", SCORES)
def test_what_lies_far_from_all_is_less_known(name: str) -> None:
    found = features_of(7)
    score = scorer(name, 1.0, statistics_of(found))
    between_bf = found.features_bf.mean(axis=0) + 0.1 * np.random.default_rng(0).standard_normal((50, 6))
    logits_bs = -cdist(between_bf, statistics_of(found).mean_sf)
    number_b = np.arange(50)
    between = Outputs(logits_bs, between_bf, np.full((50, 3), 8.0), number_b, number_b)
    assert auroc(score(found), score(between)) > 0.75


# --- the choice ---


def test_each_label_is_hidden_in_turn() -> None:
    found = features_of(8, labels=3)
    known, expected = statistics_of(found), {name: [] for name in SCORES}
    for hidden, others in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        is_hidden_n = found.label_b == hidden
        of_labels = (known.spectrum_sk[others], known.spread_skk[others])
        rest = FeatureStatistics(known.count_s[others], known.mean_sf[others], known.within_ff, *of_labels)
        for name in SCORES:
            score_n = scorer(name, 1.3, rest)(replace(found, logits_bs=found.logits_bs[:, others]))
            expected[name].append(auroc(score_n[~is_hidden_n], score_n[is_hidden_n]))
    aurocs = validation_aurocs(found, 1.3, known)
    assert aurocs == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_the_score_that_knows_something_is_chosen() -> None:
    """Logits of noise leave the distances, features of noise what comes of logits; the spectrum is added to either."""
    found = features_of(9)
    noise = np.random.default_rng(0)
    no_logits = replace(found, logits_bs=noise.standard_normal((300, 4)))
    no_features = replace(found, features_bf=noise.standard_normal((300, 6)))
    for outputs, names in ((no_logits, {"distance", "relative_distance"}), (no_features, {"softmax", "energy"})):
        known = statistics_of(outputs)
        chosen = chosen_on(outputs, 1.0, known, validation_aurocs(outputs, 1.0, known), 0.1)
        score, of_network = chosen.score, chosen.score.removesuffix("+spectrum")
        assert score == f"{of_network}+spectrum" and of_network in names
        assert set(chosen.usual) == {of_network, "spectrum"}
        score_n = chosen.scores(outputs)
        assert chosen.threshold == threshold_at(score_n, outputs.label_b, 0.1)


def test_an_open_set_survives_its_files() -> None:
    found = features_of(10)
    known = statistics_of(found)
    for threshold in (3.25, float("inf")):
        openset = OpenSet(
            known, known.axes(), 1.5, "energy+spectrum", {"energy": (1.5, 2.0), "spectrum": (0, 1)}, threshold
        )
        again = OpenSet.from_bytes(openset.to_bytes(), 1.5, openset.chosen())
        assert again.chosen() == openset.chosen() and again.threshold == threshold
        for read in (
            lambda o: o.scores(found),
            lambda o: o.coordinates(found.features_bf),
        ):
            np.testing.assert_array_equal(read(again), read(openset))


# --- the threshold ---


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rate=st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]),
)
def test_the_threshold_is_the_lowest_that_keeps_the_rate(seed: int, counts: list[int], rate: float) -> None:
    rng = np.random.default_rng(seed)
    label_n = np.repeat(np.arange(len(counts)), counts)
    score_n = rng.integers(0, 12, len(label_n)).astype(np.float32)  # with ties

    def share(threshold: float) -> float:
        of_label = [score_n[label_n == label] for label in range(len(counts))]
        return float(np.mean([((values > threshold).sum() + 1) / (len(values) + 1) for values in of_label]))

    found = threshold_at(score_n, label_n, rate)
    lower = [value for value in score_n if value < found]
    assert all(share(value) > rate + 1e-12 for value in lower)
    if np.isfinite(found):
        assert share(found) <= rate + 1e-12 and found in score_n
    else:
        assert share(score_n.max()) > rate + 1e-12


def test_too_few_images_for_a_rate_have_no_threshold() -> None:
    assert threshold_at(np.arange(18.0), np.zeros(18, np.int64), 0.05) == np.inf
    assert threshold_at(np.arange(19.0), np.zeros(19, np.int64), 0.05) == 18


def test_new_images_of_known_sources_are_called_unknown_no_more_often_than_stated() -> None:
    """Over 4,000 simulated validation sets, of labels whose scores and numbers differ."""
    rng = np.random.default_rng(0)
    label_n, scale_s = np.repeat([0, 1, 2], [25, 60, 100]), np.array([1.0, 2.0, 1.5])
    alarms = 0.0
    for _ in range(4_000):
        threshold = threshold_at(rng.exponential(scale_s[label_n]), label_n, 0.1)
        alarms += np.exp(-threshold / scale_s).mean()  # the mean over labels of the share above it
    assert 0.075 < alarms / 4_000 <= 0.1
