"""Networks that tell sources apart by artifacts. Each standardises its input with what it saw in training.

Legend: B artifacts, D dimensions, F features, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from manifpt.errors import ConfigError
from manifpt.log import event
from manifpt.spaces import BUILT_IN, SpaceSpec
from manifpt.spaces.weights import load_state, resolve_weights

__all__ = ["NETWORKS", "AttributorNetwork", "imagenet_start", "make_network", "start_from"]


class AttributorNetwork(nn.Module):
    """Standardisation, a body, and a linear layer on its features."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, shape: tuple[int, ...], body: nn.Module, features: int, sources: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.body = body
        self.classifier = nn.Linear(features, sources)

    def standardize(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Takes over the training artifacts' mean and standard deviation, float [shape] both.

        Coordinate by coordinate: a log-spectrum falls by four orders from low to high frequencies, and what tells
        sources apart is at the high end. A coordinate that hardly varies gets the scale of those that do: divided by
        its own, the first image that differs there would drown out everything else.
        """
        varying = std[std > 1e-6 * std.max()]  # more than what rounding leaves of a constant
        scale = varying.median() if len(varying) else torch.ones_like(std).max()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-3 * scale, std, scale))

    def features(self, artifacts: torch.Tensor) -> torch.Tensor:
        """float [B, *shape] -> float [B, F], what the last layer sees; FD ratios are measured there."""
        standard = (artifacts - self.mean) / self.std
        if standard.ndim == 4:
            standard = standard.contiguous(memory_format=torch.channels_last)
        found: torch.Tensor = self.body(standard)
        return found

    def forward(self, artifacts: torch.Tensor) -> torch.Tensor:
        """float [B, *shape] -> logits, float [B, S]."""
        found: torch.Tensor = self.classifier(self.features(artifacts))
        return found


def make_network(name: str, shape: tuple[int, ...], sources: int) -> AttributorNetwork:
    """A network for artifacts of a shape, with random weights.

    Args:
        name: a key of `NETWORKS`.
        shape: `(D,)` or `(3, H, W)`.
        sources: S.

    Raises:
        ConfigError: an unknown name, or one for another shape.
    """
    if name not in NETWORKS:
        raise ConfigError(f"Unknown network {name!r}; known: {', '.join(NETWORKS)}.")
    if name != "head" and (len(shape) != 3 or shape[0] != 3):
        raise ConfigError(f"--network {name} takes image-shaped artifacts, and these are {list(shape)}: use head.")
    network = NETWORKS[name](shape, sources)
    return network.to(memory_format=torch.channels_last) if len(shape) == 3 else network


def imagenet_start(name: str) -> SpaceSpec | None:
    """torchvision's ImageNet weights for a network that has such a start, where they can be had."""
    if name != "resnet50":
        return None
    try:
        return resolve_weights(BUILT_IN["supervised"])
    except ConfigError as error:
        event("no_imagenet_weights", hint="resnet50 starts from random weights", why=error)
        return None


def start_from(network: AttributorNetwork, weights: SpaceSpec) -> None:
    """Takes over the weights of `imagenet_start`, all but the last layer's."""
    network.body.load_state_dict({name: t for name, t in load_state(weights).items() if not name.startswith("fc.")})


def _head(shape: tuple[int, ...], sources: int) -> AttributorNetwork:
    """One hidden layer of 512 (paper.md 11, our reading: how the paper's network takes a vector isn't known)."""
    body = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(math.prod(shape), 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5)
    )
    return AttributorNetwork(shape, body, 512, sources)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _small(shape: tuple[int, ...], sources: int) -> AttributorNetwork:
    """The released code's attributor: 3 x 3 blocks of 16, 32 and 64 channels, 0.27 M parameters (cocoaaa/gm-fpts)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels_in = 16
    for group, channels in enumerate((16, 32, 64)):
        for number in range(3):
            layers.append(_Block(channels_in, channels, 2 if group and not number else 1))
            channels_in = channels
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return AttributorNetwork(shape, body, 64, sources)


_LEAST_MAP_PX = 4


def _resnet50(shape: tuple[int, ...], sources: int) -> AttributorNetwork:
    """torchvision's (paper, Fig. 3). It shrinks an image 32 times; below 128 px its first strides are left out, with
    the same weights, so that its last map has at least 4 x 4 places."""
    from torchvision.models import resnet50

    body = resnet50(weights=None)
    body.fc = nn.Identity()
    shorter_px = min(shape[1:])
    if shorter_px < 32 * _LEAST_MAP_PX:
        body.maxpool = nn.Identity()
    if shorter_px < 16 * _LEAST_MAP_PX:
        body.conv1.stride = (1, 1)
    return AttributorNetwork(shape, body, 2048, sources)


NETWORKS: dict[str, Callable[[tuple[int, ...], int], AttributorNetwork]] = {
    "resnet50": _resnet50,
    "small": _small,
    "released": _small,
    "head": _head,
}
