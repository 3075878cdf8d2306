"""How well sources are told: accuracies, confusion, and the interval of a difference of two methods.

Legend: B test images, S sources, R rounds of a bootstrap, G groups, K kinds of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError

__all__ = [
    "Difference",
    "accuracy",
    "balanced_accuracy",
    "confusion",
    "paired_bootstrap",
    "precision_recall",
]

_BLOCK_CELLS = 1 << 22  # rounds times kinds of groups that memory holds: 32 MiB


@dataclass(frozen=True, slots=True)
class Difference:
    """Accuracy of method a less that of method b, on the same images; 0.01 is one point.

    Attributes:
        mean: on the images as they are.
        low, high: ends of the interval.
    """

    mean: float
    low: float
    high: float


def accuracy(label_b: np.ndarray, predicted_b: np.ndarray) -> float:
    """Share of images whose source is told.

    Args:
        label_b, predicted_b: int64 [B].

    Raises:
        ConfigError: no images, or not the same number of both.
    """
    _refuse_mismatch(label_b, predicted_b)
    return float(np.mean(np.asarray(label_b) == predicted_b))


def balanced_accuracy(label_b: np.ndarray, predicted_b: np.ndarray) -> float:
    """Mean recall of the sources that have images; chance is 1 / their number, however unequal they are.

    Args:
        label_b, predicted_b: int64 [B].

    Raises:
        ConfigError: no images, or not the same number of both.
    """
    _refuse_mismatch(label_b, predicted_b)
    value_s, source_b = np.unique(label_b, return_inverse=True)
    right_s = np.bincount(source_b, weights=np.asarray(label_b) == predicted_b, minlength=len(value_s))
    return float(np.mean(right_s / np.bincount(source_b)))


def confusion(label_b: np.ndarray, predicted_b: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """Counts of images by true source (row) and predicted source (column).

    Args:
        label_b, predicted_b: int64 [B], places in `sources`.
        sources: S names.

    Returns:
        confusion_ss: int64 [S, S].

    Raises:
        ConfigError: no images, not the same number of both, or a number that is no source's.
    """
    _refuse_mismatch(label_b, predicted_b)
    label_b, predicted_b, count = np.asarray(label_b), np.asarray(predicted_b), len(sources)
    for number_b in (label_b, predicted_b):
        if number_b.min() < 0 or number_b.max() >= count:
            odd = number_b[(number_b < 0) | (number_b >= count)][0]
            raise ConfigError(f"The label {odd} is none of {count} sources; leave out images of sources unknown here.")
    return np.bincount(label_b * count + predicted_b, minlength=count * count).reshape(count, count)


def precision_recall(confusion_ss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of each source.

    Args:
        confusion_ss: int64 [S, S], true by predicted.

    Returns:
        precision_s: float64 [S], of the images said to be of a source, the share that are; NaN where none was.
        recall_s: float64 [S], of the images of a source, the share said to be; NaN where there are none.
    """
    right_s = np.diagonal(confusion_ss)
    said_s, held_s = confusion_ss.sum(axis=0), confusion_ss.sum(axis=1)
    undefined_s = np.full(len(confusion_ss), np.nan)
    precision_s = np.divide(right_s, said_s, out=undefined_s.copy(), where=said_s > 0)
    return precision_s, np.divide(right_s, held_s, out=undefined_s, where=held_s > 0)


def paired_bootstrap(
    correct_a_b: np.ndarray,
    correct_b_b: np.ndarray,
    seed: int,
    rounds: int = 10_000,
    level: float = 0.95,
    group_b: np.ndarray | None = None,
) -> Difference:
    """Percentile interval of the difference of two methods' accuracies (Efron and Tibshirani 1993, chapter 13).

    Images are resampled with what both methods say of them, so what makes an image hard for both cancels. With groups,
    whole groups are: images of one latent are not independent, and an interval over images would be too narrow. A
    round's difference is then a ratio of two sums, since groups differ in size.

    What a round sums is the same for groups of equal (size, difference), so it draws how often each kind comes, from a
    multinomial; that is the bootstrap's own distribution, not an approximation, and memory doesn't grow with B. The
    interval covers less than `level` says where there are few groups: below 20 or so it is only a hint.

    Args:
        correct_a_b, correct_b_b: bool [B], whether each method was right.
        seed: of the rounds.
        rounds: R.
        level: of the interval, between 0 and 1.
        group_b: int64 [B]; a negative number is an image alone. None: all are.

    Raises:
        ConfigError: no images, not the same number of all, one group only, or a level that is none.
    """
    _refuse_mismatch(correct_a_b, correct_b_b)
    if not 0 < level < 1 or rounds < 1:
        raise ConfigError(f"An interval of level {level} from {rounds} rounds is none; use 0.95 and 10000.")
    gain_b = np.asarray(correct_a_b, bool).astype(np.int64) - np.asarray(correct_b_b, bool)
    size_g, gain_g = np.ones(len(gain_b), np.int64), gain_b
    if group_b is not None:
        _refuse_mismatch(gain_b, group_b)
        group_b = np.where(np.asarray(group_b) < 0, -1 - np.arange(len(gain_b)), group_b)
        group_b = np.unique(group_b, return_inverse=True)[1]
        size_g = np.bincount(group_b)
        gain_g = np.bincount(group_b, weights=gain_b).astype(np.int64)
    groups = len(size_g)
    if groups < 2:
        raise ConfigError(f"{groups} group of test images can't be resampled; add images of other groups.")
    kind_k2, count_k = np.unique(np.stack([size_g, gain_g], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK_CELLS // len(kind_k2))
    parts = []
    for start in range(0, rounds, step):
        times_rk = rng.multinomial(groups, count_k / groups, size=min(step, rounds - start))
        size_r, sum_r = (times_rk @ kind_k2).T
        parts.append(sum_r / size_r)
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(gain_b.mean()), float(low), float(high))


def _refuse_mismatch(one_b: np.ndarray, other_b: np.ndarray) -> None:
    if not len(one_b) or len(one_b) != len(other_b):
        raise ConfigError(
            f"{len(one_b)} and {len(other_b)} test images are to be compared; give the same ones, at least one."
        )
