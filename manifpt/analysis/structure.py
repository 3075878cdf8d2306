"""How fingerprints lie to each other, in one space: distances, separability, clusters, and the designs behind them.

Legend: B images, S labels, G generators, D dimensions, F features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from manifpt.analysis.designs import Designs
from manifpt.manifest import REAL
from manifpt.metrics.alignment import Sweep, sweep
from manifpt.metrics.clusters import cut, k_means, tree_of
from manifpt.metrics.energy import NegativeDistance, energy_distance
from manifpt.metrics.frechet import fd_ratio_or_none, frechet_distances
from manifpt.metrics.mmd import CubicKernel, GaussianKernel, median_distance, squared_mmd
from manifpt.metrics.moments import moments_of
from manifpt.metrics.neighbors import Nearest
from manifpt.metrics.pairs import PairSums
from manifpt.metrics.separability import leave_one_out_accuracy, silhouette

__all__ = ["alignments", "arrangements", "fingerprint_distances", "images_for_pairs", "principal", "separability"]

_PAIR_WORK = 4e11  # multiplications over all pairs: half a minute of one core
_MOST_CLUSTERS = 10
_FEWEST_GENERATORS = 4
_BANDWIDTH_ROWS = 1000
_COMPONENTS = 50


def images_for_pairs(labels: int, dims: int) -> int:
    """How many images of each label all pairs can be looked at of."""
    return max(16, int(math.sqrt(_PAIR_WORK / dims) / labels))


def fingerprint_distances(artifact_bd: np.ndarray, label_b: np.ndarray, labels: int) -> dict[str, np.ndarray]:
    """Between the fingerprints of all labels: MMD^2 (two kernels), energy and Frechet distance, float64 [S, S] each.

    Frechet distances take as many images of each label as the smallest has, since their bias depends on that.

    Args:
        artifact_bd: float32 [B, D], all labels at least twice.
        label_b: int64 [B].
        labels: S.

    Raises:
        ConfigError: a label of one image.
    """
    some_bd = artifact_bd[np.random.default_rng(0).permutation(len(artifact_bd))[:_BANDWIDTH_ROWS]]
    are_equal = bool((some_bd == some_bd[0]).all())  # their MMD is 0 by any bandwidth
    cubic = CubicKernel(artifact_bd.shape[1])
    gaussian = GaussianKernel(1.0 if are_equal else median_distance(some_bd))
    sums = PairSums.of((cubic, gaussian, NegativeDistance()), labels).add_own(artifact_bd, label_b)
    least = int(np.bincount(label_b, minlength=labels).min())
    moments = [moments_of(artifact_bd[_evenly(np.flatnonzero(label_b == label), least)]) for label in range(labels)]
    return {
        "energy_distance": energy_distance(sums),
        "kid": squared_mmd(sums, cubic),
        "mmd_gaussian": squared_mmd(sums, gaussian),
        "frechet_distance": frechet_distances(moments),
    }


def _evenly(row_n: np.ndarray, most: int) -> np.ndarray:
    """So many of the rows, at equal steps: the first ones are of one folder."""
    return row_n[np.arange(most) * len(row_n) // most]


def separability(artifact_bd: np.ndarray, label_b: np.ndarray, seed: int) -> dict[str, float | None]:
    """How well labels are apart, untrained.

    Args:
        artifact_bd: float32 [B, D], at most one of each group: images that were made together are alike whatever made
            them.
        label_b: int64 [B], of two labels or more.
        seed: of the FD ratio's halves.
    """
    own_b = np.arange(len(label_b))
    nearest = Nearest.to(artifact_bd, 1, own_b).add(artifact_bd, own_b).found
    return {
        "silhouette": silhouette(artifact_bd, label_b),
        "leave_one_out_accuracy": leave_one_out_accuracy(nearest, label_b, label_b),
        "chance": 1 / len(np.unique(label_b)),
        "fd_ratio": fd_ratio_or_none(artifact_bd, label_b, seed),
    }


def principal(artifact_bd: np.ndarray, seed: int) -> np.ndarray:
    """The first 50 principal components (Halko et al. 2011, as scikit-learn has it), or all: float64 [B, F]."""
    from sklearn.decomposition import PCA

    components = min(_COMPONENTS, len(artifact_bd) - 1, artifact_bd.shape[1])
    found = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(artifact_bd)
    return np.asarray(found, np.float64)


def alignments(
    distance_ss: np.ndarray,
    feature_bf: np.ndarray,
    label_b: np.ndarray,
    labels: Sequence[str],
    designs: Designs,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Do clusters follow design choices? By choice: of the images, the paper's likely way, and of the generators.

    Images are clustered by k-means on their features, generators by the tree of their fingerprints' distances. Reals
    and generators whose choice isn't known are left out of both, so each choice has clusters of its own generators.

    Args:
        distance_ss: float64 [S, S], of fingerprints.
        feature_bf: float [B, F].
        label_b: int64 [B].
        labels: S names.
        designs: the design table.
        seed: of k-means' starts, permutations and resamples.

    Returns:
        By choice: `generators` and `values`, how many; then `why_not` it was judged, or `least_p`, below which no
        permutation test of so few generators can come; `clusters`, the sweep; `images` and `tree`, each with scores
        at as many clusters as values (`at_values`), their means over the sweep, and NMI `by_clusters`.
    """
    found: dict[str, dict[str, Any]] = {}
    clustered: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
    for name in designs.choices:
        of_label = [
            None if label == REAL else value for label, value in zip(labels, designs.of(labels, name), strict=True)
        ]
        known = tuple(place for place, value in enumerate(of_label) if value is not None)
        value_g = np.array([of_label[place] for place in known], dtype=str)
        values = len(np.unique(value_g))
        if len(known) < _FEWEST_GENERATORS or not 2 <= values < len(known):
            found[name] = {"generators": len(known), "values": values, "why_not": _why_not(len(known), values)}
            continue
        numbers = range(2, min(_MOST_CLUSTERS, len(known) - 1) + 1)
        is_known_b = np.isin(label_b, known)
        generator_b = np.searchsorted(known, label_b[is_known_b])
        of_images = clustered.setdefault(known, {})
        for number in {*numbers, values} - set(of_images):
            of_images[number] = k_means(feature_bf[is_known_b], number, seed)
        tree = tree_of(distance_ss[np.ix_(known, known)])
        by_tree = {number: cut(tree, number) for number in {*numbers, values}}
        everyone = np.arange(len(known))
        found[name] = {
            "generators": len(known),
            "values": values,
            "least_p": 1 / arrangements(np.unique(value_g, return_counts=True)[1].tolist()),
            "clusters": sorted(by_tree),
            "images": _told({n: of_images[n] for n in by_tree}, generator_b, value_g, values, seed),
            "tree": _told(by_tree, everyone, value_g, values, seed),
        }
    return found


def arrangements(counts: Sequence[int]) -> int:
    """In how many ways generators can be divided into groups of these sizes, whatever the groups are called."""
    ways = math.factorial(sum(counts))
    for size in counts:
        ways //= math.factorial(size)
    for same in Counter(counts).values():
        ways //= math.factorial(same)
    return ways


def _why_not(generators: int, values: int) -> str:
    if generators < _FEWEST_GENERATORS:
        return f"known of {generators} generators, {_FEWEST_GENERATORS} are needed"
    return "all share one value" if values < 2 else "each generator has a value of its own"


def _told(
    clusters: Mapping[int, np.ndarray], generator_b: np.ndarray, value_g: np.ndarray, values: int, seed: int
) -> dict[str, Any]:
    """At as many clusters as the choice has values, and over the whole sweep."""
    swept: Sweep = sweep(clusters, generator_b, value_g, seed)
    at_values = next(each for each in swept.alignments if each.clusters == values)
    return {
        "at_values": asdict(at_values),
        "mean": {"nmi": asdict(swept.nmi), "ari": asdict(swept.ari)},
        "by_clusters": {each.clusters: each.nmi.value for each in swept.alignments},
    }
