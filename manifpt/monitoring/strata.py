"""Two samples compared within labels: permutation tests that another mix of labels alone can't set off.

Legend: N images of both samples, K features or numbers of a spectrum, S labels that both samples have, P permutations.

A window brings more of one source and less of another than training did, and that is no drift of norms or features. So
an image is only ever exchanged with images of its own label. Where window and baseline are alike within each label,
all such exchanges are as likely as what was seen, and (1 + those that are as extreme) / (1 + P) is a p-value at any
number of images (Phipson and Smyth 2010, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from manifpt.errors import ConfigError
from manifpt.metrics.tiles import finite, tiles

__all__ = ["Strata", "energy_test", "norm_test"]

_DRAWS_AT_ONCE = 512  # permutations in memory: 16 MiB for 4,000 images
_ROUNDING = 1e-9  # of the largest statistic there could be: an exchange that gives the same again counts as extreme


@dataclass(frozen=True, slots=True)
class Strata:
    """Images of two samples by label; labels that only one sample has are left out.

    Attributes:
        rows_s: int64 [images of the label] each, places among the N images.
        is_window_s: bool [images of the label] each.
    """

    rows_s: tuple[np.ndarray, ...]
    is_window_s: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, label_n: np.ndarray, is_window_n: np.ndarray) -> Strata:
        """From labels [N], such as str, and bool [N]."""
        stratum_n = np.unique(label_n.astype(str), return_inverse=True)[1]
        rows_s = [np.flatnonzero(stratum_n == stratum) for stratum in range(stratum_n.max(initial=-1) + 1)]
        rows_s = [rows for rows in rows_s if 0 < is_window_n[rows].sum() < len(rows)]
        return cls(tuple(rows_s), tuple(is_window_n[rows] for rows in rows_s))

    @property
    def weight_s(self) -> np.ndarray:
        """float64 [S], sum 1: n m / (n + m) for n and m images, the inverse variance of a difference of two means."""
        count_s2 = np.array([[is_window.sum(), (~is_window).sum()] for is_window in self.is_window_s], np.float64)
        effective_s = count_s2.prod(axis=1) / count_s2.sum(axis=1)
        return effective_s / effective_s.sum()

    def scaled(self, values_nk: np.ndarray) -> np.ndarray:
        """float64 [N, K], each coordinate over its standard deviation within the labels of both samples together, which
        no exchange changes; one that never differs stays as it is.

        Raises:
            ConfigError: a number that is not finite.
        """
        scaled_nk = finite(values_nk)
        rest = [scaled_nk[rows] - scaled_nk[rows].mean(axis=0) for rows in self.rows_s]
        deviation_k = np.concatenate(rest).std(axis=0)
        return scaled_nk / np.where(deviation_k > 0, deviation_k, 1)

    def draws(self, permutations: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
        """The samples as they are, then permuted ones, some at a time.

        Yields:
            for each label float64 [images of the label, D]: 1 / n for the window's n images, -1 / m for the others.
        """
        contrast_s = [np.where(mask, 1 / mask.sum(), -1 / (~mask).sum()) for mask in self.is_window_s]
        yield tuple(contrast[:, None] for contrast in contrast_s)
        for start in range(0, permutations, _DRAWS_AT_ONCE):
            shape = (min(_DRAWS_AT_ONCE, permutations - start), 1)
            yield tuple(rng.permuted(np.tile(contrast, shape), axis=1).T for contrast in contrast_s)


def norm_test(strata: Strata, distance_n: np.ndarray, permutations: int, seed: int) -> tuple[float, float]:
    """Kolmogorov and Smirnov's two-sample statistic of norms, as percentiles among the images of a label.

    The largest difference of the two distribution functions of percentiles, each a mean over labels weighted by
    `Strata.weight_s`. With one label it is SciPy's `ks_2samp` statistic.

    Args:
        strata: at least one label.
        distance_n: float [N].
        permutations: P.
        seed: of the permutations.

    Returns:
        The statistic, from 0 to 1, and its p-value.

    Raises:
        ConfigError: a norm that is no finite number.
    """
    distance_n = finite(distance_n)
    percentile_n = np.concatenate([(rankdata(distance_n[rows]) - 0.5) / len(rows) for rows in strata.rows_s])
    order_n = np.argsort(percentile_n, kind="stable")
    is_last_n = np.append(np.diff(percentile_n[order_n]) > 0, True)
    weight_s = strata.weight_s

    def statistic(contrast_s: tuple[np.ndarray, ...]) -> np.ndarray:
        weighted_nd = np.concatenate([w * contrast for w, contrast in zip(weight_s, contrast_s, strict=True)])
        largest_d: np.ndarray = np.abs(np.cumsum(weighted_nd[order_n], axis=0)[is_last_n]).max(axis=0)
        return largest_d

    return _tested(strata, statistic, 1.0, permutations, seed)


def energy_test(strata: Strata, feature_nk: np.ndarray, permutations: int, seed: int) -> tuple[float, float]:
    """The energy distance of features within labels (Szekely and Rizzo 2013, section 2), a mean over labels.

    2 E|x - y| - E|x - x'| - E|y - y'|, each mean over all pairs, an image with itself included: so it is not below 0,
    and is there for a label with one image. Labels are weighted by `Strata.weight_s`.

    Args:
        strata: at least one label.
        feature_nk: float [N, K].
        permutations: P.
        seed: of the permutations.

    Returns:
        The statistic, in the unit of the features, and its p-value.

    Raises:
        ConfigError: a feature that is no finite number.
    """
    distance_s = [_distances(feature_nk[rows]) for rows in strata.rows_s]
    weight_s = strata.weight_s

    def statistic(contrast_s: tuple[np.ndarray, ...]) -> np.ndarray:
        total_d = np.zeros(contrast_s[0].shape[1])
        for weight, distance_nn, contrast_nd in zip(weight_s, distance_s, contrast_s, strict=True):
            total_d -= weight * np.einsum("nd,nd->d", contrast_nd, distance_nn @ contrast_nd)
        return total_d

    largest = float(sum(w * distance_nn.max() for w, distance_nn in zip(weight_s, distance_s, strict=True)))
    return _tested(strata, statistic, largest, permutations, seed)


def _distances(feature_nk: np.ndarray) -> np.ndarray:
    distance_nn = np.empty((len(feature_nk), len(feature_nk)))
    for tile in tiles(feature_nk, feature_nk):
        distance_nn[tile.one, tile.other] = np.sqrt(tile.squared_nm)
    return distance_nn


def _tested(
    strata: Strata,
    statistic: Callable[[tuple[np.ndarray, ...]], np.ndarray],
    largest: float,
    permutations: int,
    seed: int,
) -> tuple[float, float]:
    if not strata.rows_s:
        raise ConfigError("No label has images in both samples; compare images of the same attributor.")
    draws = strata.draws(permutations, np.random.default_rng(seed))
    seen = float(statistic(next(draws))[0])
    extreme = sum(int((statistic(contrast_s) >= seen - _ROUNDING * largest).sum()) for contrast_s in draws)
    return seen, (1 + extreme) / (1 + permutations)
