"""Maps of artifacts in the plane, to look at: t-SNE and UMAP. What lies near is alike; distances and sizes of islands
mean nothing.

Legend: B images, F features.
"""

from __future__ import annotations

import numpy as np

__all__ = ["images_for_maps", "tsne", "umap"]

_MOST_IMAGES = 3000  # readable, and half a minute
_PERPLEXITY = 30.0  # the released code's


def images_for_maps(labels: int) -> int:
    """How many images of each label a map can show."""
    return max(10, _MOST_IMAGES // labels)


def tsne(feature_bf: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton 2008; scikit-learn's), perplexity 30 as in the released code: float32 [B, 2].

    Args:
        feature_bf: float [B, F], B at least 4.
        seed: of what is random in it.
    """
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(feature_bf) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(feature_bf))


def umap(feature_bf: np.ndarray, seed: int) -> np.ndarray:
    """UMAP (McInnes et al. 2018; umap-learn's), with its default of 15 neighbours: float32 [B, 2].

    Args:
        feature_bf: float [B, F], B at least 4.
        seed: of what is random in it.
    """
    from umap import UMAP

    # A seed makes it use one thread, and it warns of that.
    return np.asarray(
        UMAP(n_neighbors=min(15, len(feature_bf) - 1), random_state=seed, n_jobs=1).fit_transform(feature_bf)
    )
