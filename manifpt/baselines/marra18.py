"""Marra et al. 2018, "Detection of GAN-generated fake images over social networks": XceptionNet.

Legend: B images, H W pixels.

The paper compares detectors on image-to-image translation; which of them the table has isn't known, so it is the
paper's best: Xception, with ImageNet weights, fine-tuned (both from memory). No code of theirs is known, nor its
settings.

The network is Chollet's: entry flow conv 32 and 64, then blocks of 128, 256 and 728 channels with two separable 3x3
convolutions, a max-pool and a 1x1 shortcut each; middle flow eight blocks of three separable convolutions at 728; exit
flow a block of 728 and 1,024, separable 1,536 and 2,048, mean over pixels. Batch normalisation after each convolution.

Our reading. From scratch: Xception has no ImageNet weights in torchvision. Strides: of the first four that halve the
image, as many are kept as leave the middle flow at least 8x8 px: four from 128 px on (8x8 there, 16x16 at 256), three
at 64, two at 32; those dropped are the first ones, where the traces are, and images under 32 px are reflected to 32.
All convolutions pad, the first two as well, so that sizes halve exactly. Inputs in [-1, 1], mirrored at random. Adam,
rate 1e-3, batch 32. `width` and `middle` make it smaller than the original, for a processor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from manifpt.baselines.inputs import mirrored, reflected
from manifpt.baselines.network import Classifier, LearnedBaseline, Training

__all__ = ["Marra18", "xception"]

LEAST_PX = 32
LEAST_MIDDLE_PX = 8
# oneDNN writes past its memory where a 1x1 convolution that strides has fewer inputs than a vector has floats
# (its issue 6035, open with PyTorch 2.14): the gradient of a shortcut ended the process.
LEAST_CHANNELS = 16


class Marra18(LearnedBaseline):
    """Features are Xception's 2,048 pooled ones."""

    name = "marra18"

    def __init__(
        self,
        sources: int,
        size_px: tuple[int, int],
        seed: int = 0,
        threads: int = 1,
        budget_images: int = 60_000,
        learning_rate: float = 1e-3,
        batch: int = 32,
        patience: int = 10,
        width: float = 1.0,
        middle: int = 8,
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        budget_images, learning_rate, batch, patience: see `Training`.
        width: channels, as a share of the original's; 16 at least.
        middle: blocks of the middle flow.
        """
        training = Training(learning_rate=learning_rate, batch=batch, budget_images=budget_images, patience=patience)
        super().__init__(sources, size_px, seed, threads, training)
        self._width, self._middle = width, middle

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was trained, and from where."""
        is_whole = self._width == 1 and self._middle == 8
        smaller = () if is_whole else (f"width {self._width}, {self._middle} middle blocks",)
        return (*super().notes, "from scratch: no ImageNet weights", *smaller)

    def _build(self) -> Classifier:
        side_px = max(LEAST_PX, min(self._shape.size_px))
        return xception(side_px, self._shape.sources, self._width, self._middle)

    def _inputs(self, images_bchw: np.ndarray) -> torch.Tensor:
        if min(images_bchw.shape[2:]) < LEAST_PX:
            images_bchw = reflected(images_bchw, max(LEAST_PX, *images_bchw.shape[2:]))
        return torch.from_numpy(np.ascontiguousarray(images_bchw)).float() / 127.5 - 1

    def _augmented(self, images_bchw: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return self._inputs(mirrored(images_bchw, rng))


class _Block(nn.Module):
    """ReLU and separable convolutions, one for each number of outputs, beside a shortcut."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], stride: int, starts_with_relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for i, count in enumerate(outputs):
            layers += [nn.ReLU()] if i or starts_with_relu else []
            layers += _separable(channels, count)
            channels = count
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, padding=1))
        self.residual = nn.Sequential(*layers)
        has_own = stride > 1 or inputs != channels
        own = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.shortcut: nn.Module = own if has_own else nn.Identity()

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.residual(x_bchw) + self.shortcut(x_bchw)


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]


def xception(side_px: int, sources: int, width: float = 1.0, middle: int = 8) -> Classifier:
    """The network for inputs float32 [B, 3, side, side]; see the module for what depends on the side."""

    def wide(channels: int) -> int:
        return max(LEAST_CHANNELS, round(channels * width))

    halvings = next(n for n in (4, 3, 2, 1, 0) if side_px >> n >= LEAST_MIDDLE_PX or not n)
    stride = [1] * (4 - halvings) + [2] * halvings
    layers: list[nn.Module] = []
    for inputs, outputs, step in ((3, wide(32), stride[0]), (wide(32), wide(64), 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, step, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    channels = wide(64)
    for i, outputs in enumerate((wide(128), wide(256), wide(728))):
        layers.append(_Block(channels, (outputs, outputs), stride[1 + i], starts_with_relu=i > 0))
        channels = outputs
    layers += [_Block(channels, (channels,) * 3, 1) for _ in range(middle)]
    layers.append(_Block(channels, (channels, wide(1024)), 2))
    for inputs, outputs in ((wide(1024), wide(1536)), (wide(1536), wide(2048))):
        layers += [*_separable(inputs, outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Classifier(nn.Sequential(*layers), nn.Linear(wide(2048), sources))
