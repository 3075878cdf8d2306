"""How unlike the known sources an image is, and from where on it is called unknown. Pure.

Legend: B artifacts, N validation images, S labels, F features, A principal axes, K numbers of a spectrum.

Scores; each is larger for what is less known:

    softmax            logarithm of the calibrated odds against the most probable label: it orders images as 1 - the
                       largest probability does (Hendrycks and Gimpel, ICLR 2017), and tells apart what is nearly sure
    energy             -log sum exp(logits) (Liu et al., NeurIPS 2020, eq. 4 at T = 1)
    distance           squared Mahalanobis distance of the features to the nearest label's mean (Lee et al., NeurIPS
                       2018, eq. 2), by the covariance of all labels pooled, shrunk
    relative_distance  the same, less the squared distance to the mean of all training features by their total
                       covariance (Ren et al., 2021, arXiv:2106.09022, eq. 3): directions in which everything varies
                       count for less
    spectrum           Mahalanobis distance of the artifact's spectrum to the mean of its most probable label's, by that
                       label's own covariance, shrunk to that of all: of few images more. Ours: a network looks at what
                       tells known sources apart, and a new one may differ elsewhere
    NAME+spectrum      one of the first four and `spectrum`, each less its median among validation images and divided by
                       their interquartile range, and no less than -1, then added. Networks are surest of some sources
                       that they never saw: below that, certainty no longer outweighs a spectrum that is odd

Which of the first four serves is chosen without an unknown image: see `validation_aurocs`. The spectrum is always
added where there is one (a vector has none but its norm): those areas can't say what it is worth, since nothing in it
was trained to tell the label that they hide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import load
from scipy.linalg import solve_triangular
from scipy.special import logsumexp

from manifpt.attributor.features import FeatureStatistics, oas
from manifpt.attributor.outputs import Outputs
from manifpt.metrics.openset import auroc

__all__ = [
    "SCORES",
    "WITH_SPECTRUM",
    "OpenSet",
    "chosen_on",
    "scorer",
    "threshold_at",
    "usual_of",
    "validation_aurocs",
]


# What a network says of B artifacts -> float [B]; larger is less known.
Score = Callable[[Outputs], np.ndarray]
Usual = Mapping[str, tuple[float, float]]
_NONE: Usual = MappingProxyType({})


@dataclass(frozen=True)
class OpenSet:
    """Statistics of training artifacts, and the score and threshold that validation chose.

    Attributes:
        statistics: of the training artifacts.
        axes_af: float64 [A, F], their principal axes; kept, since another machine may find equal ones in another order.
        temperature: of the calibration.
        score: a key of `SCORES`, with `+spectrum` or without.
        usual: median and interquartile range of the two scores that are added; see `usual_of`.
        threshold: scores above it are called unknown; infinite: none is.
    """

    statistics: FeatureStatistics
    axes_af: np.ndarray
    temperature: float
    score: str
    usual: Usual
    threshold: float

    @classmethod
    def from_bytes(cls, data: bytes, temperature: float, chosen: Mapping[str, Any]) -> OpenSet:
        """From `openset.safetensors`, and `unknown` of `calibration.json`.

        Raises:
            LookupError, TypeError, ValueError, SafetensorError: they aren't those.
        """
        score, threshold = str(chosen["score"]), chosen["threshold"]
        if score.removesuffix(WITH_SPECTRUM) not in SCORES:
            raise ValueError(f"unknown score {score!r}")
        usual = {name: (float(middle), float(spread)) for name, (middle, spread) in dict(chosen["usual"]).items()}
        if score.endswith(WITH_SPECTRUM) and set(usual) != {score.removesuffix(WITH_SPECTRUM), "spectrum"}:
            raise ValueError(f"{score} without what is usual of both")
        limit = float("inf") if threshold is None else float(threshold)
        return cls(FeatureStatistics.from_bytes(data), load(data)["axes_af"], temperature, score, usual, limit)

    def check(self, labels: int, features: int, numbers: int) -> None:
        """Raises:
        ValueError: it is of a network with other labels, features or artifacts, or holds numbers that can't be.
        """
        found, (s, f, k) = self.statistics, (labels, features, numbers)
        arrays = (found.count_s, found.mean_sf, found.within_ff, found.spectrum_sk, found.spread_skk, self.axes_af)
        shapes = (*(array.shape for array in arrays[:-1]), self.axes_af.shape[1:])
        expected = ((s,), (s, f), (f, f), (s, k), (s, k, k), (f,))
        if shapes != expected or any(array.dtype != np.float64 for array in arrays):
            raise ValueError("statistics of another network")
        if not all(np.isfinite(array).all() for array in arrays) or (found.count_s <= 0).any():
            raise ValueError("statistics that are not finite")
        if not 0 < self.temperature < np.inf or np.isnan(self.threshold):
            raise ValueError(f"temperature {self.temperature}, threshold {self.threshold}")
        if not all(np.isfinite(middle) and 0 < spread < np.inf for middle, spread in self.usual.values()):
            raise ValueError(f"usual {dict(self.usual)}")

    def to_bytes(self) -> bytes:
        """`openset.safetensors`: statistics and axes."""
        return self.statistics.to_bytes(axes_af=self.axes_af)

    def chosen(self) -> dict[str, Any]:
        """Score, what is usual of it, and threshold, as `from_bytes` takes them; JSON has no infinity."""
        threshold = self.threshold if np.isfinite(self.threshold) else None
        return {"score": self.score, "usual": {k: list(v) for k, v in self.usual.items()}, "threshold": threshold}

    @cached_property
    def scores(self) -> Score:
        """The chosen score; its factorisations are made once."""
        return scorer(self.score, self.temperature, self.statistics, self.usual)

    def coordinates(self, features_bf: np.ndarray) -> np.ndarray:
        """float32 [B, A + 1]: features along the axes, from the mean of the training features; the norm of the rest."""
        apart_bf = features_bf.astype(np.float64) - self.statistics.mean_f
        along_ba = apart_bf @ self.axes_af.T
        rest_b = np.linalg.norm(apart_bf - along_ba @ self.axes_af, axis=1)
        return np.concatenate([along_ba, rest_b[:, None]], axis=1).astype(np.float32)


def scorer(name: str, temperature: float, statistics: FeatureStatistics, usual: Usual = _NONE) -> Score:
    """How unlike the known sources artifacts are, by what a network says of them and their spectra; as float32 [B].

    Args:
        name: a key of `SCORES`, with `+spectrum` or without.
        temperature: of the calibration.
        statistics: of the training artifacts.
        usual: of the scores that are added; see `usual_of`.
    """
    if not name.endswith(WITH_SPECTRUM):
        score = SCORES[name](temperature, statistics)
        return lambda said: score(said).astype(np.float32)
    parts = [(SCORES[part](temperature, statistics), *middle_and_spread) for part, middle_and_spread in usual.items()]

    def added(said: Outputs) -> np.ndarray:
        scaled = [np.maximum((score(said) - middle) / spread, _SUREST) for score, middle, spread in parts]
        return np.sum(scaled, axis=0).astype(np.float32)

    return added


def _softmax(temperature: float, _: FeatureStatistics) -> Score:
    def score(said: Outputs) -> np.ndarray:
        logits_bs = np.sort(said.logits_bs.astype(float) / temperature, axis=1)
        if logits_bs.shape[1] == 1:  # there is nothing else that it could be
            return np.zeros(len(logits_bs))
        return np.asarray(logsumexp(logits_bs[:, :-1], axis=1) - logits_bs[:, -1])

    return score


def _energy(_: float, __: FeatureStatistics) -> Score:
    return lambda said: np.asarray(-logsumexp(said.logits_bs.astype(float), axis=1))


def _distance(_: float, known: FeatureStatistics) -> Score:
    squared = _squared_distances(known.mean_sf, oas(known.within_ff, known.count_s.sum()))
    return lambda said: squared(said.features_bf.astype(float)).min(axis=1)


def _relative_distance(temperature: float, known: FeatureStatistics) -> Score:
    nearest = _distance(temperature, known)
    squared = _squared_distances(known.mean_f[None], oas(known.total_ff, known.count_s.sum()))
    return lambda said: nearest(said) - squared(said.features_bf.astype(float))[:, 0]


def _spectrum(_: float, known: FeatureStatistics) -> Score:
    numbers = known.spectrum_sk.shape[1]
    rounding_kk = _LEAST_VARIANCE * np.eye(numbers)
    pooled_kk = np.tensordot(known.count_s, known.spread_skk, axes=1) / known.count_s.sum()
    of_labels = []
    for mean_k, spread_kk, count in zip(known.spectrum_sk, known.spread_skk, known.count_s, strict=True):
        # As if it had K more images, whose spread is that of all labels: few of its own say little, and one nothing.
        mixed_kk = (count * spread_kk + numbers * pooled_kk) / (count + numbers)
        of_labels.append(_squared_distances(mean_k[None], oas(mixed_kk, count + numbers) + rounding_kk))

    def score(said: Outputs) -> np.ndarray:
        squared_b = np.empty(len(said.predicted_b))
        for label, squared in enumerate(of_labels):
            is_label_b = said.predicted_b == label
            squared_b[is_label_b] = squared(said.spectrum_bk[is_label_b].astype(float))[:, 0]
        return np.sqrt(squared_b)

    return score


def _squared_distances(mean_sf: np.ndarray, covariance_ff: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Features float [B, F] -> squared Mahalanobis distances to the means, float64 [B, S]."""
    root_ff = np.linalg.cholesky(covariance_ff)

    def white(rows_nf: np.ndarray) -> np.ndarray:
        return np.asarray(solve_triangular(root_ff, rows_nf.T, lower=True, check_finite=False))

    mean_fs = white(mean_sf)

    def squared(features_bf: np.ndarray) -> np.ndarray:
        white_fb = white(features_bf)
        return np.stack([np.square(white_fb - mean_f[:, None]).sum(axis=0) for mean_f in mean_fs.T], axis=1)

    return squared


