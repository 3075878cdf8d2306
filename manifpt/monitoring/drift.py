"""Whether a window of new images differs from what was before: seven tests, corrected for their number.

Legend: B images of a sample, A coordinates of a feature, K numbers of a spectrum.

Each test's p-value holds at any number of images, so where nothing changed, a window fires anything at all at most as
often as its level says. Images count as independent: a burst of one source in a window is a change of shares. Where the
baseline knows that images come in groups, as of one latent at many steps of training, norms, features and spectra are
compared without them, and without the labels that most of them have: new images are of other groups, and differ as
groups do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import fisher_exact

from manifpt.errors import ConfigError
from manifpt.monitoring.strata import Strata, energy_test, norm_test

__all__ = ["TESTS", "Counts", "Finding", "Sample", "check_level", "drift", "holm", "stability_index"]

TESTS = ("norms", "features", "spectrum", "shares", "unknown", "inconclusive", "rejected")

_MOST_IMAGES = 2000  # of a sample that norms, features and spectra are compared on: the work grows with its square
_PERMUTATIONS = 999
_ENOUGH = 500  # images with a verdict: of fewer, a rise of unknown ones is seen only where it is huge
_MOST_COUNTED = 10**9 - 1  # images that NumPy draws from
_LEAST_LEVEL = 1e-3  # permutations, and with them time, grow with its inverse
_MOST_TOGETHER = 0.5  # of a label's images; fewer are those of another source that were taken for it


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of the images of one window, or of the baseline.

    The baseline's images must be ones that the attributor was not trained on, such as those it was calibrated on: the
    features of training images are fitted, and everything would differ from them.

    Attributes:
        label_b: str (object) [B], the most probable label, whatever the verdict.
        distance_b: float64 [B], norm of the artifact.
        feature_ba: float32 [B, A], of the attributor.
        spectrum_bk: float32 [B, K], of the artifact.
        is_unknown_b: bool [B].
        group_b: str (object) [B], equal for images that were made together; None: with no other, or it isn't known.
    """

    label_b: np.ndarray
    distance_b: np.ndarray
    feature_ba: np.ndarray
    spectrum_bk: np.ndarray
    is_unknown_b: np.ndarray
    group_b: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label_b)

    def take(self, row_n: np.ndarray) -> Sample:
        """Some of the images, by number (int64 [N])."""
        return Sample(
            self.label_b[row_n], self.distance_b[row_n], self.feature_ba[row_n], self.spectrum_bk[row_n],
            self.is_unknown_b[row_n],
            None if self.group_b is None else self.group_b[row_n],
        )  # fmt: skip

    @property
    def is_together_b(self) -> np.ndarray:
        """bool [B], whether an image was made together with another one of the sample."""
        if self.group_b is None:
            return np.zeros(len(self), bool)
        counts = Counter(group for group in self.group_b if group is not None)
        return np.array([counts[group] > 1 for group in self.group_b], bool)

    def independent(self) -> Sample:
        """One image of each group, and all that are of none."""
        if self.group_b is None:
            return self
        is_alone_b = np.array([group is None for group in self.group_b], bool)
        _, first_g = np.unique(self.group_b[~is_alone_b].astype(str), return_index=True)
        return self.take(np.sort(np.r_[np.flatnonzero(is_alone_b), np.flatnonzero(~is_alone_b)[first_g]]))

    def grouped_labels(self) -> set[str]:
        """Those most of whose images were made together with others."""
        is_together_b = self.is_together_b
        return {label for label in set(self.label_b) if is_together_b[self.label_b == label].mean() > _MOST_TOGETHER}


