"""Yu et al. 2019, "Attributing fake images to GANs": a patch classifier, trained end to end.

Legend: B images, C channels, H W pixels, N = side of the input.

Known from the original's code (ningyu1991/GANFingerprints, network `C_patch`, postpool, latent_res -1): for sides N
down to 8: conv 3x3, conv 3x3, 2x2 average pool; at 4x4: conv 3x3, dense 512, dense to the classes. With side 2^s the
two convolutions have nf(s - 1) and nf(s - 2) channels, nf(t) = min(1024 / 2^t, 512): 64 and 128 at 32 px, 32 and 64 at
64, 16 and 32 at 128, 8 and 16 at 256. Reflect padding, biases from zero, leaky ReLU 0.2 but for the last layer, no
normalisation. Equalised learning rate: weights are drawn from N(0, 1) and multiplied by gain / sqrt(fan in) in the
forward pass, gain sqrt 2, and 1 in the last layer. Inputs in [-1, 1], mirrored at random; softmax cross-entropy; Adam,
rate 1e-3, betas 0 and 0.99, epsilon 1e-8, batch 32. It trains until somebody stops it. An average of weights, 0.999,
is a parameter of the training function, which as released doesn't use it; here the average predicts.

Our reading: the best state on validation, the end by patience or budget. The average of weights begins with a shorter
memory, t / (t + 10) after t steps, and reaches 0.999 after 9,990: with 0.999 from the start the random first weights
would be half of the average after 700 steps, which the original's millions of steps forget. A side that is no power of
two is reflected outwards to the next one (28 to 32 px); the original's author resized instead, which destroys traces.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from manifpt.baselines.inputs import mirrored, reflected
from manifpt.baselines.network import Classifier, LearnedBaseline, Training

__all__ = ["Yu19", "patch_classifier"]

_CHANNELS = 1024
_MOST_CHANNELS = 512
_SLOPE = 0.2


class Yu19(LearnedBaseline):
    """Features are the 512 numbers before the last layer."""

    name = "yu19"

    def __init__(
        self,
        sources: int,
        size_px: tuple[int, int],
        seed: int = 0,
        threads: int = 1,
        budget_images: int = 60_000,
        learning_rate: float = 1e-3,
        batch: int = 32,
        smoothing: float = 0.999,
        patience: int = 10,
    ) -> None:
        """Args:
        sources, size_px, seed, threads: see `make_baseline`.
        budget_images, learning_rate, batch, smoothing, patience: see `Training`.
        """
        training = Training(
            learning_rate=learning_rate, betas=(0.0, 0.99), batch=batch, budget_images=budget_images,
            patience=patience, smoothing=smoothing,
        )  # fmt: skip
        super().__init__(sources, size_px, seed, threads, training)
        self._side_px = 1 << (max(size_px) - 1).bit_length()

    def _build(self) -> Classifier:
        return patch_classifier(self._side_px, self._shape.sources)

    def _inputs(self, images_bchw: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(reflected(images_bchw, self._side_px)).float() / 127.5 - 1

    def _augmented(self, images_bchw: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return self._inputs(mirrored(images_bchw, rng))


class _Conv(nn.Module):
    """3x3 with reflect padding and an equalised learning rate, then leaky ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._scale = math.sqrt(2 / (9 * inputs))

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x_bchw, (1, 1, 1, 1), mode="reflect")
        return F.leaky_relu(F.conv2d(padded, self.weight * self._scale, self.bias), _SLOPE)


class _Dense(nn.Module):
    """With an equalised learning rate; leaky ReLU where it isn't the last."""

    def __init__(self, inputs: int, outputs: int, is_last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self._scale, self._is_last = math.sqrt((1 if is_last else 2) / inputs), is_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x.flatten(1), self.weight * self._scale, self.bias)
        return y if self._is_last else F.leaky_relu(y, _SLOPE)


def patch_classifier(side_px: int, sources: int) -> Classifier:
    """The network for inputs float32 [B, 3, side, side], side a power of two from 8 on."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage in range(side_px.bit_length() - 1, 2, -1):
        for name, outputs in (("conv0", _channels(stage - 1)), ("conv1", _channels(stage - 2))):
            layers[f"{2**stage}-{name}"] = _Conv(channels, outputs)
            channels = outputs
        layers[f"{2**stage}-pool"] = nn.AvgPool2d(2)
    outputs = _channels(1)
    layers["4-conv0"] = _Conv(channels, outputs)
    width = max(outputs, sources)
    layers["4-dense"] = _Dense(16 * outputs, width, is_last=False)
    return Classifier(nn.Sequential(layers), _Dense(width, sources, is_last=True))


def _channels(stage: int) -> int:
    return min(_CHANNELS >> stage, _MOST_CHANNELS)
