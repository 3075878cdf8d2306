"""What training artifacts look like to a network and in their spectra: a mean a label, and what is left around it.

Legend: B artifacts of a block, N of all, S labels, F features, A principal axes, K numbers of a spectrum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

from manifpt.attributor.outputs import Outputs

__all__ = ["STATISTICS", "FeatureStatistics", "feature_statistics", "oas"]

STATISTICS = "features.safetensors"  # in a training's folder
_AXES = 32  # A at most
_NAMES = ("count_s", "mean_sf", "within_ff", "spectrum_sk", "spread_skk")


@dataclass(frozen=True)
class FeatureStatistics:
    """Of N training artifacts; every label has some.

    Attributes:
        count_s: float64 [S], artifacts of each label.
        mean_sf: float64 [S, F], each label's mean.
        within_ff: float64 [F, F], the covariance around each artifact's own label's mean, of all labels pooled.
        spectrum_sk: float64 [S, K], each label's mean spectrum.
        spread_skk: float64 [S, K, K], the covariance of each label's spectra.
    """

    count_s: np.ndarray
    mean_sf: np.ndarray
    within_ff: np.ndarray
    spectrum_sk: np.ndarray
    spread_skk: np.ndarray

    @classmethod
    def from_bytes(cls, data: bytes) -> FeatureStatistics:
        """The inverse of `to_bytes`.

        Raises:
            LookupError, ValueError, SafetensorError: other data.
        """
        found = load(data)
        return cls(*(found[name] for name in _NAMES))

    def to_bytes(self, **more: np.ndarray) -> bytes:
        """As safetensors, with what others may want to read beside."""
        tensors = {name: getattr(self, name) for name in _NAMES} | more
        return bytes(save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))

    @property
    def mean_f(self) -> np.ndarray:
        """float64 [F], of all artifacts."""
        return np.asarray(self.count_s @ self.mean_sf / self.count_s.sum())

    @property
    def total_ff(self) -> np.ndarray:
        """float64 [F, F], the covariance around `mean_f`: within the labels and between them."""
        apart_sf = self.mean_sf - self.mean_f
        return np.asarray(self.within_ff + (apart_sf.T * self.count_s) @ apart_sf / self.count_s.sum())

    def without(self, label: int) -> FeatureStatistics:
        """As if there were no such label. What it adds to the pooled covariance stays: it isn't kept label by label."""
        count_s, mean_sf, spectrum_sk, spread_skk = (
            np.delete(of_labels, label, 0)
            for of_labels in (self.count_s, self.mean_sf, self.spectrum_sk, self.spread_skk)
        )
        return FeatureStatistics(count_s, mean_sf, self.within_ff, spectrum_sk, spread_skk)

    def axes(self) -> np.ndarray:
        """float64 [A, F], principal axes of all artifacts' features, the largest first; A is 32, or F if that is less.

        An axis points to where its largest component is positive, since a sign would else be a matter of chance.
        """
        _, axis_fa = np.linalg.eigh(self.total_ff)
        axes_af = axis_fa.T[::-1][:_AXES]
        largest_a = np.abs(axes_af).argmax(axis=1)
        return np.asarray(axes_af * np.sign(axes_af[np.arange(len(axes_af)), largest_a])[:, None])


def feature_statistics(
    blocks: Iterable[Outputs],
    labels: int,
    features: int,
    numbers: int,
    reduce: Callable[[np.ndarray], np.ndarray] = lambda sums: sums,
) -> FeatureStatistics:
    """One pass over what a network says; memory is that of F x F, S x F and S x K x K numbers, however many artifacts.

    Blocks are merged by their moments (Chan, Golub and LeVeque 1979), as in `training.mean_and_std`.

    Args:
        blocks: of this worker.
        labels: S; all workers together have artifacts of each.
        features: F.
        numbers: K.
        reduce: sums over all workers.
    """
    count_s, mean_sf, scatter_ff = np.zeros(labels), np.zeros((labels, features)), np.zeros((features, features))
    spectrum_sk, scatter_skk = np.zeros((labels, numbers)), np.zeros((labels, numbers, numbers))
    for block in blocks:
        features_bf, label_b = block.features_bf.astype(np.float64), block.label_b
        of_block_s = np.bincount(label_b, minlength=labels).astype(np.float64)
        is_label_sb = (np.arange(labels)[:, None] == label_b).astype(np.float64)
        block_mean_sf = is_label_sb @ features_bf / np.maximum(of_block_s, 1)[:, None]
        rest_bf = features_bf - block_mean_sf[label_b]
        total_s = np.maximum(count_s + of_block_s, 1)
        apart_sf = block_mean_sf - mean_sf
        scatter_ff += rest_bf.T @ rest_bf + (apart_sf.T * (count_s * of_block_s / total_s)) @ apart_sf
        mean_sf += apart_sf * (of_block_s / total_s)[:, None]
        for label in np.unique(label_b):
            spectrum_bk = block.spectrum_bk[label_b == label].astype(np.float64)
            rest_bk = spectrum_bk - spectrum_bk.mean(axis=0)
            apart_k, share = spectrum_bk.mean(axis=0) - spectrum_sk[label], of_block_s[label] / total_s[label]
            scatter_skk[label] += rest_bk.T @ rest_bk + count_s[label] * share * np.outer(apart_k, apart_k)
            spectrum_sk[label] += share * apart_k
        count_s += of_block_s
    all_count_s = reduce(count_s)
    all_mean_sf = reduce(mean_sf * count_s[:, None]) / np.maximum(all_count_s, 1)[:, None]
    apart_sf = mean_sf - all_mean_sf
    all_scatter_ff = reduce(scatter_ff + (apart_sf.T * count_s) @ apart_sf)
    all_spectrum_sk = reduce(spectrum_sk * count_s[:, None]) / np.maximum(all_count_s, 1)[:, None]
    apart_sk = spectrum_sk - all_spectrum_sk
    all_scatter_skk = reduce(scatter_skk + count_s[:, None, None] * apart_sk[:, :, None] * apart_sk[:, None])
    spread_skk = all_scatter_skk / np.maximum(all_count_s, 1)[:, None, None]
    within_ff = all_scatter_ff / all_count_s.sum()
    return FeatureStatistics(all_count_s, all_mean_sf, within_ff, all_spectrum_sk, spread_skk)


def oas(covariance_ff: np.ndarray, count: float) -> np.ndarray:
    """A covariance shrunk towards a multiple of the identity: float64 [F, F], of full rank, also where it was zero.

    (1 - rho) C + rho tr(C) / F I with the oracle approximating shrinkage (Chen et al., IEEE Trans. Signal Processing
    58, 2010, eq. 23, as scikit-learn has it: without the terms of 2 / F), which needs nothing of the images but their
    covariance and count. F features of a network have few images a feature, and directions in which none differed in
    training must not decide a distance.

    Args:
        covariance_ff: float64 [F, F], biased: a sum over images divided by their number.
        count: of images.
    """
    features = len(covariance_ff)
    mean_square, scale = np.mean(np.square(covariance_ff)), np.trace(covariance_ff) / features or 1.0
    above, below = mean_square + scale**2, (count + 1) * (mean_square - scale**2 / features)
    rho = 1.0 if below <= 0 else min(above / below, 1.0)
    return np.asarray((1 - rho) * covariance_ff + rho * scale * np.eye(features))
