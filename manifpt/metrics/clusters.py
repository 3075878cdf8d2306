"""Clusters of generators by the distances of their fingerprints, and of images by their features.

Legend: B images, F features, S generators.

The paper gives NMI alone: not how it clusters, what, or into how many clusters. So both readings are here, and
`manifpt.metrics.alignment` looks at many numbers of clusters.
"""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import finite

__all__ = ["cut", "k_means", "tree_of"]


def tree_of(distance_ss: np.ndarray) -> np.ndarray:
    """The tree of an agglomerative clustering by average linkage (UPGMA), as SciPy draws it as a dendrogram.

    Args:
        distance_ss: float64 [S, S], symmetric, S at least 2; unbiased estimates below 0 count as 0.

    Returns:
        tree: float64 [S - 1, 4], SciPy's linkage matrix.

    Raises:
        ConfigError: one generator, or a number that is not finite.
    """
    if len(distance_ss) < 2:
        raise ConfigError(f"A tree needs 2 generators or more, and there are {len(distance_ss)}; add one.")
    condensed_p = squareform(finite(distance_ss), checks=False)
    tree: np.ndarray = hierarchy.linkage(np.maximum(condensed_p, 0), method="average")
    return tree


def cut(tree: np.ndarray, clusters: int) -> np.ndarray:
    """The clusters of a tree, where it has that many.

    Args:
        tree: of `tree_of`.
        clusters: from 1 to S.

    Returns:
        cluster_s: int64 [S], from 0 on.

    Raises:
        ConfigError: more clusters than generators, or none.
    """
    _refuse(clusters, len(tree) + 1, "generators")
    return hierarchy.cut_tree(tree, n_clusters=clusters)[:, 0].astype(np.int64)


def k_means(features_bf: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Clusters of images by k-means (scikit-learn's, the best of 10 starts): the likely reading of the paper.

    Args:
        features_bf: float [B, F], such as those before an attributor's last layer.
        clusters: from 1 to B.
        seed: of the starts.

    Returns:
        cluster_b: int64 [B], from 0 on.

    Raises:
        ConfigError: more clusters than images, none, or a number that is not finite.
    """
    from sklearn.cluster import KMeans

    _refuse(clusters, len(features_bf), "images")
    found = KMeans(clusters, n_init=10, random_state=seed).fit_predict(finite(features_bf))
    return np.asarray(found, np.int64)


def _refuse(clusters: int, count: int, what: str) -> None:
    if not 1 <= clusters <= count:
        raise ConfigError(f"{count} {what} can't be cut into {clusters} clusters; take 1 to {count}.")
