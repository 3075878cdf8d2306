"""Marra et al. 2019, "Do GANs leave artificial fingerprints?": the mean noise residual of a source.

Legend: B images, C channels, H W pixels, S sources, P = C H W.

Known of the paper: residual x - f(x), f a denoiser; a source's fingerprint is the mean of its residuals; an image
belongs to the source with whose fingerprint its own residual correlates most. From memory: f is BM3D, 512 residuals a
fingerprint, correlation normalised (mean removed, unit norm). No code of theirs is known. Nothing is learnt.

Deviation: BM3D can't be had here. f is Wiener's local filter, m + max(v - n, 0) / v (x - m), with m and v the mean and
variance of 3x3 pixels of a channel, reflected at the borders, and n a noise variance. A later re-implementation took
non-local means (7-px patches, 21-px search, h = 25); on 600 images of three real sources at 32 px, which chose between
the two, it was less accurate than this (0.41 against 0.44 to 0.48) and took a hundred times as long. BM3D's assumed
noise isn't known either, so the deviation sqrt n is the one of `NOISE` with the best validation accuracy.

Our reading: one correlation over all pixels and channels. `features` are the S correlations, since they are all that
the decision sees; the residual itself, P numbers, is larger than any sample a Frechet distance is computed from.
"""

from __future__ import annotations

import numpy as np

from manifpt.baselines.inputs import Shape, chunks
from manifpt.errors import ConfigError

__all__ = ["Marra19", "correlations", "residual"]

NOISE = (2.0, 5.0, 10.0, 25.0)  # grey levels
WINDOW_PX = 3


class Marra19:
    """Fingerprints, and correlations with them.

    Attributes:
        noise: the deviation picked on validation, in grey levels; 0 before `fit`.
        fingerprint_sp: float64 [S, P].
    """

    name = "marra19"

    def __init__(
        self,
        sources: int,
        size_px: tuple[int, int],
        seed: int = 0,
        threads: int = 1,
        residuals: int = 512,
        noise: tuple[float, ...] = NOISE,
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        residuals: at most so many a fingerprint, drawn at random.
        noise: deviations to choose from, in grey levels.

        Raises:
            ConfigError: no residual, or no deviation.
        """
        if residuals < 1 or not noise or min(noise) <= 0:
            raise ConfigError("marra19 needs at least 1 residual a source and deviations over 0; correct them.")
        self._shape, self._seed = Shape(sources, size_px), seed
        self._residuals, self._noise = residuals, noise
        self.noise = 0.0
        self.fingerprint_sp = np.empty((0, 0))

    @property
    def notes(self) -> tuple[str, ...]:
        """Which denoiser."""
        return (f"local Wiener filter instead of BM3D, noise {self.noise:g} of 255",) if self.noise else ()

    def fit(
        self,
        images_bchw: np.ndarray,
        label_b: np.ndarray,
        validation_bchw: np.ndarray,
        validation_label_b: np.ndarray,
    ) -> None:
        """See `Baseline`."""
        self._shape.check_training(images_bchw, label_b, validation_bchw, validation_label_b)
        rng = np.random.default_rng(self._seed)
        rows = [rng.permutation(np.flatnonzero(label_b == s))[: self._residuals] for s in range(self._shape.sources)]
        best = -1.0
        for noise in self._noise:
            means = [
                np.mean([r for part in chunks(images_bchw[row]) for r in residual(part, noise)], 0) for row in rows
            ]
            fingerprint_sp = np.stack(means).reshape(len(means), -1)
            correlation_bs = _correlated(validation_bchw, fingerprint_sp, noise)
            accuracy = float((correlation_bs.argmax(1) == validation_label_b).mean())
            if accuracy > best:
                best, self.noise, self.fingerprint_sp = accuracy, noise, fingerprint_sp

    def features(self, images_bchw: np.ndarray) -> np.ndarray:
        """The correlations: float32 [B, S]."""
        return self.predict(images_bchw)

    def predict(self, images_bchw: np.ndarray) -> np.ndarray:
        """Correlations with each fingerprint, -1 to 1: float32 [B, S]."""
        assert self.noise, "fit comes first"
        self._shape.check(images_bchw)
        return _correlated(images_bchw, self.fingerprint_sp, self.noise)


def residual(images_bchw: np.ndarray, noise: float) -> np.ndarray:
    """x - f(x), f Wiener's local filter: uint8 [B, C, H, W] -> float64, the same shape, in grey levels."""
    from scipy.ndimage import uniform_filter

    window, x_bchw = (1, 1, WINDOW_PX, WINDOW_PX), images_bchw.astype(np.float64)
    mean_bchw = uniform_filter(x_bchw, window, mode="reflect")
    variance_bchw = np.maximum(uniform_filter(x_bchw**2, window, mode="reflect") - mean_bchw**2, 0)
    # 1 - max(v - n, 0) / v = min(n / v, 1)
    return np.minimum(noise**2 / np.maximum(variance_bchw, 1e-9), 1) * (x_bchw - mean_bchw)


def correlations(residual_bp: np.ndarray, fingerprint_sp: np.ndarray) -> np.ndarray:
    """Normalised: inner products of vectors without their mean, of unit norm; 0 with a constant vector.

    Args:
        residual_bp: float64 [B, P].
        fingerprint_sp: float64 [S, P].

    Returns:
        float64 [B, S].
    """
    return _unit(residual_bp) @ _unit(fingerprint_sp).T


def _unit(vectors_bp: np.ndarray) -> np.ndarray:
    centred_bp = vectors_bp - vectors_bp.mean(1, keepdims=True)
    return centred_bp / np.maximum(np.linalg.norm(centred_bp, axis=1, keepdims=True), 1e-9)


def _correlated(images_bchw: np.ndarray, fingerprint_sp: np.ndarray, noise: float) -> np.ndarray:
    parts = [correlations(residual(part, noise).reshape(len(part), -1), fingerprint_sp) for part in chunks(images_bchw)]
    return np.concatenate([np.empty((0, len(fingerprint_sp))), *parts]).astype(np.float32)
