"""What learns: a backbone, whose pooled features become the space, and a projector, which training alone uses.

Legend: B images, D dimensions of the projection.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import nn

from manifpt.spaces.architectures import make_architecture

__all__ = ["PROJECTIONS", "TwinNetwork", "architecture_of"]

_SMALL_PX = 64
# Of each block. With weights of zero at first, a block begins as the identity, as in the released code.
_LAST_NORMALIZATION = {"resnet18": ".bn2", "resnet50": ".bn3"}
# Dimensions of the projection: the paper's for ResNet50; a quarter where a CPU may have to train it.
PROJECTIONS = {"resnet18": 2048, "resnet50": 8192}


def architecture_of(backbone: str, size_px: int) -> str:
    """The name under which a space finds it: with the small stem below 64 px."""
    return f"manifpt:{backbone}_small" if size_px < _SMALL_PX else f"torchvision:{backbone}"


class TwinNetwork(nn.Module):
    """Two views at once, so that gradients are shared over workers once."""

    def __init__(self, backbone: str, size_px: int) -> None:
        super().__init__()
        self.backbone = make_architecture(architecture_of(backbone, size_px))
        features = 512 if backbone == "resnet18" else 2048
        sizes = (features, *[PROJECTIONS[backbone]] * 3)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes[:3]):
            layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(sizes[2], sizes[3], bias=False))
        for name, normalization in self.backbone.named_modules():
            if name.endswith(_LAST_NORMALIZATION[backbone]):
                nn.init.zeros_(cast(nn.Parameter, normalization.weight))

    def forward(self, one_bchw: torch.Tensor, other_bchw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, 3, S, S] twice -> float [B, D] twice. One after the other: each has statistics of its own."""
        return self.projector(self.backbone(one_bchw)), self.projector(self.backbone(other_bchw))
