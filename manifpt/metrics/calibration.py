"""How far a probability can be believed: confidence against accuracy, bin by bin.

Legend: B test images, S sources, M bins.

An image's confidence is its largest probability; of equal largest ones the first source is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError

__all__ = ["Reliability", "calibration_error_by_chance", "reliability"]

_BINS = 15
_ROUNDS = 200
_PROBABILITY_ERROR = 1e-3  # of a row's sum; float16 leaves less


@dataclass(frozen=True, slots=True)
class Reliability:
    """Images by confidence; bin m of M, from 1, holds those in ((m - 1) / M, m / M].

    Attributes:
        count_m: int64 [M].
        confidence_m: float64 [M], the mean of each bin's images; NaN where there are none.
        accuracy_m: float64 [M], the share of them whose source is told; NaN where there are none.
    """

    count_m: np.ndarray
    confidence_m: np.ndarray
    accuracy_m: np.ndarray

    @property
    def error(self) -> float:
        """Mean gap between confidence and accuracy (Guo et al., ICML 2017, section 2: ECE)."""
        is_there_m = self.count_m > 0
        gap_m = np.abs(self.accuracy_m - self.confidence_m)[is_there_m]
        return float(gap_m @ self.count_m[is_there_m] / self.count_m.sum())


def reliability(probability_bs: np.ndarray, label_b: np.ndarray, bins: int = _BINS) -> Reliability:
    """The numbers of a reliability diagram (Guo et al., ICML 2017, section 2).

    Args:
        probability_bs: float [B, S]; rows with a sum of 1.
        label_b: int64 [B].
        bins: M, of equal width.

    Raises:
        ConfigError: no images, not as many labels, or rows that are no probabilities.
    """
    if not len(label_b) or len(label_b) != len(probability_bs):
        raise ConfigError(f"There are {len(label_b)} labels and {len(probability_bs)} images: give one of each.")
    if bins < 1:
        raise ConfigError(f"A calibration error over {bins} bins is none; use 1 or more.")
    probability_bs = np.asarray(probability_bs, np.float64)
    sum_b = probability_bs.sum(axis=1)
    if not (probability_bs.min() >= 0 and np.abs(sum_b - 1).max() <= _PROBABILITY_ERROR):  # also false of NaN
        raise ConfigError("The rows given as probabilities are none; pass a softmax, not logits.")
    confidence_b = np.minimum(probability_bs.max(axis=1), 1)
    return _binned(confidence_b, probability_bs.argmax(axis=1) == label_b, bins)


def calibration_error_by_chance(probability_bs: np.ndarray, seed: int, bins: int = _BINS) -> float:
    """The mean error that these very probabilities would show on as many images if they were right.

    A bin's accuracy is a share of its images and differs from its confidence by chance, and the error adds up what
    differs: it is never zero, and larger for fewer images. Whether an image is told is drawn from its confidence, 200
    times (consistency resampling: Broecker and Smith, Weather and Forecasting 22, 2007).

    Args:
        probability_bs: float [B, S]; rows with a sum of 1.
        seed: of the draws.
        bins: M.
    """
    confidence_b = np.minimum(np.asarray(probability_bs, np.float64).max(axis=1), 1)
    rng = np.random.default_rng(seed)
    drawn = (rng.random(len(confidence_b)) < confidence_b for _ in range(_ROUNDS))
    return float(np.mean([_binned(confidence_b, is_right_b, bins).error for is_right_b in drawn]))


def _binned(confidence_b: np.ndarray, is_right_b: np.ndarray, bins: int) -> Reliability:
    bin_b = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_b)
    count_m = np.bincount(bin_b, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
        confidence_m = np.bincount(bin_b, weights=confidence_b, minlength=bins) / count_m
        accuracy_m = np.bincount(bin_b, weights=is_right_b, minlength=bins) / count_m
    return Reliability(count_m, confidence_m, accuracy_m)
