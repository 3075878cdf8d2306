"""Drift: p-values that hold at any number of images, what fires, and what must not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import binom, ks_2samp

from manifpt.errors import ConfigError
from manifpt.monitoring.drift import TESTS, Counts, Finding, Sample, drift, holm, stability_index
from manifpt.monitoring.strata import Strata, energy_test, norm_test

LABELS = 3
# Labels differ far more than anything that drifts: what is no drift within labels is a large one across them.
_CENTRE = np.array([[0, 0, 0, 0], [9, 0, 0, 0], [0, 9, 0, 0]], np.float32)


def sample(rng: np.random.Generator, images: int, mix: tuple[float, ...] = (0.4, 0.3, 0.3), shift: float = 0) -> Sample:
    place_b = rng.choice(LABELS, images, p=mix)
    return Sample(
        label_b=np.array([f"gan{place}" for place in place_b], object),
        distance_b=5 * place_b + rng.normal(size=images) + shift,
        feature_ba=(_CENTRE[place_b] + rng.normal(size=(images, 4))).astype(np.float32),
        spectrum_bk=(place_b[:, None] + rng.normal(size=(images, 3))).astype(np.float32),
        is_unknown_b=rng.random(images) < 0.05,
    )


def counts(rng: np.random.Generator, images: int, mix: tuple[float, ...] = (0.4, 0.3, 0.2, 0.05, 0.03, 0.02)) -> Counts:
    drawn = [int(count) for count in rng.multinomial(images, mix)]
    return Counts({f"gan{place}": drawn[place] for place in range(LABELS)}, *drawn[LABELS:])


def named(findings: list[Finding]) -> Mapping[str, Finding]:
    return {finding.name: finding for finding in findings}


def fired(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.fired}


def test_no_drift_raises_a_finding_in_at_most_the_stated_share_of_windows() -> None:
    rng, level, windows = np.random.default_rng(0), 0.2, 200
    false = 0
    for window in range(windows):  # a new baseline each time: windows are then independent
        mix = tuple(rng.dirichlet([3] * LABELS))
        before, now = counts(rng, 500), counts(rng, 60)
        false += bool(fired(drift(sample(rng, 120), sample(rng, 40, mix), before, now, level, window)))
    assert false <= binom.ppf(0.999, windows, level)
    assert false > 0, "a test that never fires sees nothing"


def in_groups(rng: np.random.Generator, images: int, groups: int) -> Sample:
    """Images of which those of `gan1` were made from a few latents, which decide most of norm and features."""
    found = sample(rng, images)
    of_latent = rng.integers(0, groups, images)
    is_one = found.label_b == "gan1"
    found.distance_b[is_one] += 3 * rng.normal(size=groups)[of_latent[is_one]]
    found.feature_ba[is_one] += 3 * rng.normal(size=(groups, 4))[of_latent[is_one]]
    return replace(found, group_b=np.where(is_one, of_latent.astype(str), None))


def test_images_that_come_in_groups_raise_no_more_findings_than_others() -> None:
    rng, level, windows = np.random.default_rng(7), 0.1, 100
    told, untold = 0, 0
    for window in range(windows):
        baseline, new = in_groups(rng, 120, 4), replace(in_groups(rng, 60, 4), group_b=None)
        found = drift(baseline, new, Counts(), Counts(), level, window)
        assert "not gan1: their held-out images come in groups" in named(found)["features"].detail
        told += bool(fired(found))
        untold += bool(fired(drift(replace(baseline, group_b=None), new, Counts(), Counts(), level, window)))
    assert told <= binom.ppf(0.999, windows, level)
    assert untold > windows / 2, "the case is no longer hard: nothing is shown"


def test_unknown_images_of_one_group_count_once() -> None:
    """Twenty unknown images of one latent are no sign that a fifth of all are."""
    groups = np.array(["a"] * 20 + [None] * 80, dtype=object)
    label_b, zero_b = np.full(100, "gan0", object), np.zeros(100)
    baseline = Sample(label_b, zero_b, *[np.zeros((100, 2), np.float32)] * 2, groups == "a", groups)
    one = baseline.independent()
    assert (len(one), one.is_unknown_b.sum()) == (81, 1)
    found = drift(baseline, replace(baseline, group_b=None), Counts(), Counts({"gan0": 80}, 20), 0.05, 0)
    assert fired(found) == {"unknown"} and "against 1 of 81 before" in named(found)["unknown"].detail


def test_a_label_comes_in_groups_if_most_of_its_images_do() -> None:
    """Others that were taken for it may: eight of twenty are of two latents, and one is alone in its group."""
    groups = np.array([*"aaaabbbbc", *[None] * 11], dtype=object)
    one = Sample(np.full(20, "gan0", object), np.zeros(20), *[np.zeros((20, 2))] * 2, np.zeros(20, bool), groups)
    assert one.grouped_labels() == set()
    assert one.take(np.arange(15)).grouped_labels() == {"gan0"}


@pytest.mark.parametrize("test", [norm_test, energy_test])
def test_p_values_of_permutations_are_uniform_where_nothing_changed(test: object) -> None:
    rng, rounds = np.random.default_rng(1), 400
    p_values = []
    for number in range(rounds):
        label_n, is_window_n = rng.integers(0, 3, 24), rng.random(24) < 0.4
        strata = Strata.of(label_n, is_window_n)
        value_n = rng.normal(size=24) + 10 * label_n
        if strata.rows_s:
            p_values.append(test(strata, value_n if test is norm_test else value_n[:, None], 19, number)[1])  # type: ignore[operator]
    for level in (0.05, 0.1, 0.25, 0.5):
        assert np.sum(np.array(p_values) <= level) <= binom.ppf(0.9995, len(p_values), level)
    assert np.mean(np.array(p_values) <= 0.5) > 0.4, "p-values that say nothing"


def test_a_window_with_another_mix_of_sources_changes_shares_alone() -> None:
    rng = np.random.default_rng(2)
    before, now = counts(rng, 2000), counts(rng, 400, (0.05, 0.05, 0.8, 0.05, 0.03, 0.02))
    found = drift(sample(rng, 600), sample(rng, 400, (0.05, 0.05, 0.9)), before, now, 0.05, 0)
    assert fired(found) == {"shares"}
    assert named(found)["shares"].statistic > 0.25


def test_norms_that_shift_in_every_label_are_found() -> None:
    rng = np.random.default_rng(3)
    same = counts(rng, 1000)
    assert fired(drift(sample(rng, 600), sample(rng, 200, shift=0.6), same, same, 0.05, 0)) == {"norms"}


def test_a_new_cluster_of_features_is_found_whatever_label_it_is_given() -> None:
    rng = np.random.default_rng(4)
    window, same = sample(rng, 200), counts(rng, 1000)
    window.feature_ba[:30, 3] += 5
    assert fired(drift(sample(rng, 600), window, same, same, 0.05, 0)) == {"features"}


def test_a_vector_has_no_spectrum_to_compare() -> None:
    rng, same = np.random.default_rng(6), Counts()
    baseline, window = (
        replace(each, spectrum_bk=each.spectrum_bk[:, :1]) for each in (sample(rng, 90), sample(rng, 40))
    )
    assert set(named(drift(baseline, window, same, same, 0.05, 0))) == {"norms", "features", "unknown"}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_change_of_spectra_alone_is_found_whatever_the_unit_of_a_ring(scale: float) -> None:
    """A ring of small deviations counts as much as one of large ones."""
    rng = np.random.default_rng(5)
    baseline, window, same = sample(rng, 600), sample(rng, 200), counts(rng, 1000)
    window.spectrum_bk[:60, 2] += 2.5
    for each in (baseline, window):
        each.spectrum_bk[:, 2] *= scale
    assert fired(drift(baseline, window, same, same, 0.05, 0)) == {"spectrum"}


@pytest.mark.parametrize("kind", ["unknown", "inconclusive", "rejected"])
def test_a_share_that_rises_is_found_and_one_that_falls_is_not(kind: str) -> None:
    low, high = (Counts({"gan0": 300, "gan1": 700}, **{kind: count}) for count in (10, 90))
    none = sample(np.random.default_rng(0), 0)
    risen = named(drift(none, none, low, high, 0.05, 0))
    assert {name for name, finding in risen.items() if finding.fired} == {kind}
    assert risen[kind].statistic == pytest.approx(90 / 1090 - 10 / 1010)
    assert not fired(drift(none, none, high, low, 0.05, 0))


def test_without_a_window_before_unknown_images_are_compared_with_the_baseline() -> None:
    rng = np.random.default_rng(5)
    window = replace(sample(rng, 160), is_unknown_b=np.arange(160) < 60)
    now = Counts({"gan0": 80, "gan1": 20}, unknown=12, inconclusive=48)  # of most, the verdict flips when re-encoded
    found = named(drift(sample(rng, 400), window, Counts(), now, 0.05, 0))
    assert set(found) == {"norms", "features", "spectrum", "unknown"}
    assert found["unknown"].fired


@pytest.mark.parametrize(("judged", "against"), [(5, "400"), (399, "400"), (400, "400 before"), (600, "600 before")])
def test_a_few_images_before_are_no_measure_of_unknown_ones(judged: int, against: str) -> None:
    """A first window of three images, and a generator that is new in the second one became what is usual."""
    rng = np.random.default_rng(5)
    window = replace(sample(rng, 160), is_unknown_b=np.arange(160) < 60)
    before, now = Counts({"gan0": judged}), Counts({"gan0": 100}, unknown=60)
    found = named(drift(sample(rng, 400), window, before, now, 0.05, 0))["unknown"]
    assert found.fired and against in found.detail


def test_where_every_window_alerted_shares_and_rejects_are_compared_with_those() -> None:
    rng = np.random.default_rng(5)
    now, other = Counts({"gan0": 10, "gan1": 90}, rejected=60), Counts({"gan0": 500, "gan1": 500}, unknown=300)
    found = named(drift(sample(rng, 400), sample(rng, 100), Counts(), now, 0.05, 0, other))
    assert {"shares", "rejected"} <= {name for name, finding in found.items() if finding.fired}
    assert "of 400" in found["unknown"].detail, "whose unknown images are no measure"
    quiet = named(drift(sample(rng, 400), sample(rng, 100), Counts({"gan1": 900}, rejected=900), now, 0.05, 0, other))
    assert not quiet["rejected"].fired, "one quiet window is what is usual"


def test_counts_beyond_a_billion_are_compared_too() -> None:
    rng = np.random.default_rng(5)
    many = Counts({"gan0": 10**9, "gan1": 2 * 10**9})
    found = named(drift(sample(rng, 50), sample(rng, 50), many, Counts({"gan0": 2 * 10**9, "gan1": 10**9}), 0.05, 0))
    assert found["shares"].fired
    few = named(drift(sample(rng, 50), sample(rng, 50), many, Counts({"gan2": 30}), 0.05, 0))["shares"]
    assert few.fired and few.detail.startswith("30 attributed images"), "a small window is not made smaller"


@pytest.mark.parametrize("images", [10, 100_000])
def test_small_and_large_windows_take_seconds_and_say_what_was_drawn(images: int) -> None:
    rng = np.random.default_rng(6)
    begin = time.monotonic()
    found = named(drift(sample(rng, 5000), sample(rng, images), counts(rng, 10**7), counts(rng, images), 0.05, 0))
    assert time.monotonic() - begin < 30  # 3 on a core of its own
    assert set(found) == set(TESTS)
    assert found["norms"].detail.startswith(f"{min(images, 2000):,} of the window's {images:,} images against 2,000 of")


def test_a_window_without_images_gives_no_finding() -> None:
    rng = np.random.default_rng(7)
    assert drift(sample(rng, 100), sample(rng, 0), counts(rng, 500), Counts(), 0.05, 0) == []


def test_a_window_that_was_all_rejected_is_one_finding() -> None:
    rng = np.random.default_rng(7)
    found = drift(sample(rng, 100), sample(rng, 0), Counts({"gan0": 500}, rejected=5), Counts(rejected=20), 0.05, 0)
    assert [finding.name for finding in found] == ["rejected"]
    assert found[0].fired


def test_labels_that_only_one_side_has_are_left_out() -> None:
    rng = np.random.default_rng(8)
    baseline, window = sample(rng, 100, (0.5, 0.5, 0)), sample(rng, 50, (0, 0, 1))
    assert not {"norms", "features"} & set(named(drift(baseline, window, Counts(), Counts(), 0.05, 0)))


def test_the_same_seed_gives_the_same_findings() -> None:
    baseline, window = sample(np.random.default_rng(9), 3000), sample(np.random.default_rng(10), 2500)
    before, now = counts(np.random.default_rng(11), 900), counts(np.random.default_rng(12), 90)
    assert drift(baseline, window, before, now, 0.2, 1) == drift(baseline, window, before, now, 0.2, 1)
    assert drift(baseline, window, before, now, 0.2, 1) != drift(baseline, window, before, now, 0.2, 2)


@pytest.mark.parametrize("level", [0, 1e-4, 1, 2, float("nan")])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"use 0\.05"):
        drift(sample(rng, 20), sample(rng, 20), Counts(), Counts(), level, 0)


@pytest.mark.parametrize("bad", ["distance_b", "feature_ba", "spectrum_bk"])
def test_numbers_that_are_not_finite_are_refused(bad: str) -> None:
    rng = np.random.default_rng(0)
    window = sample(rng, 20)
    getattr(window, bad)[3] = np.inf
    with pytest.raises(ConfigError, match="finite"):
        drift(sample(rng, 20), window, Counts(), Counts(), 0.05, 0)


def test_samples_without_any_difference_are_no_finding() -> None:
    """All norms, features and spectra the same: only rounding could tell one exchange from another."""
    same = Sample(np.full(81, "gan0", object), np.zeros(81), *[np.ones((81, 2), np.float32)] * 2, np.zeros(81, bool))
    findings = named(drift(same, same.take(np.arange(37)), Counts(), Counts(), 0.05, 0))
    assert [findings[name].p_value for name in ("norms", "features", "spectrum")] == [1.0, 1.0, 1.0]


def test_with_one_label_norms_have_the_statistic_of_scipy() -> None:
    rng = np.random.default_rng(13)
    value_n = np.concatenate([rng.normal(size=40), rng.normal(size=25) + 0.5]).round(1)  # with ties
    is_window_n = np.arange(65) >= 40
    seen, p_value = norm_test(Strata.of(np.zeros(65), is_window_n), value_n, 1999, 0)
    known = ks_2samp(value_n[is_window_n], value_n[~is_window_n])
    assert seen == pytest.approx(known.statistic, abs=1e-12)
    assert p_value == pytest.approx(known.pvalue, rel=0.35)


def test_features_have_the_energy_distance_of_all_pairs_weighted_over_labels() -> None:
    rng = np.random.default_rng(14)
    feature_nk, label_n, is_window_n = rng.normal(size=(50, 3)), rng.integers(0, 2, 50), rng.random(50) < 0.3
    expected, weights = 0.0, 0.0
    for label in (0, 1):
        one, other = (feature_nk[(label_n == label) & (is_window_n == side)] for side in (True, False))
        energy = 2 * cdist(one, other).mean() - cdist(one, one).mean() - cdist(other, other).mean()
        weight = len(one) * len(other) / (len(one) + len(other))
        expected, weights = expected + weight * energy, weights + weight
    seen, _ = energy_test(Strata.of(label_n, is_window_n), feature_nk, 19, 0)
    assert seen == pytest.approx(expected / weights, rel=1e-9)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holms_values_hold_what_bonferronis_do_and_are_never_larger(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, len(p_values) * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    assert np.array_equal(np.argsort(p_values, kind="stable"), np.argsort(adjusted, kind="stable")) or len(
        set(adjusted)
    ) < len(set(p_values))
    if p_values:
        assert min(adjusted) == pytest.approx(min(1, len(p_values) * min(p_values)))


def test_holms_values_are_those_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


_COUNTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=6)


@settings(deadline=None)
@given(_COUNTS)
def test_the_stability_index_is_symmetric_and_zero_for_equal_counts(pairs: list[tuple[int, int]]) -> None:
    before_s, now_s = np.array(pairs).T
    index = stability_index(before_s, now_s)
    assert index >= 0
    assert index == pytest.approx(float(stability_index(now_s, before_s)))
    assert stability_index(now_s, now_s) == 0


def test_counts_add_up() -> None:
    both = Counts({"a": 1, "b": 2}, 3, 4, 5).merged(Counts({"b": 10, "c": 20}, 30, 40, 50))
    assert both == Counts({"a": 1, "b": 12, "c": 20}, 33, 44, 55)
    assert (both.attributed, both.judged, both.images) == (33, 110, 165)