WITH_SPECTRUM = "+spectrum"
_SUREST = -1.0  # interquartile ranges from the median
_LEAST_VARIANCE = 1e-4  # of a ring's logarithm: a hundredth of its power may be an artifact's rounding
SCORES: dict[str, Callable[[float, FeatureStatistics], Score]] = {
    "softmax": _softmax,
    "energy": _energy,
    "distance": _distance,
    "relative_distance": _relative_distance,
    "spectrum": _spectrum,
}


def validation_aurocs(validation: Outputs, temperature: float, statistics: FeatureStatistics) -> dict[str, float]:
    """By score: how well it would tell an unknown source, as far as validation images of known ones can say.

    Each label in turn is hidden: its output and its mean are taken away, and its validation images are the unknown
    ones. The mean of the areas under the ROC curves, every hidden label counting the same, is what the choice goes by.

    What this can't know: the network was trained to tell the hidden label apart, so its features hold what a new
    source's need not; nearly every score looks better here than it is, and those of features more so than those of
    outputs. The pooled covariance and the temperature still have seen the label. And a new source may differ from the
    known ones in ways in which none of these differs from the others. Leaving a source out of training and all, as
    `evaluate_attributor --leave-one-out` does, measures what this only ranks.

    Args:
        validation: N images, some of each label.
        temperature: of the calibration.
        statistics: of the training artifacts.
    """
    label_n = validation.label_b
    labels = np.unique(label_n)
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for label in labels:
        is_hidden_n, known = label_n == label, statistics.without(label)
        said = replace(validation, logits_bs=np.delete(validation.logits_bs, label, 1))
        for name, of_score in found.items():
            score_n = scorer(name, temperature, known)(said)
            of_score.append(auroc(score_n[~is_hidden_n], score_n[is_hidden_n]))
    return {name: float(np.mean(of_score)) for name, of_score in found.items()}


