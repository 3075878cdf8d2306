"""Nataraj et al. 2019, "Detecting GAN generated fake images using co-occurrence matrices".

Legend: B images, H W pixels, L grey levels.

Known: a co-occurrence matrix of each colour channel of the raw pixels, 256 x 256 each, and a convolutional network on
the three. From a later re-implementation: pairs are horizontal neighbours at distance 1, both orders counted, divided
by the sum. From memory of the paper: conv 32 3x3, conv 32 5x5, max-pool; conv 64 3x3, conv 64 5x5, max-pool; conv 128
3x3, conv 128 5x5, max-pool; dense 256, dense 256, sigmoid; ReLU throughout. No code of theirs is known.

Our reading: convolutions keep the size, pools are 2x2, the sigmoid becomes a softmax over the sources. Optimizer and
rate aren't known: Adam, 1e-3, batch 32. The matrices are multiplied by L, a constant, so that one whose mass lies
along its diagonal has entries near one there; their own entries, 1e-5 and less, would leave a network without
normalisation blind.

Deviation for small images: a side under 128 px gives under 16,256 pairs (992 at 32 px) for 65,536 cells, nearly all of
them empty, and the network would cost 6 GMAC an image. There L is 64: grey levels are merged by four. `levels=256`
gives the original's matrices at any size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from manifpt.baselines.network import Classifier, LearnedBaseline, Training
from manifpt.errors import ConfigError

__all__ = ["Nataraj19", "co_occurrence"]

SMALL_PX = 128


class Nataraj19(LearnedBaseline):
    """Features are the 256 numbers before the last layer."""

    name = "nataraj19"

    def __init__(
        self,
        sources: int,
        size_px: tuple[int, int],
        seed: int = 0,
        threads: int = 1,
        levels: int | None = None,
        budget_images: int = 60_000,
        learning_rate: float = 1e-3,
        batch: int = 32,
        patience: int = 10,
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        levels: L, a power of two from 8 to 256; None: 256, and 64 for images under `SMALL_PX`.
        budget_images, learning_rate, batch, patience: see `Training`.

        Raises:
            ConfigError: another number of levels.
        """
        training = Training(learning_rate=learning_rate, batch=batch, budget_images=budget_images, patience=patience)
        super().__init__(sources, size_px, seed, threads, training)
        self.levels = levels or (64 if min(size_px) < SMALL_PX else 256)
        if self.levels not in (8, 16, 32, 64, 128, 256):
            raise ConfigError(f"nataraj19: levels is a power of two from 8 to 256, not {levels}.")

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was trained, and on how many levels."""
        merged = (f"{self.levels} grey levels instead of 256",) if self.levels < 256 else ()
        return (*super().notes, *merged)

    def _build(self) -> Classifier:
        layers: list[nn.Module] = []
        channels = 3
        for outputs in (32, 64, 128):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(outputs, outputs, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            channels = outputs
        layers += [nn.Flatten(), nn.Linear(channels * (self.levels // 8) ** 2, 256), nn.ReLU(inplace=True)]
        layers += [nn.Linear(256, 256), nn.ReLU(inplace=True)]
        return Classifier(nn.Sequential(*layers), nn.Linear(256, self._shape.sources))

    def _inputs(self, images_bchw: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(co_occurrence(images_bchw, self.levels) * np.float32(self.levels))


def co_occurrence(images_bchw: np.ndarray, levels: int = 256) -> np.ndarray:
    """How often two grey levels are horizontal neighbours, in either order, as a share of all pairs.

    Args:
        images_bchw: uint8 [B, 3, H, W].
        levels: L; fewer than 256 merge neighbouring grey levels.

    Returns:
        float32 [B, 3, L, L], each matrix symmetric with sum 1.
    """
    level = images_bchw.astype(np.int64) * levels // 256
    matrix = np.arange(level.shape[0] * 3).reshape(-1, 3, 1, 1)
    cell = (matrix * levels + level[..., :-1]) * levels + level[..., 1:]
    count = np.bincount(cell.reshape(-1), minlength=level.shape[0] * 3 * levels**2)
    pairs = 2 * level.shape[2] * (level.shape[3] - 1)
    count_bcll = count.reshape(len(level), 3, levels, levels)
    return ((count_bcll + count_bcll.transpose(0, 1, 3, 2)) / pairs).astype(np.float32)
