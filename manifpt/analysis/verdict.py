"""Whether the numbers measured of one image name its source, or are inconclusive. Pure.

Legend: N images of a source.

Every rule that isn't met is a reason in words, and one reason is enough: a verdict errs towards saying nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LEAST_TEST_IMAGES", "QUANTILES", "USUAL", "Findings", "percentile", "quantiles", "threshold", "verdict"]

QUANTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)  # %
USUAL = (0.5, 99.5)  # %: distances outside are not those of the source's images
LEAST_TEST_IMAGES = 30  # a share of fewer images is known to no better than 17 points (Wilson's interval of 95%)
_LEAST_PRECISION = 0.5
_LEAST_PROBABILITY = 0.5  # above, the label is more probable than all others together


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a verdict rests on.

    Attributes:
        label: the attributor's most probable one.
        probability: its, calibrated, in [0, 1].
        calibration_error: of the attributor on its test images, in [0, 1]; None: not measured.
        precision: of the label on the test images, in [0, 1]; None: it was never named there.
        test_images: of the label.
        named_images: test images that were named so, of which precision is a share.
        unknown_score: of the attributor's open-set score; larger is less like its known sources.
        unknown_threshold: over which an image is called unknown; infinite: none is.
        percentile: of the image's distance among those of the label's images, 0 to 100; None: the run has none.
        other_size: in words, what the image was resized from; None: it wasn't, or its nearest reals were too.
        in_reference: the reference holds its very pixels, or was made of this very file.
        near_copy: its nearest real is nearly a copy.
        in_run: the run holds its very pixels.
    """

    label: str
    probability: float
    calibration_error: float | None
    precision: float | None
    test_images: int
    named_images: int
    unknown_score: float
    unknown_threshold: float
    percentile: float | None
    other_size: str | None
    in_reference: bool
    near_copy: bool
    in_run: bool


def threshold(calibration_error: float | None) -> float:
    """The least calibrated probability that a verdict needs: 0.5 and the expected calibration error.

    By the error a probability is off on average; what is left must still be more than all other labels together.
    """
    return _LEAST_PROBABILITY + (calibration_error or 0.0)


def verdict(found: Findings) -> dict[str, Any]:
    """The verdict, as `evidence.json` holds it: `source` (null where inconclusive), `conclusive`, `reasons`."""
    reasons = [reason for is_so, reason in _reasons(found) if is_so]
    return {"source": None if reasons else found.label, "conclusive": not reasons, "reasons": reasons}


def _reasons(found: Findings) -> list[tuple[bool, str]]:
    """Each rule: whether it is broken, and the sentence. A number that is none breaks every rule on it."""
    least, label = threshold(found.calibration_error), found.label
    precision = float("nan") if found.precision is None else found.precision
    place = float("nan") if found.percentile is None else found.percentile
    return [
        (
            not found.probability >= least,
            f"The most probable label, {label}, has {100 * found.probability:.1f}%; {100 * least:.1f}% are needed.",
        ),
        (found.calibration_error is None, "The attributor's calibration was not measured."),
        (found.precision is None, f"The attributor never named {label} on its test images."),
        (
            precision < _LEAST_PRECISION,
            f"On test images the attributor was right in {100 * precision:.1f}% of the cases in which it named "
            f"{label}; {100 * _LEAST_PRECISION:.0f}% are needed.",
        ),
        (
            found.test_images < LEAST_TEST_IMAGES,
            f"The attributor was tested on {found.test_images} images of {label}; {LEAST_TEST_IMAGES} are needed.",
        ),
        (
            found.precision is not None and found.named_images < LEAST_TEST_IMAGES,
            f"The attributor named {label} on {found.named_images} test images only, of which its precision is a "
            f"share; {LEAST_TEST_IMAGES} are needed.",
        ),
        (
            not found.unknown_score <= found.unknown_threshold,
            f"It is unlike the sources that the attributor knows: its unknown score is {found.unknown_score:.4g}, and "
            f"over {found.unknown_threshold:.4g} an image is called unknown.",
        ),
        (found.percentile is None, f"The run has no images of {label} to compare the distance with."),
        (
            found.percentile is not None and not USUAL[0] <= place <= USUAL[1],
            f"Its distance lies outside the middle 99% of those of {label} (percentile {place:.1f}).",
        ),
        (
            found.other_size is not None,
            f"It had to be resized from {found.other_size}, and none of its nearest reals has that size.",
        ),
        (found.in_reference, "The reference holds this very image: it is a real image, or a copy of one."),
        (found.near_copy, "Its nearest real is less than half as far as the second: it is nearly a copy of it."),
        (found.in_run, "It is one of the run's images, so the attributor may have been trained on it."),
    ]


def percentile(value: float, value_n: np.ndarray) -> float | None:
    """Where a value lies among others: the share below it and half of the share equal to it, in %; None of none."""
    if not len(value_n):
        return None
    return float(100 * (np.mean(value_n < value) + np.mean(value_n <= value)) / 2)


def quantiles(value_n: np.ndarray) -> dict[str, float]:
    """By name ("0.5", in %), the quantiles of float [N], N at least 1; linear between values."""
    found = np.percentile(value_n.astype(np.float64), QUANTILES)
    return {f"{share:g}": float(value) for share, value in zip(QUANTILES, found, strict=True)}
