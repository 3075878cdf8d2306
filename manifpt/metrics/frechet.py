"""The Frechet distance of two sets of features, and the ratio of it between and within sources.

Legend: B images, M sets, S sets of all, F features, K rows of a root; K <= F.

A covariance S is held as a root R [K, F] with S = R^T R; see `manifpt.metrics.moments`. For two roots A and B and
C = A B^T,

    Tr((S1 S2)^(1/2)) = the sum of C's singular values.

For S1 S2 = A^T (A B^T B) has the eigenvalues of (A B^T B) A^T = C C^T, but for zeros, and those are the squares of C's
singular values. With A = S1^(1/2), C C^T is the symmetric S1^(1/2) S2 S1^(1/2). So 30 images of 2,048 features need
singular values of 30 x 30 numbers and no matrix of 2,048 x 2,048. Nor is there a square root of what rounding left of a
zero eigenvalue, which costs other forms half of float64's digits on covariances without full rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError
from manifpt.metrics.moments import Moments, moments_of

__all__ = [
    "FdRatio",
    "fd_ratio",
    "fd_ratio_or_none",
    "frechet_distance",
    "frechet_distances",
]

_BLOCK_NUMBERS = 1 << 23  # of stacked roots: 64 MiB


@dataclass(frozen=True, slots=True)
class FdRatio:
    """Separability of sources.

    Attributes:
        ratio: inter / intra; infinite where intra is 0 and inter is not, NaN where both are.
        inter: mean Frechet distance of two sources.
        intra: mean Frechet distance of two halves of a source.
        half_images: images in each set that was compared. Only ratios of the same number and features can be compared.
        features: F.
    """

    ratio: float
    inter: float
    intra: float
    half_images: int
    features: int


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)): a squared distance, in the square of the features' unit.

    The square of the 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; FID in Heusel et al. 2017). Its
    rounding is of order 1e-14 of the traces, and what that leaves below 0 is 0.

    Args:
        one, other: of the same F.
    """
    return float(_distances(one, [other])[0])


def frechet_distances(moments: Sequence[Moments]) -> np.ndarray:
    """Between all sets, such as the fingerprints of S generators: float64 [S, S], symmetric, 0 on the diagonal.

    Its bias grows as sets get smaller (see `fd_ratio`); distances of sets of one size can be compared with each other.

    Args:
        moments: S of them, of the same F.
    """
    distance_ss = np.zeros((len(moments), len(moments)))
    for (one, of_one), (other, of_other) in itertools.combinations(enumerate(moments), 2):
        distance_ss[one, other] = distance_ss[other, one] = frechet_distance(of_one, of_other)
    return distance_ss


def _distances(one: Moments, others: Sequence[Moments]) -> np.ndarray:
    """To each of several of the same K, float64 [M]: by few large products, since many small ones wait for threads."""
    rows = len(others[0].root_kf)
    step = max(1, _BLOCK_NUMBERS // (rows * len(one.mean_f)))
    parts = []
    for start in range(0, len(others), step):
        block = others[start : start + step]
        product_kmk = (one.root_kf @ np.concatenate([other.root_kf for other in block]).T).reshape(-1, len(block), rows)
        common_m = np.linalg.svd(product_kmk.transpose(1, 0, 2), compute_uv=False).sum(axis=1)
        gap_mf = np.stack([other.mean_f for other in block]) - one.mean_f
        trace_m = np.array([np.vdot(other.root_kf, other.root_kf) for other in block])
        parts.append((gap_mf**2).sum(axis=1) + (np.vdot(one.root_kf, one.root_kf) + trace_m - 2 * common_m))
    return np.maximum(np.concatenate(parts), 0)


def fd_ratio(features_bf: np.ndarray, label_b: np.ndarray, seed: int) -> FdRatio:
    """How much farther sources are from each other than from themselves (paper section 3, table 2: FDR).

    The paper doesn't give its estimator; ours, after Yu et al. 2019, who introduced the ratio: from every source two
    random disjoint halves of m images are drawn, m = half of the smallest source's images, rounded down.

    - intra = mean over sources of the Frechet distance of its two halves;
    - inter = mean over pairs of sources of the Frechet distance of their first halves.

    The distance of two finite sets is too large: for two sets of m images of one source its expectation is not 0 but
    2 Tr(S) / m from the means alone, and more from the covariances, up to about both traces where m << F. So all of
    intra is this bias, it falls as m grows, and the ratio of different sources rises with m without a limit. Because
    inter is computed from sets of the same m, it has a bias of the same kind: sources that are alike have a ratio near
    1 at every m and F. With halves within sources and whole ones between them, it would be below 1. Nothing corrects
    the bias. So two ratios can be compared only at the same m and F, and `FdRatio` holds both. One m for all sources
    leaves out images of large ones; with one for each, a ratio would change with the balance of the sources.

    25 sources of 60 images and 2,048 features take 0.2 s on one core. Where images outnumber features it is a pair
    that costs: 0.1 s at 512 features, 4 s at 2,048, where a source's root takes 32 MiB.

    Args:
        features_bf: float [B, F], such as those before an attributor's last layer.
        label_b: int64 [B].
        seed: of the halves; they also depend on the order of the rows.

    Raises:
        ConfigError: fewer than two sources, a source of fewer than 4 images, or a feature that is no finite number.
    """
    value_l, count_l = np.unique(label_b, return_counts=True)
    if len(value_l) < 2:
        raise ConfigError(f"The FD ratio compares sources, and there are images of {len(value_l)}; add another one.")
    if count_l.min() < 4:
        raise ConfigError(
            f"The source {value_l[count_l.argmin()]} has {count_l.min()} image(s), and the FD ratio needs 4 of each;"
            " add images or leave it out."
        )
    half = int(count_l.min() // 2)
    rng = np.random.default_rng(seed)
    first, intra = [], []
    for value in value_l:
        drawn_n = rng.permutation(np.flatnonzero(label_b == value))[: 2 * half]
        first.append(moments_of(features_bf[drawn_n[:half]]))
        intra.append(frechet_distance(first[-1], moments_of(features_bf[drawn_n[half:]])))
    inter = np.concatenate([_distances(one, first[number + 1 :]) for number, one in enumerate(first[:-1])])
    inter_mean, intra_mean = float(np.mean(inter)), float(np.mean(intra))
    if intra_mean > 0:
        ratio = inter_mean / intra_mean
    else:
        ratio = math.inf if inter_mean > 0 else math.nan
    return FdRatio(ratio, inter_mean, intra_mean, half, features_bf.shape[1])


def fd_ratio_or_none(features_bf: np.ndarray, label_b: np.ndarray, seed: int) -> float | None:
    """The ratio, as JSON can hold it; None where there is none: a source of fewer than 4 images, or equal features.

    Raises:
        ConfigError: a feature that is no finite number.
    """
    count_l = np.unique(label_b, return_counts=True)[1]
    if len(count_l) < 2 or count_l.min() < 4:
        return None
    ratio = fd_ratio(features_bf, label_b, seed).ratio
    return ratio if math.isfinite(ratio) else None