@dataclass(frozen=True, slots=True)
class Counts:
    """Images by verdict.

    Attributes:
        sources: images attributed to each source.
        unknown, inconclusive: images without a source.
        rejected: images that couldn't be looked at.
    """

    sources: Mapping[str, int] = field(default_factory=dict)
    unknown: int = 0
    inconclusive: int = 0
    rejected: int = 0

    @property
    def attributed(self) -> int:
        """Images with a source."""
        return sum(self.sources.values())

    @property
    def judged(self) -> int:
        """Images with a verdict."""
        return self.attributed + self.unknown + self.inconclusive

    @property
    def images(self) -> int:
        """All of them."""
        return self.judged + self.rejected

    def merged(self, other: Counts) -> Counts:
        """Of both."""
        sources = {
            name: self.sources.get(name, 0) + other.sources.get(name, 0)
            for name in sorted({*self.sources, *other.sources})
        }
        return Counts(
            sources,
            self.unknown + other.unknown,
            self.inconclusive + other.inconclusive,
            self.rejected + other.rejected,
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """What one test says of one window.

    Attributes:
        name: one of `TESTS`.
        statistic: norms: Kolmogorov-Smirnov, 0 to 1; features and spectrum: energy
            distance, in their unit (of a spectrum, its own spread); shares: population
            stability index; the others: by how much a share rose, 0.01 is one point.
        p_value: of this test alone.
        adjusted: over all tests of the window (Holm).
        fired: whether `adjusted` is at most the level.
        detail: what was compared with what, in one line.
    """

    name: str
    statistic: float
    p_value: float
    adjusted: float
    fired: bool
    detail: str


def drift(
    baseline: Sample, window: Sample, before: Counts, now: Counts, level: float, seed: int, other: Counts | None = None
) -> list[Finding]:
    """All tests that have data to compare. A window without images has none.

    norms, features and spectrum compare the window's images with the baseline's, within labels that don't come in
    groups, on at most 2,000 images of each that are drawn at random; shares, unknown, inconclusive and rejected compare
    counts with those before. Where little was before, unknown is compared with the baseline, one image of each group,
    by what the attributor alone says of both: verdicts also hang on re-encoding.

    `before` should hold the windows that gave no alert: then an alert lasts until what changed is dealt with. Where no
    window was quiet, shares, inconclusive and rejected are compared with what else was before, or left out.

    Args:
        baseline: of held-out images, see `Sample`.
        window: the new images with a verdict.
        before, now: images by verdict, until now and in this window.
        other: of earlier windows that gave alerts.
        level: chance of any false finding in a window, from 0.001 to below 1.
        seed: of what is drawn: give each window its own.

    Returns:
        In the order of `TESTS`.

    Raises:
        ConfigError: a level out of range, or a norm or feature that is no finite number.
    """
    check_level(level)
    permutations = max(_PERMUTATIONS, math.ceil(2 * len(TESTS) / level) - 1)  # so that Holm's smallest is half of it
    found = _of_samples(baseline, window, permutations, seed)
    usual = before if before.images or other is None else other
    shares = _shares(usual.sources, now.sources, permutations, seed)
    found += [shares] if shares else []
    alone = baseline.independent()
    if before.judged >= min(len(alone), _ENOUGH):
        found += _rise("unknown", before.unknown, before.judged, now.unknown, now.judged)
    else:
        unknown = int(window.is_unknown_b.sum())
        found += _rise("unknown", int(alone.is_unknown_b.sum()), len(alone), unknown, len(window))
    found += _rise("inconclusive", usual.inconclusive, usual.judged, now.inconclusive, now.judged)
    found += _rise("rejected", usual.rejected, usual.images, now.rejected, now.images)
    adjusted = holm([finding.p_value for finding in found])
    return [replace(f, adjusted=a, fired=a <= level) for f, a in zip(found, adjusted, strict=True)]


def check_level(level: float) -> None:
    """Raises:
    ConfigError: a level out of range.
    """
    if not _LEAST_LEVEL <= level < 1:
        raise ConfigError(f"A drift level of {level} is none; use 0.05, or as little as {_LEAST_LEVEL}.")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all tests together, however they depend on each other (Holm 1979).

    Returns:
        In the order given; at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, (len(p_values) - place) * p_values[number])
        adjusted[number] = min(1.0, largest)
    return adjusted


def stability_index(before_ds: np.ndarray, now_ds: np.ndarray) -> np.ndarray:
    """The population stability index: sum over sources of (q - p) ln(q / p), of shares p before and q now.

    Half an image is added to each source's, so that one that appears or vanishes gives a number. By custom 0.1 is a
    small change and 0.25 a large one; of few images chance alone gives as much.

    Args:
        before_ds, now_ds: int64 [..., S], images of each of S sources.

    Returns:
        float64 [...], not below 0.
    """
    old_ds, new_ds = ((count + 0.5) / (count + 0.5).sum(axis=-1, keepdims=True) for count in (before_ds, now_ds))
    index_d: np.ndarray = ((new_ds - old_ds) * np.log(new_ds / old_ds)).sum(axis=-1)
    return index_d


