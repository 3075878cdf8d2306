"""What the baselines with a hand-crafted feature vector share: candidates of a classifier, the best on validation.

Legend: B images, H W pixels, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from manifpt.baselines.inputs import Shape, chunks

__all__ = ["ClassicBaseline", "scores_of"]


class ClassicBaseline(ABC):
    """Features, then the candidate with the best validation accuracy; of equals, the first.

    Attributes:
        picked: name of the candidate; "" before `fit`.
        validation_accuracy_by_candidate: of each.
    """

    name: str

    def __init__(self, sources: int, size_px: tuple[int, int], seed: int = 0, threads: int = 1) -> None:
        self._shape, self._seed, self._threads = Shape(sources, size_px), seed, threads
        self._classifier: Any = None
        self.picked = ""
        self.validation_accuracy_by_candidate: dict[str, float] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which classifier was picked."""
        return (f"classifier picked on validation: {self.picked}",) if self.picked else ()

    @abstractmethod
    def _features(self, images_bchw: np.ndarray) -> np.ndarray:
        """float64 [B, F] of a few images."""

    @abstractmethod
    def _candidates(self) -> dict[str, Any]:
        """Unfitted scikit-learn classifiers, by name."""

    def _resampled(self, label_b: np.ndarray) -> np.ndarray:
        """Rows to train on, int64: all of them, unless an original says otherwise."""
        return np.arange(len(label_b))

    def fit(
        self,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> None:
        """See `Baseline`."""
        self._shape.check_training(images_bchw, label_b, validation_bchw, validation_label_b)
        row_b = self._resampled(label_b)
        train_bf, validation_bf = self.features(images_bchw)[row_b], self.features(validation_bchw)
        best = -1.0
        for name, classifier in self._candidates().items():
            classifier.fit(train_bf, label_b[row_b])
            answer_b = scores_of(classifier, validation_bf).argmax(1)
            accuracy = float((answer_b == validation_label_b).mean())
            self.validation_accuracy_by_candidate[name] = accuracy
            if accuracy > best:
                best, self.picked, self._classifier = accuracy, name, classifier

    def features(self, images_bchw: np.ndarray) -> np.ndarray:
        """The hand-crafted vector: float32 [B, F]."""
        self._shape.check(images_bchw)
        if not len(images_bchw):
            return self.features(np.zeros((1, *images_bchw.shape[1:]), np.uint8))[:0]
        return np.concatenate([self._features(part) for part in chunks(images_bchw)]).astype(np.float32)

    def predict(self, images_bchw: np.ndarray) -> np.ndarray:
        """float32 [B, sources], scores of the picked classifier."""
        assert self._classifier is not None, "fit comes first"
        if not len(images_bchw):  # scikit-learn refuses none
            return np.empty((0, self._shape.sources), np.float32)
        return scores_of(self._classifier, self.features(images_bchw))


def scores_of(classifier: Any, features_bf: np.ndarray) -> np.ndarray:
    """One score a class, one against the rest: float32 [B, classes].

    A support vector machine's decision function, which orders as well as its probabilities would and costs no inner
    cross-validation; the fraction of neighbours where there is no such function.
    """
    if not hasattr(classifier, "decision_function"):
        return classifier.predict_proba(features_bf).astype(np.float32)
    score = classifier.decision_function(features_bf)
    if score.ndim == 1:  # two classes: how much it speaks for the second
        score = np.stack([-score, score], axis=1)
    return score.astype(np.float32)
