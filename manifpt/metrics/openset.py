"""How well images of unknown sources are told from those of known ones, by a score that is larger for unknown ones.

Legend: N images of known sources, M of unknown ones.

An image whose score is at most a threshold is *accepted*: it is taken for one of a known source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manifpt.errors import ConfigError

__all__ = ["OperatingPoint", "auroc", "fpr_at_tpr", "operating_point", "oscr"]


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What one threshold does, as shares.

    Attributes:
        accuracy: of the images of known sources, those that are accepted and whose source is told.
        false_alarms: of the images of known sources, those called unknown.
        found: of the images of unknown sources, those called unknown.
    """

    accuracy: float
    false_alarms: float
    found: float


def auroc(known_n: np.ndarray, unknown_m: np.ndarray) -> float:
    """Area under the ROC curve: how often an unknown image's score is above a known one's; of ties, half.

    That is the Mann-Whitney statistic (Hanley and McNeil 1982). It is the same whichever of both is called positive.

    Args:
        known_n, unknown_m: float [N] and [M], scores; infinite ones may be among them.

    Raises:
        ConfigError: no images of a kind, or a score that is NaN.
    """
    known_n, unknown_m = _scores(known_n, unknown_m)
    return float(_pairs_won(known_n, unknown_m) / (len(known_n) * len(unknown_m)))


def fpr_at_tpr(known_n: np.ndarray, unknown_m: np.ndarray, tpr: float = 0.95) -> float:
    """False-positive rate at a true-positive rate, where *known* is the positive class.

    The share of unknown images that are accepted by the lowest threshold that accepts at least such a share of the
    known ones (Liang et al., ICLR 2018, section 4.2; Liu et al., NeurIPS 2020). Papers that call the unknown ones
    positive (Hendrycks et al., ICLR 2019) report another number under this name.

    Args:
        known_n, unknown_m: float [N] and [M], scores.
        tpr: above 0, at most 1.

    Raises:
        ConfigError: as of `auroc`; or a rate that is none.
    """
    known_n, unknown_m = _scores(known_n, unknown_m)
    if not 0 < tpr <= 1:
        raise ConfigError(f"A true-positive rate of {tpr} is none; use 0.95.")
    rank = int(np.ceil(tpr * len(known_n) - 1e-9))  # without rounding's last digit: 0.95 of 20 are 19
    return float(np.mean(unknown_m <= np.sort(known_n)[max(1, rank) - 1]))


def oscr(known_n: np.ndarray, is_right_n: np.ndarray, unknown_m: np.ndarray) -> float:
    """Area under the curve of correct classifications over false positives (Dhamija et al., NeurIPS 2018, section 4).

    At a threshold, the correct classification rate is the share of *all* known images that are accepted and whose
    source is told, and the false-positive rate that of the unknown ones accepted. Between thresholds the curve is
    straight, so the area is the share of pairs in which the known image is told and has the lower score; of ties, half.
    At most the accuracy without a threshold, which it reaches where nothing unknown is ever below what is told.

    Args:
        known_n, unknown_m: float [N] and [M], scores.
        is_right_n: bool [N], whether the source is told.

    Raises:
        ConfigError: as of `auroc`; or not as many answers as images.
    """
    known_n, unknown_m = _scores(known_n, unknown_m)
    told_n = known_n[_answers(is_right_n, known_n)]
    return float(_pairs_won(told_n, unknown_m) / (len(known_n) * len(unknown_m)))


def operating_point(
    known_n: np.ndarray, is_right_n: np.ndarray, unknown_m: np.ndarray, threshold: float
) -> OperatingPoint:
    """Shares at one threshold: a point of the curve of `oscr`, with its accuracy.

    Args:
        known_n, unknown_m: float [N] and [M], scores.
        is_right_n: bool [N], whether the source is told.
        threshold: scores above it are called unknown; infinite: none is.

    Raises:
        ConfigError: as of `oscr`.
    """
    known_n, unknown_m = _scores(known_n, unknown_m)
    is_accepted_n = known_n <= threshold
    return OperatingPoint(
        float(np.mean(is_accepted_n & _answers(is_right_n, known_n))),
        float(np.mean(~is_accepted_n)),
        float(np.mean(unknown_m > threshold)),
    )


def _pairs_won(low_n: np.ndarray, high_m: np.ndarray) -> float:
    """Pairs in which the second is larger, and half of those in which both are equal."""
    ordered_n = np.sort(low_n)
    return float((np.searchsorted(ordered_n, high_m, "left") + np.searchsorted(ordered_n, high_m, "right")).sum() / 2)


def _scores(known_n: np.ndarray, unknown_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(known_n, np.float64), np.asarray(unknown_m, np.float64)
    if not all(map(len, found)):
        raise ConfigError(f"{len(found[0])} known and {len(found[1])} unknown images: give at least one of each.")
    if any(np.isnan(scores).any() for scores in found):
        raise ConfigError("A score is not a number: compute the artifacts again.")
    return found


def _answers(is_right_n: np.ndarray, known_n: np.ndarray) -> np.ndarray:
    if len(is_right_n) != len(known_n):
        raise ConfigError(f"There are {len(known_n)} known images and {len(is_right_n)} answers: give one of each.")
    return np.asarray(is_right_n, bool)