def usual_of(name: str, validation: Outputs, temperature: float, statistics: FeatureStatistics) -> Usual:
    """Median and interquartile range of a score and of `spectrum` among validation images, by their names.

    What they say of a few images changes neither. A range of 0, as of images that are all alike, is taken for 1.
    """
    found = {}
    for part in (name, "spectrum"):
        low, middle, high = np.quantile(scorer(part, temperature, statistics)(validation), [0.25, 0.5, 0.75])
        found[part] = (float(middle), float(high - low) or 1.0)
    return found


def chosen_on(
    validation: Outputs, temperature: float, statistics: FeatureStatistics, aurocs: Mapping[str, float], rate: float
) -> OpenSet:
    """The best score of a network, with the spectrum added where there is one, and the threshold of a rate. Of equal
    ones, the first.

    Score, threshold and the network's best epoch are chosen on the same images, which the guarantee of `threshold_at`
    does not allow for. The rate measured on test images says what that costs.

    Args:
        validation: images of all labels.
        temperature: of the calibration.
        statistics: of the training artifacts.
        aurocs: by score; see `validation_aurocs`.
        rate: share of images of known sources that may be called unknown; see `threshold_at`.
    """
    best = max((name for name in aurocs if name != "spectrum"), key=lambda name: aurocs[name])
    name, usual = best, _NONE
    if validation.spectrum_bk.shape[1] > 1:
        name, usual = best + WITH_SPECTRUM, usual_of(best, validation, temperature, statistics)
    score_n = scorer(name, temperature, statistics, usual)(validation)
    threshold = threshold_at(score_n, validation.label_b, rate)
    return OpenSet(statistics, statistics.axes(), temperature, name, usual, threshold)


def threshold_at(score_n: np.ndarray, label_n: np.ndarray, rate: float) -> float:
    """The lowest threshold that at most such a share of known images will be above, every label counting the same.

    Of each label's n images and one more, which is yet to come, the one to come is counted as above: the lowest score
    t with mean over labels of (count above t + 1) / (n + 1) <= rate. So chosen, new images that are like the label's
    validation ones are above it with at most that probability, averaged over labels and over validation sets, however
    few there are (split conformal prediction: Vovk et al. 2005; Angelopoulos and Bates 2023, section 1).
    Images of one group are not independent, and the guarantee is then as good as the number of groups.

    Args:
        score_n: float [N], of validation images, which did not train the network.
        label_n: int64 [N].
        rate: between 0 and 1.

    Returns:
        A score of one of the images; infinite where there are too few of them for such a rate.
    """
    label_n = np.unique(label_n, return_inverse=True)[1]
    count_s = np.bincount(label_n)
    weight_n = 1 / ((count_s[label_n] + 1) * len(count_s))
    order_n = np.argsort(-score_n, kind="stable")  # of equal ones, the first then has all higher ones before it
    value_v, first_v = np.unique(score_n[order_n], return_index=True)
    above_n = np.cumsum(weight_n[order_n]) - weight_n[order_n]
    is_met_v = np.mean(1 / (count_s + 1)) + above_n[first_v] <= rate + 1e-12
    return float(value_v[is_met_v.argmax()]) if is_met_v.any() else float("inf")