def _of_samples(baseline: Sample, window: Sample, permutations: int, seed: int) -> list[Finding]:
    if not len(baseline) or not len(window):
        return []
    rng = np.random.default_rng([seed, 0])
    grouped, alone = baseline.grouped_labels(), baseline.take(np.flatnonzero(~baseline.is_together_b))
    shared = (set(alone.label_b) & set(window.label_b)) - grouped
    known, new = (_some(sample, shared, rng) for sample in (alone, window))
    is_window_n = np.repeat([False, True], [len(known), len(new)])
    strata = Strata.of(np.concatenate([known.label_b, new.label_b]), is_window_n)
    if not strata.rows_s:
        return []
    distance_n = np.concatenate([known.distance_b, new.distance_b])
    feature_na = np.concatenate([known.feature_ba, new.feature_ba])
    spectrum_nk = strata.scaled(np.concatenate([known.spectrum_bk, new.spectrum_bk]))
    detail = (
        f"{len(new):,} of the window's {len(window):,} images against {len(known):,} of the baseline's "
        f"{len(baseline):,}, within {len(strata.rows_s)} labels, {permutations:,} permutations"
    )
    if grouped:
        detail += f"; not {', '.join(sorted(grouped))}: their held-out images come in groups"
    norms = norm_test(strata, distance_n, permutations, seed)
    tests = {"norms": norms, "features": energy_test(strata, feature_na, permutations, seed)}
    if spectrum_nk.shape[1] > 1:  # that of a vector is its norm
        tests["spectrum"] = energy_test(strata, spectrum_nk, permutations, seed)
    return [_finding(name, *test, detail) for name, test in tests.items()]


def _some(sample: Sample, labels: set[str], rng: np.random.Generator) -> Sample:
    row_n = np.flatnonzero([label in labels for label in sample.label_b])
    if len(row_n) > _MOST_IMAGES:
        row_n = np.sort(rng.choice(row_n, _MOST_IMAGES, replace=False))
    return sample.take(row_n)


def _shares(before: Mapping[str, int], now: Mapping[str, int], permutations: int, seed: int) -> Finding | None:
    """Given how many images each source has in all, any of them are as likely to be the window's."""
    names = sorted(name for name in {*before, *now} if before.get(name, 0) + now.get(name, 0))
    before_s, now_s = (np.array([counts.get(name, 0) for name in names], np.int64) for counts in (before, now))
    if len(names) < 2 or not before_s.any() or not now_s.any():
        return None
    for count_s in (now_s, before_s):  # of so many, every few say the same
        count_s //= 1 + int(count_s.sum()) // (_MOST_COUNTED // 2)
    total_s = before_s + now_s
    rng = np.random.default_rng([seed, 1])
    drawn_ds = rng.multivariate_hypergeometric(total_s, int(now_s.sum()), size=permutations, method="marginals")
    seen = float(stability_index(before_s, now_s))
    extreme = int((stability_index(total_s - drawn_ds, drawn_ds) >= seen * (1 - 1e-9)).sum())
    detail = f"{int(now_s.sum()):,} attributed images against {int(before_s.sum()):,} before, {len(names)} sources"
    return _finding("shares", seen, (1 + extreme) / (1 + permutations), detail)


def _rise(name: str, before: int, of_before: int, now: int, of_now: int) -> list[Finding]:
    """Fisher's exact test of a share that rose; nothing where one side has no images."""
    if not of_before or not of_now:
        return []
    table = [[now, of_now - now], [before, of_before - before]]
    p_value = float(fisher_exact(table, alternative="greater").pvalue)
    detail = f"{now:,} of {of_now:,} images against {before:,} of {of_before:,} before"
    return [_finding(name, now / of_now - before / of_before, p_value, detail)]


def _finding(name: str, statistic: float, p_value: float, detail: str) -> Finding:
    return Finding(name, statistic, p_value, p_value, False, detail)
