"""Do clusters of fingerprints follow a design choice? NMI and ARI, with what chance gives and how sure they are.

Legend: B items (images, or generators), G generators, V values of a choice, K clusters, R rounds.

The paper reports NMI of clusters with up-sampling, loss and so on (table 5), and neither its number of clusters nor
what chance gives. With few generators and many clusters that is much: 25 generators in 10 clusters have an NMI of
0.36 or so with 4 values drawn at random. So every value comes with its mean under random choices, a p-value and an
interval, at each of several numbers of clusters.

The unit is the generator, since a choice is made once for all of its images: whole generators are permuted and
resampled. The scores are scikit-learn's, but of many tables of counts at once: a sweep over ten numbers of clusters
needs 80,000 of them, which takes half a second, and a quarter of an hour by calls of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from manifpt.errors import ConfigError

__all__ = ["Alignment", "Score", "Sweep", "adjusted_rand", "normalized_mutual_information", "sweep"]

_TIE = 1e-12  # rounding of scores that are equal


@dataclass(frozen=True, slots=True)
class Score:
    """A score of clusters against a choice.

    Attributes:
        value: of the clusters as they are.
        low, high: percentile interval over generators drawn with replacement, the clusters kept. Generators drawn twice
            agree with themselves, so it lies too high; with few generators it is only a hint.
        chance: its mean where the values of the choice are permuted among the generators.
        p_value: share of those permutations with at least `value`, the one that is observed among them (Phipson and
            Smyth 2010, section 4): never 0.
    """

    value: float
    low: float
    high: float
    chance: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Alignment:
    """Both scores at one number of clusters."""

    clusters: int
    nmi: Score
    ari: Score


@dataclass(frozen=True, slots=True)
class Sweep:
    """Both scores at several numbers of clusters.

    Attributes:
        alignments: by number of clusters, ascending.
        nmi, ari: of the means over them; one p-value each, so that no lucky number of clusters is looked for.
    """

    alignments: tuple[Alignment, ...]
    nmi: Score
    ari: Score


def normalized_mutual_information(table_rvk: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of both entropies, from 0 to 1; 1 where neither side is divided.

    As scikit-learn's `normalized_mutual_info_score` (average_method="arithmetic").

    Args:
        table_rvk: float64 [R, V, K], counts of items by value and cluster, one or more of each table.

    Returns:
        nmi_r: float64 [R].
    """
    share_rvk = table_rvk / table_rvk.sum(axis=(1, 2), keepdims=True)
    value_r, cluster_r = (entr(share_rvk.sum(axis=side)).sum(axis=1) for side in (2, 1))
    shared_r = value_r + cluster_r - entr(share_rvk).sum(axis=(1, 2))
    mean_r = (value_r + cluster_r) / 2
    return np.clip(np.divide(shared_r, mean_r, out=np.ones_like(mean_r), where=mean_r > 0), 0, 1)


def adjusted_rand(table_rvk: np.ndarray) -> np.ndarray:
    """The Rand index adjusted for chance (Hubert and Arabie 1985, eq. 5); 0 on average for clusters drawn at random.

    As scikit-learn's `adjusted_rand_score`; 1 where the two sides agree on every pair.

    Args:
        table_rvk: float64 [R, V, K], counts of items by value and cluster.

    Returns:
        ari_r: float64 [R].
    """
    both_r = _pairs(table_rvk).sum(axis=(1, 2))
    value_r, cluster_r = (_pairs(table_rvk.sum(axis=side)).sum(axis=1) for side in (2, 1))
    all_r = np.maximum(_pairs(table_rvk.sum(axis=(1, 2))), 1)
    chance_r, most_r = value_r * cluster_r / all_r, (value_r + cluster_r) / 2
    # Where most = chance, both sides have all pairs together, or none: they agree.
    return np.divide(both_r - chance_r, most_r - chance_r, out=np.ones_like(most_r), where=most_r > chance_r)


def _pairs(count: np.ndarray) -> np.ndarray:
    pairs: np.ndarray = count * (count - 1) / 2
    return pairs


def sweep(
    clusters: Mapping[int, np.ndarray],
    generator_b: np.ndarray,
    choice_g: np.ndarray,
    seed: int,
    rounds: int = 2000,
    level: float = 0.95,
) -> Sweep:
    """Scores of several clusterings against one design choice.

    Args:
        clusters: by number of clusters, int64 [B], the cluster of each item.
        generator_b: int64 [B], places in `choice_g`; generators whose choice isn't known have to be left out.
        choice_g: [G], values of the choice, of any type that sorts.
        seed: of permutations and resamples; they are the same for all numbers of clusters.
        rounds: R, of each.
        level: of the intervals.

    Raises:
        ConfigError: no clusterings, a choice that all generators share, or a generator without items.
    """
    value_v, value_g = np.unique(np.asarray(choice_g), return_inverse=True)
    count = len(value_g)
    if not clusters:
        raise ConfigError("There are no clusters to compare with a choice; name one number of clusters or more.")
    if len(value_v) < 2:
        raise ConfigError(
            f"{count} generators share one value of a design choice, which so tells nothing; leave it out."
        )
    if (np.bincount(generator_b, minlength=count) == 0).any():
        raise ConfigError("A generator of the design table has no images here; leave it out.")
    rng = np.random.default_rng(seed)
    order_rg = rng.permuted(np.tile(np.arange(count), (rounds, 1)), axis=1)
    times_rg = rng.multinomial(count, np.full(count, 1 / count), size=rounds).astype(np.float64)
    is_value_vg = (value_g == np.arange(len(value_v))[:, None]).astype(np.float64)
    sorts = (normalized_mutual_information, adjusted_rand)
    observed: list[list[float]] = []
    permuted, resampled = [], []
    for number in sorted(clusters):
        count_gk = _counts(generator_b, clusters[number], count)
        permuted_rvk = is_value_vg[:, order_rg].transpose(1, 0, 2) @ count_gk
        resampled_rvk = (is_value_vg * times_rg[:, None]) @ count_gk
        observed.append([float(of((is_value_vg @ count_gk)[None])[0]) for of in sorts])
        permuted.append([of(permuted_rvk) for of in sorts])
        resampled.append([of(resampled_rvk) for of in sorts])
    observed_c2, permuted_c2r, resampled_c2r = np.array(observed), np.array(permuted), np.array(resampled)

    def score(value: float, permuted_r: np.ndarray, resampled_r: np.ndarray) -> Score:
        low, high = np.quantile(resampled_r, [(1 - level) / 2, (1 + level) / 2])
        p_value = (1 + np.count_nonzero(permuted_r >= value - _TIE)) / (1 + rounds)
        return Score(float(value), float(low), float(high), float(permuted_r.mean()), float(p_value))

    alignments = tuple(
        Alignment(number, *map(score, observed_c2[place], permuted_c2r[place], resampled_c2r[place]))
        for place, number in enumerate(sorted(clusters))
    )
    means = (each.mean(axis=0) for each in (observed_c2, permuted_c2r, resampled_c2r))
    return Sweep(alignments, *map(score, *means))


def _counts(generator_b: np.ndarray, cluster_b: np.ndarray, generators: int) -> np.ndarray:
    """Items by generator and cluster, float64 [G, K]."""
    cluster_b = np.unique(cluster_b, return_inverse=True)[1]
    clusters = int(cluster_b.max()) + 1
    place_b = np.asarray(generator_b) * clusters + cluster_b
    return np.bincount(place_b, minlength=generators * clusters).reshape(generators, clusters).astype(np.float64)
