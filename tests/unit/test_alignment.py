"""Clusters and their alignment with design choices, against scikit-learn, direct resampling and simulations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from manifpt.errors import ConfigError
from manifpt.metrics.alignment import adjusted_rand, normalized_mutual_information, sweep
from manifpt.metrics.clusters import cut, k_means, tree_of


def table_of(one_b: np.ndarray, other_b: np.ndarray) -> np.ndarray:
    values, clusters = np.arange(9)[:, None] == one_b, np.arange(9)[:, None] == other_b
    return (values.astype(float) @ clusters.T)[None]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), values=st.integers(1, 9), clusters=st.integers(1, 9))
def test_the_scores_are_those_of_scikit_learn(seed: int, count: int, values: int, clusters: int) -> None:
    """Also where a side is not divided, or every item is alone."""
    rng = np.random.default_rng(seed)
    value_b, cluster_b = rng.integers(0, values, count), rng.integers(0, clusters, count)
    for other_b in (cluster_b, (value_b + 1) % values):
        table = table_of(value_b, other_b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many classes among few items
            nmi, ari = normalized_mutual_info_score(value_b, other_b), adjusted_rand_score(value_b, other_b)
        assert normalized_mutual_information(table)[0] == pytest.approx(nmi, rel=1e-10, abs=1e-10)
        assert adjusted_rand(table)[0] == pytest.approx(ari, rel=1e-10, abs=1e-10)


def test_a_sweep_is_direct_resampling_of_whole_generators() -> None:
    rng = np.random.default_rng(0)
    choice_g = np.array(["bn", "none", "bn", "gn", "gn", "none", "bn"])
    generator_b = np.repeat(np.arange(7), [3, 5, 2, 4, 4, 1, 6])
    clusters = {number: rng.integers(0, number, len(generator_b)) for number in (4, 2)}
    found = sweep(clusters, generator_b, choice_g, seed=3, rounds=40, level=0.8)
    # The same draws, in the direct form.
    drawing = np.random.default_rng(3)
    orders = drawing.permuted(np.tile(np.arange(7), (40, 1)), axis=1)
    times = drawing.multinomial(7, np.full(7, 1 / 7), size=40)
    assert [each.clusters for each in found.alignments] == [2, 4]
    means = np.zeros(3)
    for each in found.alignments:
        cluster_b = clusters[each.clusters]
        value = normalized_mutual_info_score(choice_g[generator_b], cluster_b)
        permuted = [normalized_mutual_info_score(choice_g[order][generator_b], cluster_b) for order in orders]
        drawn = [np.repeat(np.arange(len(generator_b)), of_round[generator_b]) for of_round in times]
        resampled = [normalized_mutual_info_score(choice_g[generator_b[rows]], cluster_b[rows]) for rows in drawn]
        assert each.nmi.value == pytest.approx(value)
        assert each.nmi.chance == pytest.approx(np.mean(permuted))
        assert each.nmi.p_value == (1 + sum(other >= value - 1e-12 for other in permuted)) / 41
        assert (each.nmi.low, each.nmi.high) == pytest.approx(tuple(np.quantile(resampled, [0.1, 0.9])))
        assert each.ari.value == pytest.approx(adjusted_rand_score(choice_g[generator_b], cluster_b))
        means += [value, np.mean(permuted), 1]
    assert (found.nmi.value, found.nmi.chance) == pytest.approx(tuple(means[:2] / means[2]))
    assert found == sweep(clusters, generator_b, choice_g, seed=3, rounds=40, level=0.8)


def test_clusters_that_follow_a_choice_are_told_from_chance() -> None:
    choice_g = np.repeat([0, 1, 2], 6)
    found = sweep({3: choice_g, 6: np.arange(18) // 3}, np.arange(18), choice_g, seed=0)
    assert found.alignments[0].nmi.value == pytest.approx(1)
    assert found.nmi.p_value < 0.001
    assert found.nmi.chance < 0.4 < found.nmi.low
    assert abs(found.alignments[0].ari.chance) < 0.02


def test_p_values_of_random_choices_are_uniform_though_their_nmi_is_high() -> None:
    rng = np.random.default_rng(1)
    cluster_g = np.arange(25) % 10
    found = [
        sweep({10: cluster_g}, np.arange(25), rng.integers(0, 4, 25), seed=trial, rounds=99).nmi for trial in range(300)
    ]
    assert np.mean([score.value for score in found]) == pytest.approx(0.36, abs=0.02)
    for level in (0.05, 0.2, 0.5):
        assert np.mean([score.p_value <= level for score in found]) <= level + 3 * (level * (1 - level) / 300) ** 0.5


def test_images_of_a_generator_are_no_independent_evidence() -> None:
    """100 images of each of 4 generators: an unlucky choice is not told from chance, however sure images make it."""
    generator_b = np.repeat(np.arange(4), 100)
    found = sweep({2: generator_b // 2}, generator_b, np.array([0, 0, 1, 1]), seed=0)
    assert found.nmi.value == pytest.approx(1)
    assert found.nmi.p_value == pytest.approx(1 / 3, abs=0.04)


def test_what_tells_nothing_is_refused() -> None:
    generator_g = np.arange(3)
    with pytest.raises(ConfigError, match="share one value"):
        sweep({2: generator_g % 2}, generator_g, np.zeros(3), seed=0)
    with pytest.raises(ConfigError, match="has no images"):
        sweep({2: generator_g % 2}, generator_g, np.arange(4), seed=0)
    with pytest.raises(ConfigError, match="no clusters"):
        sweep({}, generator_g, np.arange(3), seed=0)


@pytest.mark.parametrize("clusters", [1, 2, 5, 12])
def test_a_cut_tree_has_the_clusters_of_scikit_learn(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    distance_ss = rng.random((12, 12))
    distance_ss = distance_ss + distance_ss.T
    np.fill_diagonal(distance_ss, 0)
    theirs = AgglomerativeClustering(clusters, metric="precomputed", linkage="average").fit_predict(distance_ss)
    ours = cut(tree_of(distance_ss), clusters)
    assert len(np.unique(ours)) == clusters
    assert adjusted_rand_score(theirs, ours) == 1


def test_generators_that_are_alike_share_a_cluster_also_where_their_distance_is_below_0() -> None:
    distance_ss = np.array([[0, -0.1, 3, 2], [-0.1, 0, 2, 2], [3, 2, 0, 0.1], [2, 2, 0.1, 0]])
    tree = tree_of(distance_ss)
    assert (tree[:, 2] >= 0).all()
    np.testing.assert_array_equal(cut(tree, 2), [0, 0, 1, 1])


def test_k_means_finds_clouds_and_is_the_same_again() -> None:
    rng = np.random.default_rng(2)
    cloud_b = np.repeat(np.arange(3), 20)
    features_bf = 10 * np.eye(3, 5)[cloud_b] + rng.standard_normal((60, 5))
    found_b = k_means(features_bf, 3, seed=0)
    assert adjusted_rand_score(cloud_b, found_b) == 1
    np.testing.assert_array_equal(found_b, k_means(features_bf, 3, seed=0))


def test_impossible_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="take 1 to 2"):
        cut(tree_of(np.zeros((2, 2))), 3)
    with pytest.raises(ConfigError, match="4 images"):
        k_means(np.zeros((4, 2)), 5, seed=0)
    with pytest.raises(ConfigError, match="2 generators or more"):
        tree_of(np.zeros((1, 1)))
    with pytest.raises(ConfigError, match="finite"):
        tree_of(np.full((2, 2), np.nan))
