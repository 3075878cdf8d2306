"""The eight published attribution methods that the paper compares with (paper Table 2), behind one Protocol.

Legend: B images, H W pixels, F features.

Binary detectors become attributors in the plainest way: the same features, the original's classifier with one class a
source. The paper doesn't say how it did that, so this is our reading. Each module's docstring tells what is known from
the original's code and what is not. A new baseline is one file and one line in `BASELINES`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np

from manifpt.errors import ConfigError

__all__ = ["BASELINES", "Baseline", "make_baseline"]


class Baseline(Protocol):
    """An attribution method: who made this image?

    Images are uint8 [B, 3, H, W], RGB; a grey one has three equal channels. Labels are int64 [B] in [0, sources).
    """

    @property
    def name(self) -> str:
        """As in `BASELINES`."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a table has to say about this run: no pretrained weights, which classifier was picked."""
        ...

    def fit(
        self,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> None:
        """Learns from the training images; picks settings, or when to stop, by accuracy on the validation images.

        Raises:
            ConfigError: the wrong size, or a source without a training image.
        """
        ...

    def features(self, images_bchw: np.ndarray) -> np.ndarray:
        """float32 [B, F]: what the classifier's last layer sees, or the hand-crafted vector. For the FD ratio."""
        ...

    def predict(self, images_bchw: np.ndarray) -> np.ndarray:
        """float32 [B, sources], scores; the largest is the attribution."""
        ...


def _lazy(module: str, cls: str) -> Callable[..., Baseline]:
    def make(sources: int, size_px: tuple[int, int], seed: int, threads: int, **settings: Any) -> Baseline:
        # torch and scikit-learn cost seconds; whoever only needs the names does without.
        kind = getattr(importlib.import_module(f"manifpt.baselines.{module}"), cls)
        known = list(inspect.signature(kind).parameters)[4:]
        for setting in settings:
            if setting not in known:
                raise ConfigError(f"Baseline {module!r} has no setting {setting!r}; known: {', '.join(known)}.")
        return cast(Baseline, kind(sources, size_px, seed, threads, **settings))

    return make


# In the order of the paper's Table 2.
BASELINES: dict[str, Callable[..., Baseline]] = {
    "mccloskey18": _lazy("mccloskey18", "McCloskey18"),
    "nataraj19": _lazy("nataraj19", "Nataraj19"),
    "durall20": _lazy("durall20", "Durall20"),
    "dzanic20": _lazy("dzanic20", "Dzanic20"),
    "wang20": _lazy("wang20", "Wang20"),
    "marra18": _lazy("marra18", "Marra18"),
    "marra19": _lazy("marra19", "Marra19"),
    "yu19": _lazy("yu19", "Yu19"),
}


def make_baseline(
    name: str, sources: int, size_px: tuple[int, int], seed: int, threads: int = 1, **settings: Any
) -> Baseline:
    """A baseline, with its original's settings where none are given.

    Args:
        name: a key of `BASELINES`.
        sources: number of classes, at least 2.
        size_px: height and width of every image.
        seed: of whatever is random; the same seed gives the same scores on a CPU.
        threads: CPU threads for its arithmetic.
        settings: of this baseline's class, such as `budget_images` of those that learn.

    Raises:
        ConfigError: an unknown name or setting, fewer than two sources, or images that are too small.
    """
    if name not in BASELINES:
        raise ConfigError(f"Unknown baseline {name!r}; known: {', '.join(BASELINES)}.")
    return BASELINES[name](sources, size_px, seed, threads, **settings)
